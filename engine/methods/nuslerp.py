"""NuSLERP: SLERP by weights, of the models or of their differences to a base; of whole tensors, rows or columns."""

from __future__ import annotations

import numpy as np

from paretofuse.engine.methods import native
from paretofuse.engine.methods.method import Group, Method, Parameter
from paretofuse.engine.methods.numbers import Floats, Numbers


class NuSlerp(Method):
    """The arc between two vectors at t = w_2 / (w_1 + w_2), .5 where the weights cancel.

    One vector for each tensor; with `nuslerp_flatten: false` one for each row (the last axis), and with
    `nuslerp_row_wise: true` besides one for each column (the first axis).
    """

    name = "nuslerp"
    base = "optional"
    models = (2, 2)
    parameters = (
        Parameter("weight", float, each=True, required=True),
        Parameter("nuslerp_row_wise", bool, False),
        Parameter("nuslerp_flatten", bool, True),
    )

    @staticmethod
    def share(group: Group) -> float:
        """How far to go from the first to the second."""
        first, second = group.values("weight")
        return 0.5 if abs(first + second) < 1e-6 else second / (first + second)

    def reference(self, group: Group) -> Floats:
        """Norms and inner products along the axis, then the formula of `slerp`."""
        t = self.share(group)
        a, b = (model.floats() for model in group.models)
        base = None if group.base is None else group.base.floats()
        if base is not None:
            a, b = a - base, b - base
        axis = vector_axes(a.ndim, group.shared["nuslerp_flatten"], group.shared["nuslerp_row_wise"])
        sums: list[np.ndarray] = [
            np.asarray(np.sum(x * y, axis=axis, keepdims=True, dtype=np.float64))
            for x, y in ((a, a), (b, b), (a, b))
        ]
        from_a, from_b = arc(t, *sums)
        merged: Floats = from_a.astype(a.dtype) * a + from_b.astype(a.dtype) * b
        return merged if base is None else base + merged

    def merge(self, group: Group, out: Numbers) -> None:
        """The same in C++ where the dtypes allow."""
        axes = vector_axes(len(out.shape), group.shared["nuslerp_flatten"], group.shared["nuslerp_row_wise"])
        inputs = group.models if group.base is None else (group.base, *group.models)
        if not native.can((*inputs, out)) or (axes == (0,) and len(out.shape) > 1):
            super().merge(group, out)
            return
        columns = out.numel if len(axes) == len(out.shape) else out.shape[-1]
        dots = native.products(group.base, group.models, columns, group.threads)
        from_a, from_b = arc(self.share(group), dots[:, 0, 0], dots[:, 1, 1], dots[:, 0, 1])
        own = [from_a, from_b] if group.base is None else [1 - from_a - from_b, from_a, from_b]
        native.combine(inputs, np.stack(own, 1), out, group.threads)


def vector_axes(dimensions: int, flatten: bool, row_wise: bool) -> tuple[int, ...]:
    """The axes that one vector lies along."""
    if flatten or dimensions < 2:
        return tuple(range(dimensions))
    return (0,) if row_wise else (dimensions - 1,)


def arc(
    t: float, square_a: np.ndarray, square_b: np.ndarray, dot: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each of two vectors counts, by squared norms and inner products in float64; a straight line if parallel."""
    norms = [np.maximum(np.sqrt(square), 1e-7) for square in (square_a, square_b)]
    cosine = np.clip(dot / (norms[0] * norms[1]), -1.0, 1.0)
    parallel = 1 - np.square(cosine) <= 1e-8**2
    angle = np.arccos(np.where(parallel, 0, cosine))
    sine = np.sin(angle)
    from_a = np.where(parallel, 1 - t, np.sin((1 - t) * angle) / sine)
    from_b = np.where(parallel, t, np.sin(t * angle) / sine)
    return from_a, from_b
