"""The images and texts that experiments learn from, from packages that carry them."""
