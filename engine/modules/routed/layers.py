"""Layers whose weight is mixed on the way into the product, and what they replace.

They stand in for `nn.Linear`, transformers' `Conv1D` and `nn.MultiheadAttention` and own no weight: a `MixedWeight`
reads base and deltas where they lie. `fused.py` gives it one set of routing weights, `batched.py` one for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretofuse.engine.layout import Spans
from paretofuse.engine.routing.weights import coefficients
from paretofuse.kernels.reference import merge_tensor_reference
from paretofuse.kernels.routed_linear import routed_linear


class MixedWeight(Protocol):
    """A weight [O, I] that is mixed on the way into a product."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] -> [..., O]."""
        ...

    def part(self, first: int, last: int) -> MixedWeight:
        """The weight of outputs first .. last."""
        ...

    def dense(self) -> Tensor:
        """The weight itself, for code that asks a layer for it."""
        ...


class RoutedWeight:
    """One weight for the whole batch.

    Args:
        base: [O, I], or [I, O] if transposed.
        deltas: [E, *base.shape].
        mix: [G, P], [G + R, P] or [G + R + C, P] float32, the routing weights of the whole model; rewritten in place.
        spans: where the weight's lie in `mix`.
        transposed: whether base and deltas are [I, O], as transformers' Conv1D keeps them.
    """

    def __init__(self, base: Tensor, deltas: Tensor, mix: Tensor, spans: Spans, transposed: bool) -> None:
        self.base, self.deltas, self.mix, self.spans = base, deltas, mix, spans
        self.transposed = transposed

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] -> [..., O], differentiable in x, the routing weights and the bias.

        The kernels know no coefficients of rows or columns: with those the weight is merged by PyTorch first.
        """
        weights = coefficients(self.mix, self.spans)
        if weights.dim() == 2:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return F.linear(x, self._mixed(x.dtype), None if bias is None else bias.to(x.dtype))
        base, deltas = (self.base.T, self.deltas.mT) if self.transposed else (self.base, self.deltas)
        return routed_linear(x, base, deltas, weights, bias)

    def part(self, first: int, last: int) -> RoutedWeight:
        """The weight of outputs first .. last, as a view; not of a transposed weight."""
        base, deltas = self.base[first:last], self.deltas[:, first:last]
        return RoutedWeight(base, deltas, self.mix, self.spans.part(first, last), False)

    def dense(self) -> Tensor:
        """Mixed anew each time, differentiable in the routing weights."""
        return self._mixed(self.base.dtype)

    def _mixed(self, dtype: torch.dtype) -> Tensor:
        """[O, I]."""
        weights = coefficients(self.mix, self.spans)
        mixed = merge_tensor_reference(self.base, list(self.deltas), weights, dtype)
        return mixed.T if self.transposed else mixed


class RoutedLinear(nn.Module):
    """`nn.Linear` or, transposed, transformers' `Conv1D`, with a mixed weight that is never stored."""

    bias: Tensor | None

    def __init__(
        self, mixed: MixedWeight, shape: Sequence[int], bias: Tensor | None, transposed: bool
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.mixed = mixed
        self.transposed = transposed
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.mixed.linear(x, self.bias)

    @property
    def weight(self) -> Tensor:
        """As the replaced layer's: for code that reads its dtype or its values."""
        dense = self.mixed.dense()
        return dense.T if self.transposed else dense

    def extra_repr(self) -> str:
        """Shown by print."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class RoutedAttention(nn.Module):
    """`nn.MultiheadAttention` whose input and output projections have mixed weights; same arguments, same results.

    Args:
        source: what it replaces; its queries, keys and values have the same size, and it adds no bias or zeros to
            the keys.
        in_proj: the mixed weight [3 D, D].
        in_proj_bias: [3 D], or None (also where the mixed weight brings its own).
        out_proj: the output projection.
    """

    in_proj_bias: Tensor | None

    def __init__(
        self,
        source: nn.MultiheadAttention,
        in_proj: MixedWeight,
        in_proj_bias: Tensor | None,
        out_proj: RoutedLinear,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        # Encoder layers of somebody's own, made after torch's, ask this before they read the weights past this forward.
        self._qkv_same_embed_dim = False
        self.in_proj = in_proj
        self.in_proj_bias = in_proj_bias
        self.out_proj = out_proj

    @property
    def in_proj_weight(self) -> Tensor:
        """As the replaced layer's, mixed anew each time."""
        return self.in_proj.dense()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's; `is_causal` is a hint only, and the mask is what counts.

        Raises:
            ValueError: is_causal without attn_mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError("got is_causal=True without attn_mask, expected the mask too; pass attn_mask")
        batched = query.dim() == 3
        same = query is key and key is value
        q, k, v = (self._order(x) if batched else x[None] for x in (query, key, value))  # [B, T or S, D]
        q, k, v = (self._heads(x) for x in self._project(q, k, v, same))  # [B, H, T or S, D / H]
        mask = self._mask(attn_mask, key_padding_mask if batched else _row(key_padding_mask), q, k)
        drop = self.dropout if self.training else 0.0
        shares = None
        if need_weights:
            scores = q @ k.mT / self.head_dim**0.5
            shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), drop)
            mixed = shares @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if shares is not None and average_attn_weights:
            shares = shares.mean(1)
        if not batched:
            return out[0], None if shares is None else shares[0]
        return self._order(out), shares

    def _order(self, x: Tensor) -> Tensor:
        """To batch-first from the module's own order, or back."""
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, q: Tensor, k: Tensor, v: Tensor, same: bool) -> Sequence[Tensor]:
        """One product for self-attention, else three."""
        if same:
            return self.in_proj.linear(q, self.in_proj_bias).chunk(3, dim=-1)
        size, bias = self.embed_dim, self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3, dim=-1)
        return [
            self.in_proj.part(i * size, (i + 1) * size).linear(x, b)
            for i, (x, b) in enumerate(zip((q, k, v), biases, strict=True))
        ]

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, D / H]."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What to add to the scores, broadcastable to [B, H, T, S]; boolean masks are True where not allowed."""
        total = None
        if attention is not None:
            total = _additive(attention, q)  # [T, S] or [B * H, T, S]
            if total.dim() == 3:
                total = total.unflatten(0, (len(q), self.num_heads))
        if padding is not None:
            shut = _additive(padding, q)[:, None, None, :]  # [B, 1, 1, S]
            total = shut if total is None else total + shut
        return None if total is None else total.expand(len(q), self.num_heads, q.shape[2], k.shape[2])


