"""Sketches: low-rank planes that stand in for others in the gradient of the routing weights, and nowhere else.

    <dLoss/dW, D>  is about  <dLoss/dW, B A> = sum over tokens of (g B) . (x A^T)

B A is the nearest plane of a rank, g the gradient of a layer's output and x its input, so that dLoss/dW = g^T x, as
large as the weight, is never made. Merges have the planes themselves.
"""

from __future__ import annotations

import torch

from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane

OVERSAMPLING = 8
"""Directions that are followed besides those that are kept."""

ITERATIONS = 2
"""Products with D D^T that turn random directions towards the largest ones."""


def sketch(plane: Plane | None, rank: int) -> LowRank | None:
    """The nearest plane of a rank to that of a matrix, float32; one of low rank, trained or not, is its own sketch.

    By randomized subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), always from the same directions;
    where that is no smaller by a whole SVD, so that full rank is exact up to rounding.
    """
    if plane is None or isinstance(plane, LowRank):
        return plane
    delta = plane.decode()  # [rows, columns]
    rows, columns = delta.shape
    if rank + OVERSAMPLING >= min(rows, columns):
        return LowRank.encode(delta, rank)
    directions = torch.randn(columns, rank + OVERSAMPLING, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(delta @ directions.to(delta.device)).Q  # [rows, rank + 8]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    small = LowRank.encode(basis.T @ delta, rank)
    return LowRank((basis @ small.b).contiguous(), small.a, plane.shape)
