"""Routing: a preference becomes routing weights."""
