"""Ahead-of-time compilation: the kernels as binaries for programs without Python, and as machine code to be read."""
