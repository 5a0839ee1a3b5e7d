"""Training the live module without the weight gradients of its linear layers: sketches stand in for the planes.

Hooks around a layer's forward take `requires_grad` from its weight, and watch the layer's input and the gradient of its
output instead. The weight has it back as the layer returns, so that code which reads it past the layer, and layers
that share it, still have their exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.modules.gradient import GradientCollector
from paretofuse.engine.modules.routed.fuse import fused_layers
from paretofuse.engine.modules.routed.layers import is_conv1d
from paretofuse.engine.planes.sketch import sketch

Take = Callable[[Tensor, Tensor], None]
"""Given a layer's input [..., I] and the gradient of its output [..., O]."""


def sketch_layers(
    module: nn.Module, routed: Mapping[str, str], bound: BoundStack, collector: GradientCollector, rank: int
) -> list[RemovableHandle]:
    """Have the linear layers of a live module learn by sketches, until the handles are removed.

    `nn.MultiheadAttention`, whose products are not layers of their own, and layers with hooks stay exact.

    Args:
        module: the live module.
        routed: stored name of each routed tensor by every name that it has.
        bound: the stack.
        collector: of the live module.
        rank: of the sketches.

    Raises:
        ValueError: there is no such layer.
    """
    handles: list[RemovableHandle] = []
    for layer, names in fused_layers(module, routed).items():
        if isinstance(layer, nn.MultiheadAttention):
            continue
        planes = [sketch(own.get(names[0]), rank) for own in bound.stack.planes]
        bound.stack.release(names)
        handles += _watch(layer, collector.take_tokens(names[0], planes, transposed=is_conv1d(layer)))
    if not handles:
        raise nothing_to_sketch(rank)
    return handles


def nothing_to_sketch(rank: int) -> ValueError:
    """The error for a model without layers that sketches could serve."""
    return ValueError(
        f"got sketch={rank} for a model without routed linear layers (nn.Linear, transformers' Conv1D; with "
        "materialize=False nn.MultiheadAttention too), whose weight gradients are what it saves; leave it out"
    )


def _watch(layer: nn.Module, take: Take) -> list[RemovableHandle]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    # Makes the output part of a graph where input and bias do not; it has no gradient of its own.
    anchor = torch.zeros((), device=weight.device, requires_grad=True)
    taken = False

    def before(module: nn.Module, args: Any) -> None:
        nonlocal taken
        taken = weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if taken:
            weight.requires_grad_(False)

    def after(module: nn.Module, args: Any, named: dict[str, Any], output: Tensor | None) -> Tensor | None:
        nonlocal taken
        if not taken:
            return output
        taken = False
        weight.requires_grad_(True)
        if output is None:  # the layer raised
            return None
        x = args[0] if args else next(iter(named.values()))
        watched: Tensor = _Watched.apply(output, x, anchor, take)
        return watched

    return [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]


class _Watched(torch.autograd.Function):
    """A layer's output as it is; its gradient goes on, and to `take` with the layer's input."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, take: Take) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        # A tensor of its own, which may be changed in place as a view could not; over memory that nobody else reads.
        if type(output) is not Tensor:
            return output.clone()
        place = output.storage_offset(), output.size(), output.stride()
        return output.new_empty(0).set_(output.untyped_storage(), *place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.take(x, gradient)
        return gradient, None, None, None
