"""The shape that every solver has, and what the weighting ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class Solver(Protocol):
    """Turns M losses and their gradients into one direction. Any callable of this shape is a solver."""

    def __call__(self, losses: Tensor, jacobian: Tensor, preference: Tensor) -> Tensor:
        """The direction whose negative the routing weights should follow.

        Args:
            losses: [M] float64, finite.
            jacobian: [M, G, P], dLoss_m / dL for the routing weights L.
            preference: [M], >= 0, not all zero: how much each objective matters.

        Returns:
            [G, P], in the jacobian's dtype and on its device; what an optimizer takes for a gradient.
        """


@runtime_checkable
class JointSolver(Protocol):
    """A solver that needs several preferences at a time, because what is best for one depends on the others."""

    def directions(self, losses: Tensor, jacobians: Tensor, preferences: Tensor) -> Tensor:
        """As Solver, for K preferences: losses [K, M], jacobians [K, M, G, P], preferences [K, M] -> [K, G, P]."""


class WeightedSolver(ABC):
    """A solver whose direction is a weighted sum of the gradients: subclasses choose the M weights, in numpy."""

    @abstractmethod
    def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        """The weights alpha of the M gradients.

        Args:
            losses: [M] float64.
            gram: [M, M] float64, inner products of the gradients.
            preference: [M] float64, >= 0, not all zero.

        Returns:
            [M] float64.
        """

    def __call__(self, losses: Tensor, jacobian: Tensor, preference: Tensor) -> Tensor:
        """The direction alpha @ jacobian, [G, P]; see Solver.

        Raises:
            ValueError: shapes do not fit together, or a number is not finite.
        """
        check_inputs(losses, jacobian, preference)
        rows = as_numpy(jacobian).reshape(len(jacobian), -1)
        alpha = self.weights(as_numpy(losses), rows @ rows.T, as_numpy(preference))
        return _like((alpha @ rows).reshape(jacobian.shape[1:]), jacobian)


def solve_each(
    solver: Solver | JointSolver, losses: Tensor, jacobians: Tensor, preferences: Tensor
) -> Tensor:
    """Directions for K preferences from a solver of either kind.

    Args:
        solver: the solver.
        losses: [K, M].
        jacobians: [K, M, G, P].
        preferences: [K, M].

    Returns:
        [K, G, P].
    """
    if isinstance(solver, JointSolver):
        return solver.directions(losses, jacobians, preferences)
    return torch.stack([solver(*each) for each in zip(losses, jacobians, preferences, strict=True)])


def check_inputs(losses: Tensor, jacobian: Tensor, preference: Tensor) -> None:
    """Check what a solver is given.

    Raises:
        ValueError: shapes do not fit together, a number is not finite, or the preference is negative or zero.
    """
    count = jacobian.shape[0] if jacobian.ndim == 3 else 0
    if count == 0 or losses.shape != (count,) or preference.shape != (count,):
        raise ValueError(
            f"got losses {tuple(losses.shape)}, jacobian {tuple(jacobian.shape)} and preference "
            f"{tuple(preference.shape)}, expected [M], [M, G, P] and [M] with M >= 1"
        )
    for what, numbers in (("loss", losses), ("gradient", jacobian)):
        if not bool(torch.isfinite(numbers).all()):
            rows = torch.isfinite(numbers).reshape(count, -1).all(dim=1)
            raise ValueError(
                f"got a {what} of objective {int((~rows).nonzero()[0])} that is not finite, expected finite numbers; "
                "lower the learning rate, or check that objective's data and loss"
            )
    if not bool((preference >= 0).all()) or not bool(preference.sum() > 0):
        raise ValueError(f"got preference {preference.tolist()}, expected numbers >= 0 that sum to 1")


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as float64 numpy on the CPU; solvers are too small for anything else."""
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())


def _like(direction: np.ndarray, jacobian: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(direction)).to(jacobian.device, jacobian.dtype)
