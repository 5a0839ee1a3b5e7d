"""Evaluation: what many preferences reach, measured."""
