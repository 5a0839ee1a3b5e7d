"""Model Stock: between the base and the models' mean, as far as the angles between the differences say (2403.19522)."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from paretofuse.engine.methods import native
from paretofuse.engine.methods.method import Group, Method, Parameter, base_of
from paretofuse.engine.methods.numbers import Floats, Numbers


class ModelStock(Method):
    """out = t mean_k x_k + (1 - t) base, t = K c / (1 + (K - 1) c), c the mean cosine between two differences.

    One t for each tensor; with `filter_wise: true` one for each row (the last axis).
    """

    name = "model_stock"
    base = "required"
    models = (2, None)
    parameters = (Parameter("filter_wise", bool, False),)

    def reference(self, group: Group) -> Floats:
        """The formula above."""
        base = base_of(group).floats()
        models = [model.floats() for model in group.models]
        deltas = [model - base for model in models]
        axes = (base.ndim - 1,) if group.shared["filter_wise"] and base.ndim else tuple(range(base.ndim))

        def dots(a: Floats, b: Floats) -> np.ndarray:
            return np.asarray(np.sum(a * b, axis=axes, keepdims=True, dtype=np.float64))

        norms = [np.sqrt(dots(delta, delta)) for delta in deltas]
        pairs = combinations(range(len(deltas)), 2)
        share = stock_share(
            [dots(deltas[i], deltas[j]) / np.maximum(norms[i] * norms[j], 1e-6) for i, j in pairs],
            len(models),
        ).astype(base.dtype)
        mean = sum(models) / len(models)
        merged: Floats = share * mean + (1 - share) * base
        return merged

    def merge(self, group: Group, out: Numbers) -> None:
        """The same in C++ where the dtypes allow."""
        base, count = base_of(group), len(group.models)
        if not native.can((base, *group.models, out)):
            super().merge(group, out)
            return
        columns = out.shape[-1] if group.shared["filter_wise"] and out.shape else out.numel
        dots = native.products(base, group.models, columns, group.threads)  # [rows, K, K]
        norms = np.sqrt(np.diagonal(dots, axis1=1, axis2=2))
        cosines = [
            dots[:, i, j] / np.maximum(norms[:, i] * norms[:, j], 1e-6)
            for i, j in combinations(range(count), 2)
        ]
        share = stock_share(cosines, count)
        own = np.stack([1 - share, *[share / count] * count], 1)
        native.combine((base, *group.models), own, out, group.threads)


def stock_share(cosines: list[np.ndarray], count: int) -> np.ndarray:
    """t by the cosines of all pairs; 0 where the formula has no finite value."""
    cosine = np.mean([np.clip(c, -1.0, 1.0) for c in cosines], axis=0)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    share: np.ndarray = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
    return share
