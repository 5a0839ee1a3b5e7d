"""Training without merged weights: linear layers mix their weight on the way into the product.

    y = x (W0 + sum_e L[g, e] D_e)^T + bias          kernels.routed_linear

The live module stays an ordinary module in which nothing is replaced. The fused module is a second one, made from the
same skeleton when first asked for, in which `nn.Linear`, transformers' `Conv1D` and `nn.MultiheadAttention` give way
to the thin layers of `layers.py`. They own no weight: they read the base, the deltas and one small tensor of routing
weights [G, P] that `engine.train_at(..., materialize=False)` rewrites. Forward hooks could not do that, because a
layer would compute its dense product first, and changing the layers of the live module would change what users hold.

A weight that some other kind of layer reads too (GPT-2's embedding is its output layer's weight) has to be merged for
that layer anyway, so its linear layer reads the merged one and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from paretofuse.engine.modules.routed.layers import (
    MixedWeight,
    bias_names,
    linear_weights,
    replace,
    routed_layer,
)
from paretofuse.engine.stacking.skeleton import stored_tensors


def fused_layers(module: nn.Module, routed: Mapping[str, str]) -> dict[nn.Module, list[str]]:
    """The layers that can do without a merged weight, and the stored names of those weights.

    Args:
        module: a skeleton, or the model.
        routed: stored name of each routed tensor by every name it has.
    """
    names = {id(tensor): routed[name] for name, tensor in stored_tensors(module).items() if name in routed}
    owners: dict[int, set[tuple[int, str]]] = {}
    for owner in module.modules():
        for attribute, parameter in owner._parameters.items():
            owners.setdefault(id(parameter), set()).add((id(owner), attribute))
    layers = {layer: weights for layer in module.modules() if (weights := linear_weights(layer))}
    while True:  # a layer that drops out takes along those that share a weight with it
        read = {(id(owner), attribute) for weights in layers.values() for owner, attribute in weights}
        kept = {
            layer: weights
            for layer, weights in layers.items()
            if all(
                id(parameter := getattr(owner, attribute)) in names and owners[id(parameter)] <= read
                for owner, attribute in weights
            )
        }
        if len(kept) == len(layers):
            break
        layers = kept
    return {
        layer: [names[id(getattr(owner, attribute))] for owner, attribute in weights]
        for layer, weights in layers.items()
    }


def fuse(
    module: nn.Module,
    layers: Mapping[nn.Module, Sequence[str]],
    weight: Callable[[nn.Module, str], MixedWeight],
) -> nn.Module:
    """Put routed layers in the place of `layers`, in a module of our own; returns it (or the layer, if it is one).

    Args:
        module: made of a skeleton.
        layers: from `fused_layers`.
        weight: makes a layer's mixed weight [O, I] of its stored name.
    """
    return replace(
        module,
        {
            layer: routed_layer(
                layer,
                [weight(layer, name) for name in names],
                [getattr(owner, attribute) for owner, attribute in bias_names(layer)],
            )
            for layer, names in layers.items()
        },
    )
