"""Hypervolume maximization: several preferences together cover as much of the loss space as they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.solvers.common import as_numpy, check_inputs
from paretofuse.engine.solvers.cosmos import Align, check_alignment, cosine_gradient


@dataclass(frozen=True)
class HypervolumeMaximization:
    """Ascend the hypervolume of the losses of K preferences: alpha_k = -dHV/dl_k, scaled to sum 1.

    dHV/dl_km is minus the area of point k's own face toward objective m (Emmerich and Deutz, 2014). Dominated
    points have none, so they are sorted into fronts and each front is treated by itself (Deist et al., arXiv
    2102.04523). The volume does not say which preference goes where: the cosine of COSMOS does (Hoang et al., arXiv
    2212.01130). Points that do not beat the reference follow linear scalarization until they do.

    Attributes:
        reference: the loss of each objective that is worse than all that counts; 1.1 times the worst in the batch
            if None, which also makes objectives of different scale count alike.
        strength: the weight of the cosine, >= 0.
        align: the cosine's ray; see COSMOS.
    """

    reference: Sequence[float] | None = None
    strength: float = 1.0
    align: Align = "inverse"

    def __post_init__(self) -> None:
        check_alignment(self.strength, self.align)

    def weights(self, losses: np.ndarray, preferences: np.ndarray) -> np.ndarray:
        """The weights alpha [K, M] for losses [K, M] and preferences [K, M]."""
        worst = losses.max(axis=0)
        if self.reference is None:
            reference = worst + 0.1 * np.abs(worst) + 1e-12
        else:
            reference = np.asarray(self.reference, dtype=np.float64)
            if reference.shape != worst.shape or not np.isfinite(reference).all():
                raise ValueError(f"got reference={self.reference}, expected {len(worst)} finite losses")
        faces = hypervolume_faces(losses, reference)
        total = faces.sum(axis=1, keepdims=True)
        alpha = np.where(total > 0, faces / np.where(total > 0, total, 1.0), preferences)
        pulls = [cosine_gradient(row, r, self.align) for row, r in zip(losses, preferences, strict=True)]
        return np.asarray(alpha - self.strength * np.array(pulls))

    def directions(self, losses: Tensor, jacobians: Tensor, preferences: Tensor) -> Tensor:
        """Directions [K, G, P] for K preferences at once; see JointSolver.

        Raises:
            ValueError: shapes do not fit together, or a number is not finite.
        """
        for each in zip(losses, jacobians, preferences, strict=True):
            check_inputs(*each)
        alpha = torch.from_numpy(self.weights(as_numpy(losses), as_numpy(preferences)))
        mixed = torch.einsum("km,kmge->kge", alpha, jacobians.detach().to("cpu", torch.float64))
        return mixed.to(jacobians.device, jacobians.dtype)

    def __call__(self, losses: Tensor, jacobian: Tensor, preference: Tensor) -> Tensor:
        """The direction [G, P] for one preference alone; see Solver. Better given several at a time."""
        return self.directions(losses[None], jacobian[None], preference[None])[0]


def hypervolume_faces(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """-dHV/dl [K, M] of the losses [K, M] to minimize, each front of a non-dominated sorting by itself.

    Equal points share one face, and each is given all of it; points that do not beat the reference have none.
    """
    faces = np.zeros_like(losses)
    inside = np.flatnonzero((losses < reference).all(axis=1))
    if len(inside) == 0:
        return faces
    # Twins would hide each other's faces entirely, and a flat start would stay flat: they count as one point.
    points, owner = np.unique(losses[inside], axis=0, return_inverse=True)
    own = np.zeros_like(points)
    rank = moocore.pareto_rank(points) if len(points) > 1 else np.zeros(1)
    for front in np.unique(rank):
        members = np.flatnonzero(rank == front)
        own[members] = _front_faces(points[members], reference)
    faces[inside] = own[owner.reshape(-1)]
    return faces


def _front_faces(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    count, objectives = points.shape
    if objectives == 1:
        return np.ones((count, 1))
    faces = np.empty_like(points)
    for m in range(objectives):
        flat, ref = np.delete(points, m, axis=1), np.delete(reference, m)
        for k in range(count):
            # What lies before point k along axis m hides a part of its face.
            before = points[:, m] <= points[k, m]
            before[k] = False
            whole = np.vstack([flat[before], flat[k : k + 1]])
            hidden = moocore.hypervolume(flat[before], ref=ref) if before.any() else 0.0
            faces[k, m] = max(0.0, moocore.hypervolume(whole, ref=ref) - hidden)
    return faces
