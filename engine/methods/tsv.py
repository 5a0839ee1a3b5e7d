"""TSV-Merge: each difference's leading singular vectors, made orthogonal over all models (arXiv 2412.00081).

    d_k ~ U_k S_k V_k'      the leading rank / K singular values of d_k = model_k - base, K models
    U = [U_1 ... U_K], V alike;  U+ = P Q' of U = P D Q', the nearest matrix with orthonormal columns, V+ alike
    out = base + lambda * sum_k U+_k S_k V+_k'

A tensor of more than two axes counts as the matrix [first axis, all others]. Vectors take the mean of the differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paretofuse.engine.methods.method import Group, Method, Parameter, base_of
from paretofuse.engine.methods.numbers import Floats


class Tsv(Method):
    """The formula at the head of this file."""

    name = "tsv"
    base = "required"
    parameters = (Parameter("lambda", float, 1.0),)

    def reference(self, group: Group) -> Floats:
        """Base and the sum of all shares."""
        base = base_of(group).floats()
        shares = tsv_shares([model.floats() - base for model in group.models])
        merged: Floats = base + np.asarray(group.shared["lambda"], base.dtype) * sum(shares)
        return merged


def tsv_shares(differences: Sequence[Floats]) -> list[Floats]:
    """What each difference gives to the sum, of its shape and dtype: U+_k S_k V+_k'."""
    shape, count = differences[0].shape, len(differences)
    if len(shape) < 2 or 0 in shape:
        return [difference / difference.dtype.type(count) for difference in differences]
    left, values, right = [], [], []
    for difference in differences:
        u, s, v = np.linalg.svd(difference.reshape(shape[0], -1), full_matrices=False)
        kept = max(1, len(s) // count)
        left.append(u[:, :kept])  # [rows, kept]
        values.append(s[:kept])
        right.append(v[:kept])  # [kept, columns]
    lefts = np.split(_orthonormal(np.concatenate(left, axis=1)), count, axis=1)
    rights = np.split(_orthonormal(np.concatenate(right, axis=0)), count, axis=0)
    return [((u * s) @ v).reshape(shape) for u, s, v in zip(lefts, values, rights, strict=True)]


def _orthonormal(matrix: Floats) -> Floats:
    """P Q' of its singular value decomposition P D Q'."""
    p, _, q = np.linalg.svd(matrix, full_matrices=False)
    nearest: Floats = p @ q
    return nearest
