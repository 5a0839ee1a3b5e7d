"""`pf.add_consensus`: a merge of all experts becomes a plane of its own, which belongs to no objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.evaluate import eval_mode
from paretofuse.engine.evaluation.objective import Objective, Objectives, as_objectives, in_order
from paretofuse.engine.layout import Member, TensorSpec
from paretofuse.engine.methods.consensus import Consensus, choices
from paretofuse.engine.methods.method import Parameter
from paretofuse.engine.methods.words import parse_words
from paretofuse.engine.modules.factory import routed_names
from paretofuse.engine.modules.heads import with_head
from paretofuse.engine.modules.routed.fuse import fused_layers
from paretofuse.engine.modules.routed.layers import is_conv1d, take_no_shortcut
from paretofuse.engine.planes.choose import encode, parse
from paretofuse.engine.planes.plane import Plane, to
from paretofuse.engine.stacking.stack import lasting
from paretofuse.engine.training.batches import Batches
from paretofuse.engine.training.regmean import RegMean, inputs_of
from paretofuse.engine.training.settings import check_number

REGMEAN = "regmean"
SCALE = Parameter("scale", float, 0.9, low=0.0, high=1.0)
"""Of what lies off the diagonals of RegMean's products; the paper's own choice for larger models."""

Merge = Callable[[TensorSpec, Sequence[Tensor]], Tensor]
"""Given a tensor and what each expert adds to it, float32 on the CPU: what the merge adds."""


def reads_data(method: str) -> bool:
    """Whether a method of `add_consensus` wants objectives."""
    return method.partition(":")[0] == REGMEAN


@lasting()
def add_consensus(
    engine: Engine,
    method: str = "iso_c",
    *,
    objectives: Objectives | None = None,
    batches: int = 8,
    planes: str = "dense",
) -> None:
    """Give an engine one more plane: a merge of its experts, each with weight 1, in every routed tensor.

    The plane belongs to no objective. It starts with coefficient 0, which changes nothing, and `pf.fit` learns where it
    helps. All modules of the engine's own (`module`, `fused_module`, replicas) are made anew.

    Args:
        engine: the engine; its new plane is named after the method.
        method: a merge method with its parameters, such as "iso_c", "tsv" or "ties:density=0.2" (docs/recipes.md), or
            "regmean:scale=0.9" (RegMean, arXiv 2212.09849), which reads data: routed linear layers are merged so that
            they give on each expert's inputs what it gives, all else is the experts' mean.
        objectives: what `pf.fit` takes; for "regmean" alone. Each expert sees its objective's batches, as the loss of
            that objective runs them, in eval mode.
        batches: of each objective.
        planes: the format, as for `pf.stack`; "dense" in the dtype of the experts' dense planes.

    Raises:
        ValueError: no such method or parameter, fewer than two experts that belong to objectives, an engine that has
            trained planes already or is sharded, or "regmean" without objectives and other methods with them.
        TypeError: not an engine.
    """
    if not isinstance(engine, Engine):
        raise TypeError(
            f"got {type(engine).__name__} to add a plane to, expected an engine that pf.stack or pf.load made"
        )
    name, options, seed = parse_words(
        f"the method {method!r}", method, {**choices(), REGMEAN: {SCALE.name: SCALE}}
    )
    wanted = parse(planes)
    if wanted.dtype is not None:
        raise ValueError(
            f"got planes={planes!r}, expected dense, which has the dtype of the experts' planes, auto, int8, int4 or "
            "lowrank:RANK"
        )
    check_number("batches", batches, 1)
    if (name == REGMEAN) != (objectives is not None):
        raise ValueError(
            f"got the method {method!r} {'without' if objectives is None else 'with'} objectives, expected them for "
            f"{REGMEAN!r}, which reads data, and for no other method"
        )
    if engine.routers.planes is not None:
        raise ValueError(
            "got an engine that has trained planes already; call pf.add_consensus before pf.add_planes, or save and "
            "load the engine first"
        )
    engine._bound.check_whole("a consensus plane")
    experts = [number for number, member in enumerate(engine.layout.members) if member.objective is not None]
    if len(experts) < 2:
        raise ValueError(f"got {len(experts)} expert of an objective, expected at least two to merge")
    if objectives is None:
        merge = _by_differences(Consensus(name, options, seed))
    else:
        asked = in_order(as_objectives(objectives), engine.objectives)
        merge = _by_regression(engine, experts, asked, batches, options[SCALE.name])

    stack, own = engine._stack, dict[str, Plane]()
    for spec in engine.layout.with_role("routed"):
        held = [stack.planes[number].get(spec.name) for number in experts]
        if any(plane is not None for plane in held):
            empty = torch.zeros(spec.shape, dtype=torch.float32)
            merged = merge(spec, [empty if plane is None else plane.decode().cpu() for plane in held])
            if bool(merged.any()):
                base = stack.base[spec.name]
                plane = encode(wanted, merged, base.cpu(), TO_TORCH[spec.delta_dtype], len(stack.planes) + 1)
                own[spec.name] = to(plane, base.device)
        stack.release([spec.name])
    member = Member(engine.layout.free_name(name), None, 0.0)
    layout = replace(engine.layout, members=(*engine.layout.members, member))
    engine.routers.append([member])
    engine._rebind(replace(stack, layout=layout, planes=(*stack.planes, own)))


def _by_differences(consensus: Consensus) -> Merge:
    def merge(spec: TensorSpec, deltas: Sequence[Tensor]) -> Tensor:
        return torch.from_numpy(consensus.of(spec.name, [delta.numpy() for delta in deltas]))

    return merge


def _by_regression(
    engine: Engine, experts: Sequence[int], objectives: Sequence[Objective], batches: int, scale: float
) -> Merge:
    """Run each expert on its objective's data, in a module apart, and merge by what its layers were given."""
    live, planes = engine._in_place.build(), engine._stack.planes
    layers = {
        layer: names[0]
        for layer, names in fused_layers(live.module, routed_names(engine._bound)).items()
        if not isinstance(layer, nn.MultiheadAttention)  # whose products are no layers of their own
    }
    transposed = {name for layer, name in layers.items() if is_conv1d(layer)}

    def matrix(name: str, delta: Tensor) -> Tensor:
        """[O, I] of a weight, or a weight of it."""
        return delta.T if name in transposed else delta

    sums = {name: RegMean() for name in layers.values()}
    data = [Batches(o.data, o.name, 0, index) for index, o in enumerate(objectives)]
    seen = [[stream.take() for _ in range(batches)] for stream in data]
    take_no_shortcut(live.module, layers)
    with eval_mode(live.module):
        for number in experts:
            weights = torch.zeros(1, len(engine.groups), len(planes), device=engine.device)
            weights[..., number] = 1
            live.switch(weights)
            index = engine.objectives.index(engine.layout.members[number].objective or "")
            objective = objectives[index]
            with inputs_of(layers) as found:
                for batch in seen[index]:
                    objective.loss(with_head(live.module, objective.name), batch)
            for layer, name in layers.items():
                gram, plane = found[layer].gram(scale), planes[number].get(name)
                if gram is not None:
                    shape = engine.layout.by_name[name].shape
                    delta = torch.zeros(shape) if plane is None else plane.decode().cpu()
                    sums[name].add(matrix(name, delta), gram)

    def merge(spec: TensorSpec, deltas: Sequence[Tensor]) -> Tensor:
        mean = torch.stack(list(deltas)).mean(0)
        if spec.name not in sums:
            return mean
        solved = sums.pop(spec.name).solve(matrix(spec.name, mean))
        return matrix(spec.name, solved).to(torch.float32).contiguous()

    return merge
