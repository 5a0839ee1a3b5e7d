"""Merging: base + sum(weight * delta), by three backends."""
