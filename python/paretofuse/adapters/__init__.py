"""Adapters: what a user may call a model, turned into the engine's sources. A file for each library."""
