"""The native extension; everything else about the package is in pyproject.toml."""

from setuptools import setup

setup()
