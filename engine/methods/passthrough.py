"""Passthrough: one model's tensor as it is, or scaled; with slices, layers of several models one after the other."""

from __future__ import annotations

import numpy as np

from paretofuse.engine.methods.method import Group, Method, Parameter
from paretofuse.engine.methods.numbers import Floats


class Passthrough(Method):
    """out = scale x."""

    name = "passthrough"
    models = (1, 1)
    parameters = (Parameter("scale", float, each=True),)

    def reference(self, group: Group) -> Floats:
        """The tensor, scaled where a scale was given."""
        values, scale = group.models[0].floats(), group.values("scale")[0]
        return values if scale is None else values * np.asarray(scale, values.dtype)
