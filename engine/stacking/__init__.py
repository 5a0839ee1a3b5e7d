"""Stacking: checkpoints become a base and the experts' deltas."""
