"""Coefficients for columns, asked of the engine as it is: linear layers that hold their weights transposed.

The engine's finest coefficient is a row's, and a row is what a tensor's first dimension counts: an output of
`nn.Linear` [O, I], an input of transformers' `Conv1D` [I, O]. A layer that holds its weight transposed
computes the same, but its rows are the columns of before, so that nothing in the engine changes:

    "columns"             E = T^T        base: T = W0^T        expert: T = (W0 + D)^T
    "rows and columns"    E = W + T^T    base: W = W0, T = 0   expert: W = W0 + D / 2, T = D^T / 2

E is the weight that the layer computes with, D an expert's difference. With both, a coefficient reaches half
of D, so that a step of the same `row_lr` moves the weight half as far. Biases, norms, embeddings,
convolutions and tied weights stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from benchmarks.experiments.experiment import Contend, Context, Models, Outcome

Held = Literal["columns", "rows and columns"]


class Turned(nn.Module):
    """Computes what a linear layer does; its weight is transposed, or as it was with a transposed part beside.

    Args:
        layer: `nn.Linear` or transformers' `Conv1D`; its bias is shared.
        held: what `weight` (as the layer has it, none with "columns") and `turned` (transposed) hold.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | Conv1D, held: Held) -> None:
        super().__init__()
        own: Tensor = layer.weight.detach()
        self.inputs_first = isinstance(layer, Conv1D)
        turned = own.mT.clone(memory_format=torch.contiguous_format)
        if held == "columns":
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(own.clone())
            turned.zero_()
        self.turned = nn.Parameter(turned)
        self.register_parameter("bias", layer.bias)

    @torch.no_grad()
    def share(self, base: Turned) -> None:
        """Give the transposed part half of the difference from the base's layer; with "columns" it has all."""
        if self.weight is not None and base.weight is not None:
            half = (self.weight - base.weight) / 2
            self.weight.sub_(half)
            self.turned.copy_(half.mT)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        effective = self.turned.mT if self.weight is None else self.weight + self.turned.mT
        return F.linear(x, effective.mT if self.inputs_first else effective, self.bias)


def turn(module: nn.Module, held: Held) -> nn.Module:
    """Replace, in place, each linear layer whose weight is its own by `Turned`; the module."""
    names: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    for name, layer in list(module.named_modules()):
        if type(layer) in (nn.Linear, Conv1D) and names[id(layer.weight)] == 1:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, Turned(layer, held).train(layer.training))
    return module


def turn_expert(module: nn.Module, base: nn.Module, held: Held) -> nn.Module:
    """The same of an expert, beside its base after `turn`: both parts together give the expert."""
    turn(module, held)
    for name, layer in module.named_modules():
        if isinstance(layer, Turned):
            beside = base.get_submodule(name)
            assert isinstance(beside, Turned)
            layer.share(beside)
    return module


class TurnedModels(Models):
    """An experiment's models, turned."""

    def __init__(self, models: Models, held: Held) -> None:
        super().__init__(models.experiment, models.seed, models.folder)
        self.held = held

    def base(self) -> nn.Module:
        """A fresh copy of the base, turned."""
        return turn(super().base(), self.held)

    def expert(self, name: str) -> nn.Module:
        """A fresh copy of an objective's expert, turned."""
        return turn_expert(super().expert(name), self.base(), self.held)


def on_turned(run: Contend, held: Held) -> Contend:
    """A contender on the turned models: it merges, learns and is measured as on the models themselves."""

    def on(context: Context) -> Outcome:
        return run(replace(context, models=TurnedModels(context.models, held)))

    return on
