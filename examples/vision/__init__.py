"""A study of two small CLIPs of open_clip: the README of the folder above tells how to run it."""
