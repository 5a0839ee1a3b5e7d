"""The engine: layout, store, routers, merging, the live module, training and sweeps."""
