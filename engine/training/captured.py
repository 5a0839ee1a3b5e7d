"""What a router step asks of a GPU as one CUDA graph: the merge, each objective's forward and backward pass, and the
gradients' reduction. The host copies a preference and batches to where the graph reads them, asks once, and reads the
losses and the Jacobian back; the solver and the routers' small step stay with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.objective import Objective
from paretofuse.engine.modules.captured import addresses, one_gpu
from paretofuse.engine.modules.heads import with_head
from paretofuse.engine.planes.trained import trained_planes
from paretofuse.engine.routing.weights import pinned, received, to_send
from paretofuse.engine.stacking.stack import lasting

REMEDY = "leave out capture="

HELD = (Tensor, type(None), bool, int, float, str)
"""What batches may hold. A graph knows all but tensors by the first batch."""


class FixedBatch:
    """A batch in memory that stays its own: nested lists, tuples and dicts of tensors and of constants.

    Args:
        batch: the first one; all that follow are of its structure, shapes, dtypes and constants.
        name: the objective's, for messages.
        device: where it shall lie.

    Raises:
        TypeError: it holds something else.
    """

    def __init__(self, batch: Any, name: str, device: torch.device) -> None:
        leaves, self._structure = tree_flatten(batch)
        self._name = name
        strange = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, HELD)}
        if strange:
            raise TypeError(
                f"got a batch of objective {name!r} with {', '.join(sorted(strange))}, expected tensors, numbers and "
                f"strings in lists, tuples and dicts for a captured step; convert it where it is loaded, or {REMEDY}"
            )
        self._leaves = [
            leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]

    def batch(self) -> Any:
        """It, in containers that are the caller's."""
        return tree_unflatten(self._leaves, self._structure)

    def fill(self, batch: Any) -> None:
        """Copy the next one there.

        Raises:
            ValueError: it is of other shapes, dtypes, constants or another structure.
        """
        leaves, structure = tree_flatten(batch)
        now, then = _form(leaves), _form(self._leaves)
        if (now, structure) != (then, self._structure):
            raise ValueError(
                f"got a batch of objective {self._name!r} of {tree_unflatten(now, structure)}, expected "
                f"{tree_unflatten(then, self._structure)} as in the captured step; pad, and let data loaders "
                f"drop_last=True, so that all are alike, or {REMEDY}"
            )
        for own, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(leaf, non_blocking=True)


class CapturedMeasure:
    """Losses and Jacobian at a preference, on batches of fixed shapes, by one replay.

    Something must have been measured in the ordinary way before: kernels are compiled and libraries begin to work, and
    losses are known to be scalars that depend on the module.

    Args:
        engine: the engine, whose live module is trained.
        objectives: whose losses are measured.
        batches: one of each, as those that follow.
        count: by how many each result is divided.

    Raises:
        ValueError: the model is not merged by the kernels of one GPU, or a loss does what no graph holds.
        TypeError: a batch holds something that no graph reads.
    """

    def __init__(
        self, engine: Engine, objectives: Sequence[Objective], batches: Sequence[Any], count: int
    ) -> None:
        device = one_gpu(engine._bound.backends, REMEDY)
        self._engine, self._routers, self._device = engine, engine.routers, device
        self._modules = engine._in_place
        self._live = self._modules.live()
        self._read = addresses(self._routers)
        self._batches = [
            FixedBatch(batch, objective.name, device)
            for batch, objective in zip(batches, objectives, strict=True)
        ]
        members = len(self._routers.objectives)
        with lasting(), torch.cuda.device(device):
            self._buffer = pinned(to_send(self._routers, np.full(members, 1 / members)).clone(), device)
            self._done = torch.cuda.Event()
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._weights, self._rows = self._work(objectives, count)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(
                    f"a step could not be captured: {error}. Let losses wait for nothing (.item(), masks that choose "
                    f"entries, copies to the CPU, printing), or {REMEDY}"
                ) from error

    def _work(self, objectives: Sequence[Objective], count: int) -> tuple[Tensor, Tensor]:
        """What the graph holds: routing weights, and [M, 1 + D] of `measure`."""
        weights = received(self._routers, self._buffer).to(self._device, non_blocking=True)
        self._live.rewrite(weights.unsqueeze(0))
        self._live.rewritten(weights.unsqueeze(0))
        self._live.collector.arm(weights, trained_planes(self._routers))
        rows = [
            self._row(objective, own.batch(), count)
            for objective, own in zip(objectives, self._batches, strict=True)
        ]
        return weights, torch.stack(rows)

    def measure(self, preference: np.ndarray, batches: Sequence[Any]) -> Tensor:
        """Each objective's loss and its gradient in the routing weights and trained planes, float64 [M, 1 + D], CPU.

        Args:
            preference: checked, [M].
            batches: one of each objective.

        Raises:
            ValueError: a batch is unlike those that were captured, somebody has moved the module, or the routers.
        """
        self._live.check()
        if self._engine._in_place is not self._modules or addresses(self._routers) != self._read:
            raise ValueError(
                "got another live module, or routers of another family or in other memory, than were captured; let "
                f"callbacks of a training leave both alone (unload, add_planes, set_family), or {REMEDY}"
            )
        for own, batch in zip(self._batches, batches, strict=True):
            own.fill(batch)
        self._buffer.copy_(to_send(self._routers, preference))  # its last replay is done
        self._graph.replay()
        self._done.record(torch.cuda.current_stream(self._device))
        self._live.rewritten(self._weights.unsqueeze(0))
        self._modules.note(preference)
        self._done.synchronize()
        return self._rows.to("cpu", copy=True)

    def _row(self, objective: Objective, batch: Any, count: int) -> Tensor:
        """[1 + D], float64, as the graph computes it."""
        with torch.enable_grad():
            loss = objective.loss(with_head(self._live.module, objective.name), batch) / count
        routing, factors = self._live.collector.jacobian([loss])
        return torch.cat([loss.detach().double().view(1), routing.flatten(), factors.flatten()])


def _form(leaves: Sequence[Any]) -> list[str]:
    """What a graph cannot bear another of."""
    return [
        f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in leaves
    ]
