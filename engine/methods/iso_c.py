"""Iso-C: the sum of all differences with its singular values made equal (arXiv 2502.04959).

    sum_k d_k = U S V'      d_k = model_k - base
    out = base + lambda * mean(S) U V'

A tensor of more than two axes counts as the matrix [first axis, all others]. Vectors take the mean of the differences.
"""

from __future__ import annotations

import numpy as np

from paretofuse.engine.methods.method import Group, Method, Parameter, base_of
from paretofuse.engine.methods.numbers import Floats


class IsoC(Method):
    """The formula at the head of this file."""

    name = "iso_c"
    base = "required"
    parameters = (Parameter("lambda", float, 1.0),)

    def reference(self, group: Group) -> Floats:
        """See the head."""
        base = base_of(group).floats()
        total: Floats = np.sum([model.floats() - base for model in group.models], axis=0, dtype=base.dtype)
        if base.ndim < 2 or base.size == 0:
            total = total / base.dtype.type(len(group.models))
        else:
            u, s, v = np.linalg.svd(total.reshape(base.shape[0], -1), full_matrices=False)
            total = (s.mean() * (u @ v)).reshape(base.shape)
        merged: Floats = base + np.asarray(group.shared["lambda"], base.dtype) * total
        return merged
