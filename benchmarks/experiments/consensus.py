"""A merge of all experts, without data, as one more plane that belongs to no objective: does it help a front?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paretofuse.engine.methods.method import Group
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.registry import by_name

DENSITY = 0.2
"""Share of each difference that TIES keeps, and that DARE keeps and rescales: TIES's own; here and as rivals."""


def consensus(base: nn.Module, experts: Mapping[str, nn.Module], method: str, seed: int) -> nn.Module:
    """The experts merged by a recipe's method, each with weight 1; float32 parameters, all else the base's."""
    merging = by_name()[method]
    settings = {p.name: p.default for p in merging.parameters} | {"weight": 1.0, "density": DENSITY}
    each = {p.name: settings[p.name] for p in merging.parameters if p.each}
    shared = {p.name: settings[p.name] for p in merging.parameters if not p.each}
    tensors = [dict(expert.named_parameters()) for expert in experts.values()]
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            group = Group(
                name,
                _numbers(parameter),
                tuple(_numbers(own[name]) for own in tensors),
                (each,) * len(tensors),
                shared,
                seed,
            )
            out = Numbers.empty("F32", parameter.shape)
            merging.merge(group, out)
            parameter.copy_(torch.from_numpy(out.floats()))
    return base


def _numbers(tensor: Tensor) -> Numbers:
    return Numbers.of(tensor.detach().numpy(), "F32")
