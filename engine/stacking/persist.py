"""Between engine and store: tensors to chunks of bytes and mapped files to tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_NAME, TO_TORCH
from paretofuse.engine.layout import ITEM_SIZE, Layout, TensorSpec
from paretofuse.engine.planes.choose import may_be_small
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.parts import parts_of, plane_from
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.routing.routers import Routers, routers_for
from paretofuse.engine.stacking.deltas import (
    base_blocks,
    delta_blocks,
    gather,
    head_blocks,
    head_infos,
    plane_of,
)
from paretofuse.engine.stacking.plan import Plan
from paretofuse.engine.stacking.sources import BLOCK, Blueprint, Source
from paretofuse.engine.stacking.stack import Stack
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.safetensors_file import TensorData, TensorView
from paretofuse.engine.store.writer import StoreWriter, plane_parts


@dataclass(frozen=True)
class Parts:
    """What a store holds, to be asked for one tensor at a time as flat blocks.

    Attributes:
        base: the blocks of a base tensor.
        planes: for each expert, a tensor's plane, or the blocks of a dense one, or None where there is none.
        heads: for each objective, (name, tensor dtype, shape, blocks).
    """

    base: Callable[[TensorSpec], Iterable[Tensor]]
    planes: list[Callable[[TensorSpec], Plane | Iterable[Tensor] | None]]
    heads: Mapping[str, Sequence[tuple[str, torch.dtype, tuple[int, ...], Iterable[Tensor]]]]


def in_memory(stack: Stack) -> Parts:
    """The parts of a stack."""

    def of(planes: Mapping[str, Plane]) -> Callable[[TensorSpec], Plane | None]:
        return lambda spec: planes.get(spec.name)

    heads = {
        objective: [(name, t.dtype, tuple(t.shape), _blocks(t)) for name, t in own.items()]
        for objective, own in stack.heads.items()
    }
    return Parts(lambda spec: _blocks(stack.base[spec.name]), [of(own) for own in stack.planes], heads)


def streamed(plan: Plan, progress: Callable[[int], None] | None = None) -> Parts:
    """The parts of a plan, computed while they are written.

    Args:
        plan: from `make_plan`.
        progress: called with the number of elements done since the last call.
    """

    def counted(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        for block in blocks:
            yield block
            if progress is not None:
                progress(block.numel())

    def of(expert: Source) -> Callable[[TensorSpec], Plane | Iterable[Tensor] | None]:
        def plane(spec: TensorSpec) -> Plane | Iterable[Tensor] | None:
            if plan.planes.kind == "dense":
                blocks = delta_blocks(plan, expert, spec)
                return None if blocks is None else counted(blocks)
            cpu = torch.device("cpu")

            def base() -> Tensor:
                return gather(base_blocks(plan, spec), spec.shape, TO_TORCH[spec.dtype], cpu)

            found = plane_of(plan, expert, spec, base, cpu)
            if progress is not None:
                progress(spec.numel)
            return found

        return plane

    heads = {
        objective: [
            (name, info.dtype, info.shape, head_blocks(plan, objective, name))
            for name, info in head_infos(plan, objective).items()
        ]
        for objective, names in plan.heads.items()
        if names
    }
    return Parts(lambda spec: counted(base_blocks(plan, spec)), [of(e) for e in plan.experts.values()], heads)


def write(
    path: str | os.PathLike[str],
    parts: Parts,
    layout: Layout,
    routers: Routers,
    blueprint: Blueprint,
    *,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
    origin: str | None = None,
) -> str:
    """Write a store, tensor by tensor and atomically.

    Args:
        path: the store's directory.
        parts: its tensors.
        layout: its tensor table.
        routers: its routers.
        blueprint: the model's own files, and those of the objectives that have heads.
        training: how the routers were trained, JSON only.
        force, origin: whether it may replace a trained store, see `StoreWriter`.

    Returns:
        The checksum of the routers, the origin of what goes on from them.

    Raises:
        ValueError: the path exists and is not a store, or is a trained one whose training would be lost.
        OSError: writing failed; what was there before is untouched.
    """
    # The widest elements first, so that every tensor of the file is aligned to its own element size.
    specs = sorted(layout.tensors, key=lambda spec: -ITEM_SIZE[spec.dtype])
    # Quantized planes are whole words, so that what follows them is aligned too.
    merged = sorted(
        layout.with_role("routed", "static"),
        key=lambda spec: (not may_be_small(spec.shape), -ITEM_SIZE[spec.delta_dtype]),
    )
    with StoreWriter(
        path, objectives=layout.objectives, experts=layout.planes, force=force, origin=origin
    ) as writer:
        writer.write_routers(routers.init, routers.stored(), training, routers.family_asked)
        writer.write_base([(s.name, s.dtype, s.shape, _chunks(parts.base(s))) for s in specs])
        for expert, planes in zip(layout.planes, parts.planes, strict=True):
            described: dict[str, dict[str, Any]] = {}
            writer.write_expert(expert, _expert_tensors(merged, planes, described), described)
        for objective, own in parts.heads.items():
            ordered = sorted(own, key=lambda entry: -ITEM_SIZE[TO_NAME[entry[1]]])
            writer.write_head(objective, [(n, TO_NAME[d], s, _chunks(b)) for n, d, s, b in ordered])
            head = blueprint.heads.get(objective, Blueprint())
            for name, content in head.files.items():
                writer.add_head_file(objective, name, content)
        for name, content in blueprint.files.items():
            writer.add_model_file(name, content)
        writer.finish(layout, blueprint.model_class)
        return writer.routers_checksum


def save(
    path: str | os.PathLike[str],
    stack: Stack,
    routers: Routers,
    blueprint: Blueprint,
    *,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
    origin: str | None = None,
) -> str:
    """Write a stack in memory to a store; arguments and errors as `write`."""
    parts = in_memory(stack)
    return write(path, parts, stack.layout, routers, blueprint, training=training, force=force, origin=origin)


def read(store: Store, device: torch.device) -> tuple[Stack, Routers]:
    """The stack and the routers of an open store: views of the mapped files, which `settled` puts on a device."""
    layout = store.layout
    stack = Stack(
        layout,
        _tensors(store.base),
        tuple(_planes(store, e) for e in range(len(layout.members))),
        {objective: _tensors(own) for objective, own in store.heads.items()},
        store.release,
        store.check_unchanged,
        None if device.type == "cpu" else torch.empty(0, device=device).device,  # "cuda" with its number
    )
    routers = routers_for(layout, store.init, store.family)
    routers.family_asked = store.family_asked
    routers.load_state_dict({name: torch.from_numpy(array) for name, array in store.routers.items()})
    return stack, routers


def _expert_tensors(
    specs: Sequence[TensorSpec],
    planes: Callable[[TensorSpec], Plane | Iterable[Tensor] | None],
    described: dict[str, dict[str, Any]],
) -> Iterator[TensorData]:
    """What an expert's file holds; fills `described` with what the manifest says of planes that are not dense."""
    names = {spec.name for spec in specs}
    for spec in specs:
        found = planes(spec)
        if found is None:
            continue
        if isinstance(found, Dense):
            found = _blocks(found.values)
        if isinstance(found, Iterable):
            yield spec.name, spec.delta_dtype, spec.shape, _chunks(found)
            continue
        values, factors, size = parts_of(found)
        parts = plane_parts(spec.name, spec.shape, found.format, size)
        if taken := names & {part[0] for part in parts}:
            raise ValueError(
                f"got tensor {taken.pop()!r}, whose name the {found.format} plane of {spec.name!r} needs in the store; "
                "stack with planes='dense'"
            )
        for tensor, (name, dtype, shape) in reversed(list(zip((values, factors), parts, strict=True))):
            yield name, dtype or TO_NAME[tensor.dtype], shape, _chunks(_blocks(tensor))
        described[spec.name] = {
            "format": found.format,
            "rank" if found.format == "lowrank" else "group": size,
        } | ({} if found.error is None else {"error": found.error})


def _planes(store: Store, expert: int) -> dict[str, Plane]:
    """An expert's planes by tensor."""
    planes: dict[str, Plane] = {n: Dense(t) for n, t in _tensors(store.deltas[expert]).items()}
    for name, stored in store.planes[expert].items():
        shape = store.layout.by_name[name].shape
        values, factors = _tensor(stored.values), _tensor(stored.factors)
        if stored.format != "lowrank":
            kind = torch.int8 if stored.format == "int8" else torch.uint8
            values, factors = values.view(-1).view(kind), factors.view(-1)
        planes[name] = plane_from(values, factors, stored.size, shape, stored.error)
    return planes


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        yield flat[start : start + BLOCK]


def _chunks(blocks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block.cpu().contiguous().view(torch.uint8).numpy()


def _tensors(views: Mapping[str, TensorView]) -> dict[str, Tensor]:
    return {name: _tensor(view) for name, view in views.items()}


def _tensor(view: TensorView) -> Tensor:
    dtype = TO_TORCH[view.dtype]
    if not view.nbytes:
        return torch.empty(view.shape, dtype=dtype)
    return torch.frombuffer(view.data, dtype=dtype).view(view.shape)
