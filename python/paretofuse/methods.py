"""Merge methods, and what one of your own derives from: see docs/recipes.md."""

from paretofuse.engine.methods.method import Group, Method, Parameter
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.registry import METHODS

__all__ = ["METHODS", "Group", "Method", "Numbers", "Parameter"]
