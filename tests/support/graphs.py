"""CUDA graphs where no GPU is: what is captured runs at each replay anew, from and to the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paretofuse.kernels.launch import Launch


class Operators(TorchDispatchMode):
    """The operators of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class LateDevice:
    """Stands for a GPU that does what it was asked for as late as it may: when somebody waits for an event.

    Attributes:
        asked: what it has yet to do, in order.
        replayed: the graphs that it was asked to replay.
    """

    def __init__(self) -> None:
        self.asked: list[Callable[[], object]] = []
        self.replayed: list[LateGraph] = []

    def catch_up(self) -> None:
        """Do all of it."""
        while self.asked:
            self.asked.pop(0)()

    def graph(self) -> LateGraph:
        """In the place of `torch.cuda.CUDAGraph`."""
        return LateGraph(self)

    def event(self) -> LateEvent:
        """In the place of `torch.cuda.Event`."""
        return LateEvent(self)


class LateEvent:
    """All that the device was asked for before the event was recorded is done when `synchronize` returns."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._recorded = False

    def record(self, stream: object) -> None:
        """Behind what was asked for."""
        self._recorded = True

    def synchronize(self) -> None:
        """Wait, if there is something to wait for."""
        if self._recorded:
            self._device.catch_up()


class LateGraph(TorchDispatchMode):
    """Torch's operators and Triton's launches in the order in which they were captured; as then, nothing is written."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self._device = device
        self._steps: list[Callable[[], object]] = []

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """In the place of `torch.cuda.graph`."""
        run = Launch.run

        def record(launch: Launch) -> None:
            self._steps.append(partial(run, launch))

        with mock.patch.object(Launch, "run", record), self:
            yield

    def replay(self) -> None:
        """Ask the device for all of it."""
        self._device.replayed.append(self)
        self._device.asked.append(self._run)

    @torch.no_grad()
    def _run(self) -> None:
        for step in self._steps:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_to_wait(func, args)
        if func.overloadpacket is torch.ops.aten.set_:  # says where a tensor lies: nothing that a device does
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._steps.append(partial(func, *args, **kwargs))
            return kwargs.get("out", args[0]) if func._schema.returns else None
        out = func(*args, **kwargs)  # its numbers mean nothing: those that it is made of were not written
        self._steps.append(partial(_again, func, args, kwargs, out))
        return out


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Run an operator into the memory that its result had."""
    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor) and new.numel() > 0 and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _refuse_to_wait(func: Any, args: Any) -> None:
    """As CUDA does while a stream is captured: what gives values to the host would have to wait for them."""
    masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
    waits = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    if waits and (masks or func is not torch.ops.aten.index.Tensor):
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
