"""Families of routers: what has a coefficient of its own. Needs no torch."""

from __future__ import annotations

FAMILIES = ("scalar", "rows", "rows+columns")
"""Each group alone; each row of each routed tensor as well; and each column of each routed matrix too."""

PARTS = ((), ("rows",), ("rows", "columns"))
"""The parts of `Routers` that each family has besides the groups' own."""


def check_family(family: str) -> None:
    """ValueError unless it is one of FAMILIES."""
    if family not in FAMILIES:
        raise ValueError(f"got family={family!r}, expected one of {', '.join(FAMILIES)}")
