"""A stack: base and planes in memory, or mapped from a store."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import Layout
from paretofuse.engine.planes.plane import Plane, to
from paretofuse.engine.stacking.deltas import base_blocks, gather, head_blocks, head_infos, plane_of
from paretofuse.engine.stacking.plan import Plan


@contextmanager
def lasting() -> Iterator[None]:
    """Around making tensors that outlive the call, also as a decorator: without a graph, and as ordinary tensors.

    What is made inside the caller's `torch.inference_mode()` could never be trained or written to outside of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def on_cpu() -> Iterator[None]:
    """Around work that makes tensors without naming a device: on the CPU, whatever `torch.set_default_device` says."""
    if torch.empty(0).device.type == "cpu":  # a device's context makes every call of torch slower
        yield
        return
    with torch.device("cpu"):
        yield


@dataclass(frozen=True)
class Stack:
    """Base and planes in memory (or mapped from a store).

    Attributes:
        layout: the tensor table.
        base: every stored tensor by name.
        planes: for each expert, its planes by name; an absent one means that the expert leaves the tensor unchanged.
        heads: for each objective, its own tensors by name.
        release: lets the system drop the pages of base and planes of the named tensors where they are mapped from
            files, which are read again when touched; does nothing elsewhere.
        check: raises StoreError if a file that base or deltas are mapped from was rewritten in place or truncated; does
            nothing elsewhere.
        device: where `settled` puts all that does not lie there yet; None where everything stays.
    """

    layout: Layout
    base: dict[str, Tensor]
    planes: tuple[dict[str, Plane], ...]
    heads: dict[str, dict[str, Tensor]]
    release: Callable[[Iterable[str]], None] = field(default=lambda names: None)
    check: Callable[[], None] = field(default=lambda: None)
    device: torch.device | None = None

    def head(self, objective: str | None) -> dict[str, Tensor]:
        """An objective's own tensors by name; none for None.

        Raises:
            ValueError: the objective has no head.
        """
        if objective is None:
            return {}
        if objective not in self.heads:
            known = list(self.heads) or "none; declare them when stacking, heads=[...]"
            raise ValueError(f"got head={objective!r}, expected an objective that has a head: {known}")
        return self.heads[objective]


@lasting()
def settled(stack: Stack) -> Stack:
    """A stack on its device, tensor by tensor, so that never more than one is held twice; itself where it has none."""
    device = stack.device
    if device is None:
        return stack
    base, planes = dict(stack.base), [dict(own) for own in stack.planes]
    for name, tensor in base.items():
        base[name] = tensor.to(device)
        for own in planes:
            if name in own:
                own[name] = to(own[name], device)
        stack.release([name])
    heads = {o: {name: tensor.to(device) for name, tensor in own.items()} for o, own in stack.heads.items()}
    return Stack(stack.layout, base, tuple(planes), heads)


def build(plan: Plan, device: torch.device | None) -> Stack:
    """Read everything into memory: on one device, or (None) each tensor where the base's lies, else on the CPU."""

    def place(name: str) -> torch.device:
        return device or plan.base.devices.get(name, torch.device("cpu"))

    base = {
        spec.name: gather(base_blocks(plan, spec), spec.shape, TO_TORCH[spec.dtype], place(spec.name))
        for spec in plan.layout.tensors
    }
    planes = []
    for expert in plan.experts.values():
        own: dict[str, Plane] = {}
        for spec in plan.layout.with_role("routed", "static"):
            held = partial(base.__getitem__, spec.name)
            plane = plane_of(plan, expert, spec, held, held().device)
            if plane is not None:
                own[spec.name] = plane
        planes.append(own)
    heads = {
        objective: {
            name: gather(head_blocks(plan, objective, name), info.shape, info.dtype, place(name))
            for name, info in head_infos(plan, objective).items()
        }
        for objective, names in plan.heads.items()
        if names
    }
    _give_back()
    return Stack(plan.layout, base, tuple(planes), heads)


def _give_back() -> None:
    """Hand the memory of temporary tensors back to the system; glibc would keep what lies between lasting ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
