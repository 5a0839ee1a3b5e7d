"""Recipes: mergekit's YAML files, run tensor by tensor from disk to disk. No torch, except to build tokenizers."""
