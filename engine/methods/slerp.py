"""SLERP: between two models along the arc from one to the other, each tensor as one vector."""

from __future__ import annotations

import math

import numpy as np

from paretofuse.engine.methods import native
from paretofuse.engine.methods.method import Group, Method, Parameter, base_of
from paretofuse.engine.methods.numbers import Floats, Numbers

ALMOST_PARALLEL = 0.9995
"""Above this cosine the arc is taken for the straight line."""


class Slerp(Method):
    """out = sin((1 - t) a) / sin(a) x_base + sin(t a) / sin(a) x_other, a the angle between the two."""

    name = "slerp"
    base = "required"
    models = (1, 1)
    parameters = (Parameter("t", float, required=True),)

    def reference(self, group: Group) -> Floats:
        """The formula above; the straight line where the two are almost parallel."""
        a, b = base_of(group).floats(), group.models[0].floats()
        squares = [float(np.vdot(x.astype(np.float64), x.astype(np.float64))) for x in (a, b)]
        dot = float(np.vdot(a.astype(np.float64), b.astype(np.float64)))
        from_base, from_other = slerp_coefficients(group.shared["t"], squares[0], squares[1], dot)
        merged: Floats = from_base * a + from_other * b
        return merged

    def merge(self, group: Group, out: Numbers) -> None:
        """The same in C++ where the dtypes allow."""
        pair = (base_of(group), group.models[0])
        if not native.can((*pair, out)):
            super().merge(group, out)
            return
        ((square_a, dot), (_, square_b)) = native.products(None, pair, out.numel, group.threads)[0]
        coefficients = slerp_coefficients(group.shared["t"], square_a, square_b, dot)
        native.combine(pair, np.array(coefficients), out, group.threads)


def slerp_coefficients(t: float, square_a: float, square_b: float, dot: float) -> tuple[float, float]:
    """What each of two vectors counts, by their squared norms and their inner product."""
    norms = [norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(square_a), math.sqrt(square_b))]
    cosine = min(1.0, max(-1.0, dot / (norms[0] * norms[1])))
    if abs(cosine) > ALMOST_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
