"""Merge methods: what turns one tensor of every model into one tensor. A method is one small file. No torch."""
