"""A plan's numbers, streamed block by block: the base, the experts' deltas and the heads.

The same blocks fill memory (`stack.build`) and a store (`persist.streamed`), so that neither ever holds a model more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.layout import TensorSpec
from paretofuse.engine.methods.numbers import Floats
from paretofuse.engine.planes.choose import encode, may_be_small
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.stacking.misfit import norm_of, squares_of_product
from paretofuse.engine.stacking.plan import Plan
from paretofuse.engine.stacking.sources import BLOCK, Source, TensorInfo


def base_blocks(plan: Plan, spec: TensorSpec) -> Iterator[Tensor]:
    """The base tensor's flat blocks in its stored dtype.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    dtype, squares = TO_TORCH[spec.dtype], 0.0
    for block in plan.base.blocks(spec.name):
        if block.is_floating_point():
            norm = norm_of(block)  # one look at a block tells its size, and mostly whether it is finite
            if not math.isfinite(norm):
                _check_finite(block, plan.base.label, spec.name)
            squares += norm**2
        yield _converted(block, dtype, plan.base.label, spec.name)
    if spec.role != "constant":
        plan.norms.base[spec.name] = squares


def delta_blocks(plan: Plan, expert: Source, spec: TensorSpec) -> Iterator[Tensor] | None:
    """The flat blocks of expert - base in the delta dtype, or None where the expert leaves the tensor unchanged.

    The difference is taken in float32 against the base as it is stored, so that merging with a weight of one gives
    the expert back as nearly as the dtypes allow.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    name = expert.aliases.get(spec.name, spec.name)
    if expert.is_delta and name not in expert.infos:
        return None
    differences = _differences(plan, expert, spec, name)
    equal: list[int] = []  # sizes of the blocks before the first that differs, which need not be kept
    for first in differences:
        if norm_of(first) or first.any():  # squares may vanish where the numbers do not
            return _rounded(chain(map(torch.zeros, equal), [first], differences), plan, expert, spec)
        equal.append(first.numel())
    return None


def plane_of(
    plan: Plan, expert: Source, spec: TensorSpec, base: Callable[[], Tensor], device: torch.device
) -> Plane | None:
    """What an expert adds to a tensor, in the plan's format; None where it leaves it unchanged.

    An expert that knows its delta as factors (LoRA) keeps them, unless dense planes were asked for: no dense delta is
    made of them. Only of a weight that is a stack of weights (experts of a mixture) is one.

    Args:
        base: gives the base tensor as it is stored, on the device; only asked where the format depends on it.
        device: where the plane shall lie.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    name = expert.aliases.get(spec.name, spec.name)
    if (
        name in expert.factors
        and plan.planes.kind != "dense"
        and len(spec.shape) > 1
        and plan.transform is None
    ):
        sides = [update.sides() for update in expert.factors[name]]
        if all(left.dim() == 2 for left, _ in sides):
            left, right = torch.cat([b for b, _ in sides], 1), torch.cat([a for _, a in sides], 0)
            for factor in (left, right):
                _check_finite(factor, expert.label, name)
            plan.norms.deltas[expert.label][spec.name] = squares_of_product(left, right)
            plane = LowRank.of_factors(left.to(device), right.to(device), spec.shape)
            return plane if plane.a.any() and plane.b.any() else None
    blocks = delta_blocks(plan, expert, spec)
    if blocks is None:
        return None
    dtype = TO_TORCH[spec.delta_dtype]
    if plan.planes.kind == "dense" or not may_be_small(spec.shape):
        return Dense(gather(blocks, spec.shape, dtype, device))
    delta = gather(_differences(plan, expert, spec, name), spec.shape, torch.float32, device)
    plan.norms.deltas[expert.label][spec.name] = norm_of(delta) ** 2
    if not _is_finite(delta):
        gather(blocks, spec.shape, dtype, device)  # raises, and says why
    return encode(plan.planes, delta, base(), dtype, len(plan.experts))