def _row(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)


def linear_weights(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, attribute) of each weight of a layer that this file has a replacement for; none for other layers.

    Only the very types count, and only without hooks: what a subclass or a hook does is not known here.
    """
    if has_hooks(layer):
        return []
    if type(layer) is nn.Linear or is_conv1d(layer):
        return [(layer, "weight")]
    if type(layer) is nn.MultiheadAttention:
        plain = layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn
        return [(layer, "in_proj_weight"), (layer.out_proj, "weight")] if plain else []
    return []


def has_hooks(layer: nn.Module) -> bool:
    """Whether a layer has hooks, which a replacement would lose."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D; by name, since this room does not import transformers."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def routed_layer(layer: Any, weights: Sequence[MixedWeight], biases: Sequence[Tensor | None]) -> nn.Module:
    """The replacement of one layer, given its mixed weights [O, I] and its biases in the order of `linear_weights`."""
    if isinstance(layer, nn.MultiheadAttention):
        shape = (layer.embed_dim, layer.embed_dim)
        replacement: nn.Module = RoutedAttention(
            layer, weights[0], biases[0], RoutedLinear(weights[1], shape, biases[1], False)
        )
    else:
        transposed = is_conv1d(layer)
        shape = tuple(layer.weight.shape[::-1] if transposed else layer.weight.shape)
        replacement = RoutedLinear(weights[0], shape, biases[0], transposed)
    return replacement.train(layer.training)


def bias_names(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, attribute) of the biases that go with `linear_weights`."""
    if isinstance(layer, nn.MultiheadAttention):
        return [(layer, "in_proj_bias"), (layer.out_proj, "bias")]
    return [(layer, "bias")]


def replace(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Exchange submodules wherever they stand, in place; returns the module, or its own replacement."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    built = replacements.get(module, module)
    take_no_shortcut(built, replacements.values())
    return built


def take_no_shortcut(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Have torch's encoders in a module call these parts of theirs, on plain tensors, for good.

    In eval mode they would read the parts' weights past their forward, and give them nested tensors.
    """
    called = set(parts)
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not called.isdisjoint(encoder.modules()):
            encoder.use_nested_tensor = False
        if isinstance(encoder, nn.TransformerEncoderLayer) and not called.isdisjoint(encoder.modules()):
            encoder.activation_relu_or_gelu = 0  # asked before that shortcut alone
