"""Batched modules: every row of a batch at a preference of its own."""
