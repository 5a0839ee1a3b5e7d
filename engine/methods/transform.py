"""A method's share that concerns the experts themselves: their differences, thinned, as what routers then learn over.

expert' = base + m_k s_k d_k        s_k and m_k as in `deltas`, all weights equal; "tsv": as in that file
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paretofuse.engine.methods.deltas import DeltaMethod
from paretofuse.engine.methods.native import Bits
from paretofuse.engine.methods.numbers import Floats
from paretofuse.engine.methods.random import key_of
from paretofuse.engine.methods.registry import METHODS
from paretofuse.engine.methods.tsv import Tsv, tsv_shares
from paretofuse.engine.methods.words import parse_words

_OWN = ("density", "rescale", "gamma", "epsilon")
"""Parameters that concern one difference; weights, and what is made of the sum, are the routers' business."""

TRANSFORMS: dict[str, DeltaMethod | Tsv] = {
    method.name: method
    for method in METHODS
    if isinstance(method, DeltaMethod | Tsv) and method.name != "task_arithmetic"
}
"""The methods that change an expert's difference."""


@dataclass(frozen=True)
class Transform:
    """What is done to every expert's differences, a tensor at a time.

    Attributes:
        method: the method.
        options: its parameters by name.
        seed: what random methods start from.
    """

    method: DeltaMethod | Tsv
    options: Mapping[str, Any]
    seed: int = 0
    _elected: dict[str, Bits] = field(default_factory=dict, compare=False)

    def apply(
        self, tensor: str, expert: int, count: int, difference: Callable[[int], Floats | None]
    ) -> Floats:
        """An expert's transformed difference.

        Args:
            tensor: the tensor's name.
            expert: which one.
            count: how many experts there are.
            difference: gives the difference of each by number, float32; None where it has none. Methods that elect
                signs ask for all of them, once for each tensor: a bit for each element is remembered. "tsv" asks for
                all of them each time.
        """
        if isinstance(self.method, Tsv):
            found = {number: own for number in range(count) if (own := difference(number)) is not None}
            return tsv_shares(list(found.values()))[list(found).index(expert)]
        thinned = self._thinned(self.method, tensor, expert, difference)
        if thinned is None:
            raise ValueError(f"got no difference of expert {expert} in tensor {tensor!r}, expected one")
        if not self.method.elects:
            return thinned
        if tensor not in self._elected:
            total = np.zeros(thinned.shape, np.float32)
            for number in range(count):
                own = self._thinned(self.method, tensor, number, difference)
                if own is not None:
                    total += own
            self._elected[tensor] = np.packbits(total.reshape(-1) >= 0)
        up = np.unpackbits(self._elected[tensor], count=thinned.size).astype(bool).reshape(thinned.shape)
        elected: Floats = np.where(np.where(up, thinned > 0, thinned < 0), thinned, np.float32(0))
        return elected

    def _thinned(
        self, method: DeltaMethod, tensor: str, expert: int, difference: Callable[[int], Floats | None]
    ) -> Floats | None:
        own = difference(expert)
        if own is None:
            return None
        key = key_of(self.seed, tensor, expert)
        return method.thin(own, self.options, bool(self.options["rescale"]), key)


def parse_transform(text: str) -> Transform:
    """A transform from its text: a method, and after a colon its parameters: "ties:density=0.2,rescale=true".

    Raises:
        TypeError: no text.
        ValueError: a method that changes no single difference, a parameter that it lacks, or a value out of range.
    """
    choices = {
        name: {parameter.name: parameter for parameter in method.parameters if parameter.name in _OWN}
        for name, method in TRANSFORMS.items()
    }
    name, options, seed = parse_words(f"transform={text!r}", text, choices)
    return Transform(TRANSFORMS[name], options, seed)
