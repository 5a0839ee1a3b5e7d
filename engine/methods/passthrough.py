"""Passthrough: one model's tensor as it is, or scaled; with slices, layers of several models one after the other."""

from __future__ import annotations

import numpy as np

from paretofuse.engine.methods import native
from paretofuse.engine.methods.method import Group, Method, Parameter
from paretofuse.engine.methods.numbers import Floats, Numbers


class Passthrough(Method):
    """out = scale x."""

    name = "passthrough"
    models = (1, 1)
    parameters = (Parameter("scale", float, each=True),)

    def reference(self, group: Group) -> Floats:
        """The tensor, scaled where a scale was given."""
        values, scale = group.models[0].floats(), group.values("scale")[0]
        return values if scale is None else values * np.asarray(scale, values.dtype)

    def merge(self, group: Group, out: Numbers) -> None:
        """The same in C++ where the dtypes allow."""
        model, scale = group.models[0], group.values("scale")[0]
        if scale is None and model.dtype == out.dtype:
            out.data[:] = model.data
        elif native.can((model, out)):
            native.combine(group.models, np.array([1.0 if scale is None else scale]), out, group.threads)
        else:
            super().merge(group, out)
