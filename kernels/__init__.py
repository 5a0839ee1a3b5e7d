"""Triton kernels, each beside its plain PyTorch reference; imports nothing of the engine."""
