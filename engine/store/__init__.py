"""The store: what lies on disk; needs no torch."""
