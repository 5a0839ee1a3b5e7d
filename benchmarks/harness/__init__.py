"""What all benchmarks share: timing side by side, checks, and the record of a row."""
