"""Evaluation: many preferences, judged."""
