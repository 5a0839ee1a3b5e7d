"""Modules made of a bound stack's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from paretofuse.engine.merging.backends import Merger
from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.merging.low_rank import all_low_rank
from paretofuse.engine.modules.live import LiveModule
from paretofuse.engine.modules.routed.fuse import fuse, fused_layers
from paretofuse.engine.modules.routed.layers import MixedWeight, RoutedWeight, is_conv1d
from paretofuse.engine.modules.routed.layerwise import LayerwiseWeight
from paretofuse.engine.modules.routed.low_rank import LowRankWeight, SideBySide
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.planes.sketch import sketch
from paretofuse.engine.planes.trained import trained_factors, with_own_leaves
from paretofuse.engine.stacking.sharding import shard
from paretofuse.engine.stacking.skeleton import materialize, stored_tensors
from paretofuse.engine.stacking.stack import Stack, lasting


def dense_module(
    stack: Stack, skeleton: nn.Module, state: Mapping[str, Tensor], head: str | None
) -> nn.Module:
    """A new model of merged tensors by name, with an objective's own tensors in whatever shape they have."""
    constants = {spec.name for spec in stack.layout.with_role("constant")}
    free = set(stack.heads.get(head or "", {}))
    return materialize(skeleton, state, "the merged tensors", any_shape=free, constants=constants)


@lasting()
def live_module(
    bound: BoundStack, skeleton: nn.Module, weights: Tensor, *, fused: bool, sketch_rank: int | None = None
) -> LiveModule:
    """A module bound to its mergers; a fused one has merged tensors only where a layer cannot do without.

    Args:
        bound: the stack.
        skeleton: the module's structure.
        weights: the first routing weights, [1, G, P]; or with coefficients of rows and columns, for which a fused
            module is then made.
        fused: whether linear layers give way to those of `routed/layers.py`.
        sketch_rank: of the planes that stand in for others in the gradient of a fused module's routing weights; None
            for the exact one.
    """
    routed, static = bound.layout.with_role("routed"), bound.layout.with_role("static")
    known = routed_names(bound)
    hidden = {n for names in fused_layers(skeleton, known).values() for n in names} if fused else set()
    merged = tuple(spec for spec in routed if spec.name not in hidden)
    out = bound.outputs((*merged, *static), 1)
    # The base's own tensors, held only until the layers are replaced.
    module = _module_of(
        bound, skeleton, {**out.views[0], **{name: bound.stack.base[name] for name in hidden}}
    )
    mixes: dict[torch.device, Tensor] = {}
    planes = bound.stack.planes
    if fused:
        planes = tuple({name: with_own_leaves(plane) for name, plane in own.items()} for own in planes)
        mixes = {d: torch.zeros(weights[0].shape, dtype=torch.float32, device=d) for d in bound.backends}
        weight = partial(_mixed_weight, bound, planes, mixes, sketch_rank)
        module = fuse(module, fused_layers(module, known), weight)
    # Parameters share the outputs' memory but are tensors of their own: write through them from now on.
    stored = {name: shard(tensor) for name, tensor in stored_tensors(module).items()}
    bound.merge_static(out, [stored])
    return LiveModule(
        module,
        bound.routed_merger(merged, out, [stored]),
        {spec.name for spec in merged},
        bound.layout,
        planes,
        weights,
        flat=[flat for flat in bound.flat if flat.bucket.specs[0].role == "routed"],
        mixes=tuple(mixes.values()),
        free=_constants(bound),
    )


@lasting()
def module_bank(bound: BoundStack, skeleton: nn.Module, weights: Tensor) -> tuple[list[LiveModule], Merger]:
    """K modules that one merge writes, and that merge, of weights [K, G, E]; each module's own merge does nothing.

    Args: as `live_module`'s, with weights [K, G, E].
    """
    routed, static = bound.layout.with_role("routed"), bound.layout.with_role("static")
    out = bound.outputs((*routed, *static), len(weights))
    modules = [_module_of(bound, skeleton, views) for views in out.views]
    stored = [{n: shard(t) for n, t in stored_tensors(module).items()} for module in modules]
    bound.merge_static(out, stored)
    names = {spec.name for spec in routed}
    lives = [
        LiveModule(
            module, lambda _: None, names, bound.layout, bound.stack.planes, own, free=_constants(bound)
        )
        for module, own in zip(modules, weights.split(1), strict=True)
    ]
    return lives, bound.routed_merger(routed, out, stored)


def routed_names(bound: BoundStack) -> dict[str, str]:
    """Stored name of each routed tensor by every name it has."""
    return {name: spec.name for name, spec in bound.layout.by_name.items() if spec.role == "routed"}


def _module_of(bound: BoundStack, skeleton: nn.Module, merged: Mapping[str, Tensor]) -> nn.Module:
    """A module of merged tensors, and of the base's own where nothing is merged."""
    constants = {spec.name for spec in bound.layout.with_role("constant")}
    state = {**merged, **{name: bound.stack.base[name].clone() for name in constants}}
    return materialize(skeleton, bound.whole(state), "the stacked tensors", constants=constants)


def _constants(bound: BoundStack) -> set[str]:
    """All names of the tensors that no merger writes."""
    return {name for name, spec in bound.layout.by_name.items() if spec.role == "constant"}


def _mixed_weight(
    bound: BoundStack,
    given: Sequence[Mapping[str, Plane]],
    mixes: Mapping[torch.device, Tensor],
    sketch_rank: int | None,
    layer: nn.Module,
    name: str,
) -> MixedWeight:
    """The weight of a fused layer, given the routing weights [G, P] on each device."""
    base, spans = bound.stack.base[name], bound.layout.spans[name]
    mix, transposed = mixes[base.device], is_conv1d(layer)
    backend = bound.backends[base.device]
    if backend == "native":
        planes = [own.get(name) for own in given]
        release = partial(bound.stack.release, [name])
        sketches = [] if sketch_rank is None else [sketch(plane, sketch_rank) for plane in planes]
        return LayerwiseWeight(base, planes, mix, spans, transposed, release, sketches)
    if sketch_rank is not None:
        raise ValueError(
            f"got sketch={sketch_rank} and materialize=False with the {backend} backend, whose fused layers have "
            "kernels of their own; pass materialize=True, or backend='native' on the CPU"
        )
    if any(trained_factors(own.get(name)) for own in given):
        raise ValueError(
            f"got materialize=False with trained planes and the {backend} backend, whose fused layers copy planes; "
            "pass materialize=True, or backend='native' on the CPU"
        )
    factors = {j: plane for j, own in enumerate(given) if isinstance(plane := own.get(name), LowRank)}
    if factors and all_low_rank([own.get(name) for own in given]):
        return LowRankWeight(base, SideBySide.of(factors, transposed), mix, spans, transposed)
    return RoutedWeight(base, bound.deltas[name], mix, spans, transposed)
