"""A preference for each row of a batch: many users' models in one forward pass, none of them stored.

    y[b] = x[b] (W0 + sum_e L[b, g, e] D_e)^T + bias[b]          kernels.routed_rows

Products and look-ups mix their results (`layers.py`). All else with routed tensors of its own (norms, class tokens,
anything unknown) runs under `torch.vmap` on its own tensors, mixed for each row (`PerRow`). Both are exact; weights of
layers that are not known here are held once for each row, whatever their size.

Where a tensor was, the module holds NaN: code that reads a weight past its layer gets no plausible wrong number.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_unflatten

from paretofuse.engine.layout import Spans
from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.modules.batched.layers import (
    RowConv,
    RowEmbedding,
    RowMix,
    RowsWeight,
    RowTensor,
    placeholder,
)
from paretofuse.engine.modules.routed.layers import (
    bias_names,
    has_hooks,
    is_conv1d,
    linear_weights,
    replace,
    routed_layer,
)
from paretofuse.engine.modules.routed.low_rank import SideBySide
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.stacking.skeleton import materialize, stored_tensors
from paretofuse.engine.stacking.stack import lasting

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""What may stand among a layer's arguments and results besides tensors, in lists, tuples, dicts and the like."""


class PerRow(nn.Module):
    """Any module, run for each row on the row's own tensors by `torch.vmap`; attributes are those of the module.

    Args:
        inner: the module.
        own: its own routed parameters and buffers by attribute.
        mix: the weights.
        layer: its name, for messages.
    """

    def __init__(self, inner: nn.Module, own: Mapping[str, RowTensor], mix: RowMix, layer: str) -> None:
        super().__init__()
        self.inner, self.own, self.mix, self.layer = inner, own, mix, layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's, row by row: tensors whose first dimension is the number of preferences B are split.

        Other tensors are shared by all rows. A scalar result becomes [B]. Within a model, a further argument of shape
        [B, B] or [B, T, T] may be rows of masks or a mask of all, and is refused.

        Raises:
            ValueError, TypeError: rows cannot be told apart in an argument or a result.
        """
        if isinstance(self.inner, _BatchNorm) and self.inner.training:
            raise ValueError(
                f"{self._name()}: got BatchNorm in training mode, which mixes rows; call .eval()"
            )
        own = {name: tensor() for name, tensor in self.own.items()}
        # As in a merged model, statistics carry no gradient.
        own = {name: t.detach() if name in self.inner._buffers else t for name, t in own.items()}
        if self.mix.count == 1:
            return _with(self.inner, {name: t[0] for name, t in own.items()})(*args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        split = [self._is_split(leaf) for leaf in leaves]
        self._check_told_apart([x for x, s in zip(leaves, split, strict=True) if s][1:])
        plain: list[tuple[bool, Any]] = []  # of each result: whether it is a tensor, and what it is if not
        result_form: list[Any] = []

        def one(weights: Tensor, own: dict[str, Tensor], *row: Any) -> tuple[Tensor, ...]:
            given = [x.unsqueeze(0) if s else x for x, s in zip(row, split, strict=True)]
            row_args, row_kwargs = tree_unflatten(given, form)
            with self.mix.only(weights):
                found, found_form = tree_flatten(_with(self.inner, own)(*row_args, **row_kwargs))
            plain[:] = [(isinstance(x, Tensor), None if isinstance(x, Tensor) else x) for x in found]
            result_form[:] = [found_form]
            self._check_plain([x for is_tensor, x in plain if not is_tensor], "gave")
            return tuple(x for x in found if isinstance(x, Tensor))

        in_dims = (1, 0, *(0 if s else None for s in split))
        rows = iter(vmap(one, in_dims=in_dims, randomness="different")(self.mix.weights, own, *leaves))
        results = [self._joined(next(rows)) if is_tensor else x for is_tensor, x in plain]
        return tree_unflatten(results, result_form[0])

    def _name(self) -> str:
        return f"layer {self.layer!r}" if self.layer else "the model"

    def _is_split(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor):
            self._check_plain([leaf], "got")
            return False
        return leaf.dim() > 0 and leaf.shape[0] == self.mix.count

    def _check_told_apart(self, further: list[Tensor]) -> None:
        unclear = [x for x in further if x.dim() in (2, 3) and x.shape[-1] == x.shape[-2]]
        if self.layer and unclear:
            raise ValueError(
                f"{self._name()}: got a tensor of shape {list(unclear[0].shape)} with {self.mix.count} rows, and "
                "cannot tell whether it is one for each row or one for all; use another number of rows, or isolate=True"
            )

    def _check_plain(self, leaves: list[Any], verb: str) -> None:
        for leaf in leaves:
            if not isinstance(leaf, PLAIN):
                raise TypeError(
                    f"{self._name()} runs for each row of a batch apart and {verb} a {type(leaf).__name__}, expected "
                    "tensors and plain values only; for transformers' caches pass use_cache=False"
                )

    def _joined(self, rows: Tensor) -> Tensor:
        """[B, 1, ...] -> [B, ...]; [B] stays."""
        if rows.dim() > 1 and rows.shape[1] != 1:
            raise ValueError(
                f"{self._name()}: for one row it gave a tensor of shape {list(rows.shape[1:])}, expected the batch of "
                "one as first dimension; engine.batched cannot run it"
            )
        return rows.squeeze(1) if rows.dim() > 1 else rows


def _with(module: nn.Module, own: Mapping[str, Tensor]) -> nn.Module:
    """The module with other tensors of its own, for one call: a copy that shares all else.

    `torch.func.functional_call` would put them into the module itself for a while, where other threads find them.
    """
    if not own:
        return module
    clone = copy.copy(module)
    clone._parameters = {n: own.get(n, t) for n, t in module._parameters.items()}  # type: ignore[misc]
    clone._buffers = {n: own.get(n, t) for n, t in module._buffers.items()}
    return clone


class _Builder:
    """Puts the layers of `layers.py` and `PerRow` in the place of a module's own.

    Args:
        bound: base, deltas and static tensors.
        module: a module of our own with placeholders for routed tensors.
        mix: the weights.
    """

    def __init__(self, bound: BoundStack, module: nn.Module, mix: RowMix) -> None:
        self._bound, self._module, self._mix = bound, module, mix
        specs, changed = bound.layout.by_name, bound.changed
        self._names = {
            id(tensor): specs[name].name
            for name, tensor in stored_tensors(module).items()
            if name in specs and specs[name].name in changed
        }
        self._tensors: dict[str, RowTensor] = {}

    def build(self, isolate: bool) -> nn.Module:
        """The finished module."""
        replacements: dict[nn.Module, nn.Module] = {}
        done: set[nn.Module] = set()
        for path, layer in self._module.named_modules():
            parts = layer.modules() if isinstance(layer, nn.MultiheadAttention) else [layer]
            if layer in done or not any(self._own(part) for part in parts):
                continue
            self._refuse(path, layer)
            replacements[layer] = self._replacement(path, layer)
            if isinstance(layer, nn.MultiheadAttention):
                done.add(layer.out_proj)
        if not isolate:
            for path, layer in self._module.named_modules():
                if getattr(layer, "batch_first", True) is False:
                    raise ValueError(
                        f"layer {path!r} ({type(layer).__name__}) has batch_first=False: the rows of a batch are not "
                        "its first dimension; pass isolate=True"
                    )
        built = replace(self._module, replacements)
        return PerRow(built, {}, self._mix, "") if isolate else built

    def _own(self, layer: nn.Module) -> dict[str, RowTensor]:
        """A module's own routed tensors by attribute, those of its submodules left out."""
        tensors = {**layer._parameters, **layer._buffers}
        return {a: self._tensor(t) for a, t in tensors.items() if t is not None and id(t) in self._names}

    def _tensor(self, tensor: Tensor) -> RowTensor:
        """A tensor of the module, mixed for each row if it is routed."""
        name = self._names.get(id(tensor))
        if name is None:
            return RowTensor("", tensor, None, Spans(0), self._mix)
        if name not in self._tensors:
            base, planes = self._bound.stack.base[name], self._bound.deltas.where_they_lie(name)
            self._tensors[name] = RowTensor(name, base, planes, self._bound.layout.spans[name], self._mix)
        return self._tensors[name]

    def _refuse(self, path: str, layer: nn.Module) -> None:
        """Raise ValueError for layers that cannot be done exactly."""
        reason = ""
        if is_parametrized(layer) or isinstance(layer, nn.utils.parametrize.ParametrizationList):
            reason = "computes its weight from others (a parametrization); remove it first"
        elif isinstance(layer, nn.Embedding) and layer.max_norm is not None:
            reason = "changes its weight as it is used (max_norm)"
        elif isinstance(layer, nn.MultiheadAttention) and not linear_weights(layer):
            reason = "has kdim, vdim, add_bias_kv, add_zero_attn or hooks, which are not supported"
        elif isinstance(layer, nn.RNNBase):
            reason = "is a recurrent layer, which torch.vmap cannot run"
        if reason:
            raise ValueError(
                f"engine.batched cannot run layer {path!r}: {type(layer).__name__} {reason}; leave its tensors "
                "unrouted (route= a function that gives None for them), or merge for each preference"
            )

    def _replacement(self, path: str, layer: nn.Module) -> nn.Module:
        own = self._own(layer)
        plain: Any = layer
        if type(layer) is nn.MultiheadAttention or ("weight" in own and linear_weights(layer)):
            weights = []
            biases = bias_names(layer)
            for (owner, attribute), bias in zip(linear_weights(layer), biases, strict=True):
                weights.append(self._weight(path, layer, getattr(owner, attribute), getattr(*bias)))
            return routed_layer(layer, weights, [None] * len(weights))
        if "weight" in own and not has_hooks(layer):
            weight = own["weight"]
            if type(layer) is nn.Embedding:
                return RowEmbedding(path, weight)
            if type(layer) in CONVOLUTIONS:
                return RowConv(layer, path, weight, None if plain.bias is None else self._tensor(plain.bias))
        return PerRow(layer, own, self._mix, path)

    def _weight(self, path: str, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> RowsWeight:
        mixed = self._tensor(weight)
        base, found, transposed = mixed.base, mixed.planes, is_conv1d(layer)
        planes: Tensor | list[Tensor | None] | None = None
        low_rank = None
        if isinstance(found, Tensor):
            planes = found.mT if transposed else found
        elif found is not None:
            factors = {e: plane for e, plane in enumerate(found) if isinstance(plane, LowRank)}
            low_rank = SideBySide.of(factors, transposed) if factors else None
            dense = [plane if isinstance(plane, Tensor) else None for plane in found]
            planes = [None if plane is None else plane.T for plane in dense] if transposed else dense
        if transposed:
            base = base.T
        own = None if bias is None else self._tensor(bias)
        return RowsWeight(path, base, planes, low_rank, mixed.spans, transposed, own, self._mix)


@lasting()
def _placed(bound: BoundStack, skeleton: nn.Module, head: Mapping[str, Tensor]) -> nn.Module:
    """A module with all tensors that no preference changes, and placeholders for those that one does."""
    state, changed = dict(bound.static()), bound.changed
    for spec in bound.layout.tensors:
        base = bound.stack.base[spec.name]
        if spec.role == "routed":
            state[spec.name] = placeholder(base) if spec.name in changed else base
        elif spec.role == "constant" and spec.name not in head:
            state[spec.name] = base.clone()
    state.update({name: tensor.clone() for name, tensor in head.items()})
    constants = {spec.name for spec in bound.layout.with_role("constant")}
    module = materialize(skeleton, state, "the stacked tensors", any_shape=head, constants=constants)
    return module.requires_grad_(False)


def batched_module(
    bound: BoundStack, skeleton: nn.Module, weights: Tensor, *, isolate: bool, head: Mapping[str, Tensor]
) -> nn.Module:
    """A module whose row b is the model of the routing weights weights[b].

    Args:
        bound: the stack.
        skeleton: the module's structure.
        weights: [B, G, P], [B, G + R, P] or [B, G + R + C, P] float32.
        isolate: run the whole model under `torch.vmap`, so that each row is a batch of its own.
        head: an objective's own tensors, which take the place of the base's.

    Returns:
        a module of the skeleton's own class, unless that class itself has routed tensors or `isolate` is set.

    Raises:
        ValueError: a layer cannot be done exactly; the message names it.
    """
    return _Builder(bound, _placed(bound, skeleton, head), RowMix(weights)).build(isolate)
