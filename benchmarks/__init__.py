"""Benchmarks and the demo, run from a checkout as `python -m benchmarks.<name>`; not in the package."""
