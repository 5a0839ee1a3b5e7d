"""Fronts: the models of a sweep with their metrics, and their pictures."""
