"""Modules: nn.Modules over a stack, merged, mixed layer by layer, or with a preference for each row."""
