"""Routed layers: linear layers that mix their weight on the way into the product."""
