"""Speed and memory, one file a question; `python -m benchmarks.run` runs them."""
