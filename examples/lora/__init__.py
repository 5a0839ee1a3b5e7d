"""A study of two LoRA experts: the README of the folder above tells how to run it."""
