"""A merge of all experts as one difference of its own, by any method that works on differences to a base.

delta = method(0; d_1 ... d_K)      what the merge adds to a base depends on the differences d_k alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paretofuse.engine.methods.deltas import DeltaMethod
from paretofuse.engine.methods.iso_c import IsoC
from paretofuse.engine.methods.method import Group, Method, Parameter
from paretofuse.engine.methods.model_stock import ModelStock
from paretofuse.engine.methods.numbers import Floats, Numbers
from paretofuse.engine.methods.registry import METHODS
from paretofuse.engine.methods.tsv import Tsv

BY_DIFFERENCES: dict[str, Method] = {
    method.name: method for method in METHODS if isinstance(method, DeltaMethod | IsoC | ModelStock | Tsv)
}
"""The methods that see nothing of a base but the differences to it."""


def choices() -> dict[str, dict[str, Parameter]]:
    """Each method's parameters that a text may give: all but those that change nothing here."""
    return {
        name: {p.name: p for p in method.parameters if p.name not in ("weight", "int8_mask")}
        for name, method in BY_DIFFERENCES.items()
    }


@dataclass(frozen=True)
class Consensus:
    """A method with its parameters.

    Attributes:
        name: of the method, one of BY_DIFFERENCES.
        options: its parameters by name; the experts' weights are 1.
        seed: what random methods start from.
    """

    name: str
    options: Mapping[str, Any]
    seed: int = 0

    def of(self, tensor: str, differences: Sequence[Floats]) -> Floats:
        """What the merge of one tensor adds to the base.

        Args:
            tensor: its name, from which random methods draw.
            differences: what each expert adds, float32 of one shape.

        Returns:
            float32 of that shape.
        """
        method, shape = BY_DIFFERENCES[self.name], differences[0].shape
        each = {p.name: self.options.get(p.name, 1.0) for p in method.parameters if p.each}
        shared = {p.name: self.options.get(p.name, p.default) for p in method.parameters if not p.each}
        base = Numbers.of(np.zeros(shape, np.float32), "F32")
        models = tuple(Numbers.of(difference, "F32") for difference in differences)
        out = Numbers.empty("F32", shape)
        method.merge(Group(tensor, base, models, (each,) * len(models), shared, self.seed), out)
        return out.floats()
