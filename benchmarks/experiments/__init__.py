"""Fronts on real tasks beside their rivals; `python -m benchmarks.experiments` runs them."""