def gather(
    blocks: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Blocks into one new tensor."""
    result = torch.empty(shape, dtype=dtype, device=device)
    flat, start = result.view(-1), 0
    for block in blocks:
        flat[start : start + block.numel()].copy_(block)
        start += block.numel()
    return result


def head_infos(plan: Plan, objective: str) -> dict[str, TensorInfo]:
    """Shapes and dtypes of an objective's own tensors, as they are stored.

    Floats take the dtype that was asked for, else that of the base's tensor of the same name, else their own.
    """
    infos = {}
    for name in plan.heads[objective]:
        info = plan.head_expert(objective).infos[name]
        if info.dtype.is_floating_point:
            base = plan.layout.by_name.get(name)
            wanted = plan.dtype or (base.dtype if base is not None else None)
            info = TensorInfo(info.shape, TO_TORCH[wanted] if wanted else info.dtype)
        infos[name] = info
    return infos


def head_blocks(plan: Plan, objective: str, name: str) -> Iterator[Tensor]:
    """The flat blocks of one of an objective's own tensors.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    dtype = head_infos(plan, objective)[name].dtype
    expert = plan.head_expert(objective)
    blocks = expert.blocks(name)
    if expert.is_delta and name not in expert.replaced:
        ours = plan.base.blocks(name)
        blocks = (a.float() + b.to(a.device).float() for a, b in zip(blocks, ours, strict=True))
    for block in blocks:
        if block.is_floating_point():
            _check_finite(block, expert.label, name)
        yield _converted(block, dtype, expert.label, name)


def _differences(plan: Plan, expert: Source, spec: TensorSpec, name: str) -> Iterator[Tensor]:
    """What the expert adds, in float32: expert - base, or what the plan's transform makes of it."""
    if plan.transform is None:
        yield from _own_differences(plan, expert, spec, name)
        return
    sources, device = list(plan.experts.values()), torch.device("cpu")

    def difference(number: int) -> Floats | None:
        nonlocal device
        own = sources[number].aliases.get(spec.name, spec.name)
        if sources[number].is_delta and own not in sources[number].infos:
            return None
        blocks = list(_own_differences(plan, sources[number], spec, own))
        device = blocks[0].device if number == mine and blocks else device
        found: Floats = torch.cat([block.float().cpu() for block in blocks]).reshape(spec.shape).numpy()
        return found

    mine = next(number for number, source in enumerate(sources) if source is expert)
    changed = plan.transform.apply(spec.name, mine, len(sources), difference)
    yield from torch.from_numpy(changed).reshape(-1).to(device).split(BLOCK)


def _own_differences(plan: Plan, expert: Source, spec: TensorSpec, name: str) -> Iterator[Tensor]:
    """expert - base, block by block in float32; for sources of deltas, their own blocks."""
    if expert.is_delta and name not in expert.replaced:
        yield from expert.blocks(name)
        return
    stored = TO_TORCH[spec.dtype]
    for ours, theirs in zip(plan.base.blocks(spec.name), expert.blocks(name), strict=True):
        ours = ours.to(stored)
        yield theirs.to(torch.float32) - ours.to(device=theirs.device, dtype=torch.float32)


def _rounded(differences: Iterable[Tensor], plan: Plan, expert: Source, spec: TensorSpec) -> Iterator[Tensor]:
    """Blocks of deltas in the dtype that they are stored in, or an error that says why one is not finite."""
    dtype, squares = TO_TORCH[spec.delta_dtype], 0.0
    for difference in differences:
        norm, rounded = norm_of(difference), difference.to(dtype)
        exact = rounded.dtype == difference.dtype
        if not (exact and math.isfinite(norm)) and not _is_finite(rounded):
            for source in (plan.base, expert):
                name = source.aliases.get(spec.name, spec.name)
                for block in source.blocks(name):
                    _check_finite(block, source.label, name)
            raise CheckpointError(
                f"{expert.label}: the delta of tensor {spec.name!r} overflows {dtype}; pass delta_dtype=torch.bfloat16 "
                "or float32"
            )
        squares += norm**2
        yield rounded
    plan.norms.deltas[expert.label][spec.name] = squares


def _converted(block: Tensor, dtype: torch.dtype, label: str, name: str) -> Tensor:
    """A finite block in the dtype that it is stored in, or an error where that makes it infinite."""
    converted = block.to(dtype)
    if converted is not block and converted.is_floating_point() and not _is_finite(converted):
        raise CheckpointError(
            f"{label}: tensor {name!r} overflows {dtype}; pass dtype=torch.bfloat16 or float32"
        )
    return converted


def _is_finite(block: Tensor) -> bool:
    """Whether no value is NaN or infinite: both extremes tell, twenty times faster than torch.isfinite."""
    if block.numel() == 0:
        return True
    if block.element_size() == 1:  # torch has no aminmax of float8
        block = block.to(torch.float32)
    low, high = torch.aminmax(block)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _check_finite(block: Tensor, label: str, name: str) -> None:
    if not _is_finite(block):
        kind = "NaN" if torch.isnan(block.to(torch.float32)).any() else "infinity"
        raise CheckpointError(f"{label}: tensor {name!r} holds {kind}; repair or re-export the checkpoint")
