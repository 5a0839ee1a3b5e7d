"""Methods that work on differences to a base (task vectors): thin each out, agree on signs, add what is left.

    out = base + lambda * sum_k m_k w_k s_k d_k / divisor        d_k = model_k - base

s_k keeps some of the elements (the method's own rule, `keep`), rescaled by one number for the tensor where `rescale`
asks for it; m_k keeps those whose sign is that of the weighted sum (TIES' election, where the method has one). The
divisor is sum_k m_k w_k where `normalize` asks for it. Sources: task arithmetic (arXiv 2212.04089), TIES (2306.01708),
DARE (2311.03099), Breadcrumbs (2312.06795), DELLA (2406.11617).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from paretofuse.engine.methods import native
from paretofuse.engine.methods.method import Group, Method, Parameter, base_of
from paretofuse.engine.methods.native import Thinned
from paretofuse.engine.methods.numbers import Floats, Numbers
from paretofuse.engine.methods.random import Key, key_of

Mask = npt.NDArray[np.bool_]

SMALL = 1e-7
"""Norms below this are not divided by."""


class DeltaMethod(Method):
    """Base class of the methods that work on differences."""

    base = "required"
    models = (0, None)
    elects: ClassVar[bool] = False
    """Whether only elements count whose sign is that of the weighted sum."""

    @staticmethod
    def common(*, normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
        """The parameters that all of them have. int8_mask is how mergekit saves memory; here no mask is stored."""
        return (
            Parameter("weight", float, each=True, required=True),
            Parameter("density", float, 1.0, each=True, low=0.0, high=1.0),
            Parameter("normalize", bool, normalize),
            Parameter("rescale", bool, rescale),
            Parameter("lambda", float, 1.0),
            Parameter("int8_mask", bool, False),
        )

    def keep(self, delta: Floats, options: Mapping[str, Any], key: Key) -> Mask | None:
        """Which elements of a difference stay; None for all."""
        return None

    def thin(self, delta: Floats, options: Mapping[str, Any], rescale: bool, key: Key) -> Floats:
        """A difference with the elements that stay, with the same sum of magnitudes as before where rescaled."""
        kept = self.keep(delta, options, key)
        if kept is None:
            return delta
        thinned: Floats = np.where(kept, delta, 0)
        if rescale:
            thinned *= rescaled(*(float(np.abs(x).sum(dtype=np.float64)) for x in (delta, thinned)))
        return thinned

    def select(
        self, model: Numbers, base: Numbers, options: Mapping[str, Any], key: Key, threads: int | None
    ) -> Thinned:
        """What `keep` keeps of model - base, as bits and sums; methods of ours compute it in C++."""
        delta = model.floats() - base.floats()
        kept = self.keep(delta, options, key)
        if kept is None:
            return native.ALL
        sums = (float(np.abs(x).sum(dtype=np.float64)) for x in (delta, delta[kept]))
        return Thinned(np.packbits(kept.reshape(-1), bitorder="little"), *sums)

    def merge(self, group: Group, out: Numbers) -> None:
        """The same as the reference, in C++ where the dtypes allow."""
        base = base_of(group)
        if not native.can((base, *group.models, out)):
            super().merge(group, out)
            return
        thinned = [
            self.select(model, base, own, key_of(group.seed, group.name, number), group.threads)
            for number, (model, own) in enumerate(zip(group.models, group.each, strict=True))
        ]
        shared, weights = group.shared, group.values("weight")
        native.merge_differences(
            base,
            group.models,
            [own.mask for own in thinned],
            [rescaled(own.before, own.after) if shared["rescale"] else 1.0 for own in thinned],
            weights,
            out,
            elects=self.elects,
            normalizes=shared["normalize"],
            scale=shared["lambda"],
            threads=group.threads,
        )

    def reference(self, group: Group) -> Floats:
        """The formula at the head of this file."""
        base = base_of(group).floats()
        if not group.models:
            return base
        shared = group.shared
        deltas = [
            self.thin(model.floats() - base, own, shared["rescale"], key_of(group.seed, group.name, number))
            for number, (model, own) in enumerate(zip(group.models, group.each, strict=True))
        ]
        weights = np.asarray(group.values("weight"), base.dtype)
        total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
        divisor: Any = weights.sum()
        if self.elects:
            agrees = agreement([weight * delta for weight, delta in zip(weights, deltas, strict=True)])
            total = sum(w * np.where(m, d, 0) for w, d, m in zip(weights, deltas, agrees, strict=True))
            divisor = sum(weight * mask for weight, mask in zip(weights, agrees, strict=True))
            divisor = np.where(divisor == 0, 1, divisor)
        elif abs(divisor) < 1e-8:
            divisor = 1.0
        if shared["normalize"]:
            total = total / divisor
        merged: Floats = base + np.asarray(shared["lambda"], base.dtype) * total
        return merged


def rescaled(before: float, after: float) -> float:
    """What gives a thinned difference its sum of magnitudes back; 1 where there is nothing to divide by."""
    return before / after if before >= SMALL and after >= SMALL else 1.0


def agreement(weighted: Sequence[Floats]) -> list[Mask]:
    """Of each weighted difference, the elements whose sign is that of the sum of all, which counts as positive at 0."""
    positive = sum(weighted) >= 0
    return [np.where(positive, delta > 0, delta < 0) for delta in weighted]


def largest(magnitudes: Floats, first: int, count: int) -> Mask:
    """`count` elements in the order of their magnitudes, the largest first, after leaving out the `first` ones.

    Equal magnitudes come in the order of their positions.
    """
    kept = np.zeros(magnitudes.size, bool)
    order = np.argsort(-magnitudes.reshape(-1), kind="stable")
    kept[order[first : first + count]] = True
    return kept.reshape(magnitudes.shape)
