"""A switch as a CUDA graph: the host asks for all of it at once, whatever the model.

The graph fetches from fixed pinned memory what the host knows of a preference: the groups' routing weights, which it
computes in microseconds, or with row coefficients, which are many, the preference itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.modules.live import LiveModule
from paretofuse.engine.routing.preference import Preference, as_preference
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.routing.weights import pinned, received, to_send
from paretofuse.engine.stacking.stack import lasting


class CapturedSwitch:
    """What `Engine.capture` returns: `switch` is that of the engine, from a graph.

    It keeps the live module's memory for as long as it lives. Routers that are trained further since count; another
    family of them, trained planes that are added and `unload` need another capture, and say so.

    Args:
        live: the live module.
        routers: give the routing weights.
        device: of both.
        in_use: whether the live module still is the engine's.
        note: takes down the preference that the live module was merged for.
    """

    def __init__(
        self,
        live: LiveModule,
        routers: Routers,
        device: torch.device,
        in_use: Callable[[], bool],
        note: Callable[[np.ndarray], None],
    ) -> None:
        self._live, self._routers, self._device = live, routers, device
        self._in_use, self._note = in_use, note
        self._read = addresses(routers)
        # A graph knows addresses alone: while these are held their memory is freed only where one is resized.
        self._written = live.storages()
        self._addresses = [storage.data_ptr() for storage in self._written]
        count = len(routers.objectives)
        told = to_send(routers, np.full(count, 1 / count))
        with lasting(), torch.cuda.device(device):
            self._buffer = pinned(told.clone(), device)
            # What a graph cannot hold is done before: kernels are compiled and loaded, libraries begin to work.
            received(routers, self._buffer)
            live.merge_again(routers.width)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._weights = received(routers, self._buffer).unsqueeze(0)
                live.rewrite(self._weights)
        self._done = torch.cuda.Event()
        # A replay may still be about to fetch from the buffer when nobody needs this any more.
        weakref.finalize(self, _wait, self._done, self._buffer, self._graph)

    def switch(self, preference: Preference) -> None:
        """Rewrite the live module for a preference, to the bits of `Engine.switch`, on the device's current stream.

        The host waits only until the switch before this one is done. That nobody has moved the module is checked while
        the GPU merges already.

        Args:
            preference: by objective name, or in the order of `objectives`.

        Raises:
            ValueError: the preference is not valid, the engine has let go of this live module, or its routers are
                others: nothing has been written. Or somebody has moved the module, which may be rewritten in part.
        """
        numbers = as_preference(preference, self._routers.objectives)
        self._check()
        told = to_send(self._routers, numbers)
        self._done.synchronize()
        self._buffer.copy_(told)
        self._graph.replay()
        self._done.record(torch.cuda.current_stream(self._device))
        # The buffer is rewritten by the next switch; what the graph computes of it lies where it is computed again.
        self._live.rewritten(told.unsqueeze(0) if self._routers.rows is None else self._weights)
        self._live.disarm()
        self._live.check()
        self._note(numbers)

    def _check(self) -> None:
        """Raise ValueError where the graph would not do what a switch does."""
        if not self._in_use():
            raise ValueError(
                "got a captured switch of a live module that the engine has let go of (unload, add_planes), expected "
                "that of the present one; call engine.capture() again"
            )
        if addresses(self._routers) != self._read:
            raise ValueError(
                "got routers of another family, or in other memory, than those that were captured; call "
                "engine.capture() again"
            )
        if [storage.data_ptr() for storage in self._written] != self._addresses:
            self._live.check()


def one_gpu(backends: Mapping[torch.device, str], remedy: str = "use engine.switch here") -> torch.device:
    """The device, where one GPU's kernels merge the whole model.

    Raises:
        ValueError: they do not; with the remedy.
    """
    if len(backends) == 1 and all(d.type == "cuda" and b == "triton" for d, b in backends.items()):
        return next(iter(backends))
    got = " and ".join(f"backend={backend!r} on {device}" for device, backend in backends.items())
    raise ValueError(
        f"got a model that is merged by {got}, expected backend='triton' on one GPU, whose work a CUDA graph can hold; "
        f"{remedy}"
    )


def addresses(routers: Routers) -> list[int]:
    """The addresses by which a graph reads routers: those with row coefficients, as others stay on the host."""
    if routers.rows is None:
        return []
    return [tensor.data_ptr() for tensor in (*routers.parameters(), *routers.buffers())]


def _wait(done: torch.cuda.Event, *_: Tensor | torch.cuda.CUDAGraph) -> None:
    """Wait for the last replay, which uses the others."""
    done.synchronize()
