"""Trained planes: for each objective one low-rank plane B A of every routed matrix, learned together with the routers.

    dLoss/dB = c G A^T + G (A k)^T      dLoss/dA = (c B)^T G + (B^T G) k      G = dLoss/dW

c is the plane's coefficient (of each row), k what each column has besides, if columns have coefficients.
A is small and random and B zero, so that nothing changes before it is trained. After Pareto Merging (arXiv 2408.12105)
and PaLoRA (arXiv 2407.08056), whose coefficients are the preference itself; ours are the routers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paretofuse.engine.layout import TensorSpec, columns_of, rows_of
from paretofuse.engine.planes.lowrank import LowRank, by_side
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.routing.routers import Routers


class TrainedPlanes(nn.Module):
    """The factors as parameters, and planes that read their memory.

    Args:
        count: how many planes, one for each objective.
        specs: the routed tensors; those of fewer than two rows or columns get none.
        places: each tensor's device.
        rank: of each plane; a matrix with fewer rows or columns takes as many.
        seed: of A; it does not touch torch's global random state.

    Attributes:
        rank: as given.
        factors: for each plane and tensor B [rows, rank] and A [rank, columns], float32.
        planes: for each plane, its planes by tensor name, over the same memory.
    """

    def __init__(
        self,
        count: int,
        specs: Sequence[TensorSpec],
        places: Mapping[str, torch.device],
        rank: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.factors = nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        self.planes: list[dict[str, Plane]] = []
        for _ in range(count):
            own: dict[str, Plane] = {}
            for spec in specs:
                rows, columns = rows_of(spec.shape), columns_of(spec.shape)
                if min(rows, columns) < 2:
                    continue
                size, place = min(rank, rows, columns), places[spec.name]
                draw = torch.randn(size, columns, generator=generator, dtype=torch.float32) / math.sqrt(
                    columns
                )
                b, a = nn.Parameter(torch.zeros(rows, size, device=place)), nn.Parameter(draw.to(place))
                self.factors += [b, a]
                own[spec.name] = LowRank(_leaf(b), _leaf(a), spec.shape)  # which tell that they are trained
            self.planes.append(own)

    @property
    def size(self) -> int:
        """How many numbers all factors have."""
        return sum(factor.numel() for factor in self.factors)

    @torch.no_grad()
    def take_gradient(self, gradient: Tensor, *, add: bool) -> None:
        """Give each factor its part of a gradient [size], in the order of `factors`."""
        parts = gradient.split([factor.numel() for factor in self.factors])
        for factor, part in zip(self.factors, parts, strict=True):
            own = part.view(factor.shape).to(device=factor.device, dtype=factor.dtype)
            factor.grad = factor.grad + own if add and factor.grad is not None else own.clone()

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        """Take a share of every plane away."""
        for b in list(self.factors)[::2]:
            b.mul_(1 - share)

    @torch.no_grad()
    def turn_apart(self, share: float) -> None:
        """Turn the planes of each tensor apart: a step down the squares of all <row of A_i, row of A_j>, i not j.

        A_i -= share * sum over j != i of C_ij A_j      C_ij = A_i A_j^T, over the norm of all C where that exceeds 1

        Planes whose A are orthogonal look at different directions of a layer's input (LORPMAN, arXiv 2407.20734).
        """
        count, tensors, right = len(self.planes), len(self.planes[0]), list(self.factors)[1::2]
        for tensor in range(tensors):
            own = right[tensor::tensors]  # of every plane
            size = len(own[0])
            rows = torch.cat([a.detach() for a in own])  # [planes rank, columns]
            plane = torch.arange(count, device=rows.device).repeat_interleave(size)
            products = (rows @ rows.T) * (plane[:, None] != plane)
            step = share * products @ rows / products.norm().clamp(min=1.0)
            for a, part in zip(own, step.split(size), strict=True):
                a.sub_(part)


def _leaf(factor: Tensor) -> Tensor:
    return factor.detach().requires_grad_()


def with_own_leaves(plane: Plane) -> Plane:
    """A trained plane whose factors are leaves of their own over the same memory; any other as it is.

    Gradients of passes through one module then never mix with another's, nor with those that the parameters hold.
    """
    if (found := trained_factors(plane)) is None:
        return plane
    b, a = found
    return LowRank(_leaf(b), _leaf(a), plane.shape)


def trained_planes(routers: Routers) -> TrainedPlanes | None:
    """The trained planes that are kept with the routers, if there are some."""
    return routers.planes if isinstance(routers.planes, TrainedPlanes) else None


def trained_factors(plane: Plane | None) -> tuple[Tensor, Tensor] | None:
    """B and A of a plane that is trained; None of any other."""
    if isinstance(plane, LowRank) and plane.b.requires_grad:
        return plane.b, plane.a
    return None


def factor_gradients(b: Tensor, a: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dLoss/dB and dLoss/dA, float32 of their shapes.

    Args:
        b, a: the factors.
        gradient: dLoss/dW, of the tensor's shape.
        weight: the plane's coefficient [], [rows] or [rows + columns].
    """
    rows = gradient.reshape(len(b), -1).float()
    c, k = by_side(weight.to(b.device), len(b))
    db, da = c * (rows @ a.T), (c * b).T @ rows
    if k is not None:
        db, da = db + rows @ (a * k).T, da + (b.T @ rows) * k
    return db, da


def factor_gradients_of_tokens(
    b: Tensor, a: Tensor, left: Tensor, right: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from left [tokens, rows] and right [tokens, columns] with dLoss/dW = left^T right, which is not made."""
    c, k = by_side(weight.to(b.device), len(b))
    db, da = c * (left.T @ (right @ a.T)), (left @ (c * b)).T @ right
    if k is not None:
        db, da = db + left.T @ (right @ (a * k).T), da + ((left @ b).T @ right) * k
    return db, da
