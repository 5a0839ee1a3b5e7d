"""Layers that mix their weight for each row of a batch, and the routing weights that they read.

Products and look-ups are linear in their weight: they read base, dense deltas and low-rank factors where they lie (int8
and int4 planes are decoded once) and mix the results, so that no row's weight is ever stored. `module.py` puts these
layers into a model. All of it may run in many threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import local
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretofuse.engine.layout import Spans
from paretofuse.engine.merging.flat import Deltas
from paretofuse.engine.modules.routed.low_rank import SideBySide, weighted
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.routing.weights import coefficients
from paretofuse.engine.stacking.stack import lasting
from paretofuse.kernels.few_rows import product
from paretofuse.kernels.reference import spread
from paretofuse.kernels.routed_rows import routed_rows


def placeholder(like: Tensor) -> Tensor:
    """NaN in a tensor's shape, dtype and device, without its memory; zeros where there is no NaN."""
    value = float("nan") if like.is_floating_point() else 0
    return torch.full((), value, dtype=like.dtype, device=like.device).expand(like.shape)


class RowMix:
    """The routing weights of a batch, a set for each row; inside `PerRow`, of one row.

    Args:
        weights: [B, G, P], with coefficients of rows [B, G + R, P], of columns too [B, G + R + C, P], float32.
            Gradients of backward passes are carried on into its graph, of any number of passes.
    """

    def __init__(self, weights: Tensor) -> None:
        self._all = weights.detach().transpose(0, 1).contiguous()  # [G or more, B, E]
        self._inside = local()  # what `only` says, in each thread
        self.mixed: dict[str, Tensor] = {}
        if weights.requires_grad:

            def carry(leaf: Tensor) -> None:
                gradient, leaf.grad = leaf.grad, None
                if gradient is not None:
                    torch.autograd.backward([weights], [gradient.transpose(0, 1)], retain_graph=True)

            self._all.requires_grad_(True)
            self._all.register_post_accumulate_grad_hook(carry)

    @property
    def weights(self) -> Tensor:
        """[G, B, E], or with those of rows and columns behind; inside `PerRow` 1 is for B."""
        row: Tensor | None = getattr(self._inside, "weights", None)
        return self._all if row is None else row

    @property
    def count(self) -> int:
        """B, or 1 inside `PerRow`."""
        return self.weights.shape[1]

    @property
    def may_keep(self) -> bool:
        """Whether what is mixed now may serve the next forward pass too."""
        outside = self.weights is self._all
        return outside and not (torch.is_grad_enabled() and self._all.requires_grad)

    @contextmanager
    def only(self, weights: Tensor) -> Iterator[None]:
        """Inside, the layers mix by one row's weights, [G, P] or more, in this thread."""
        outer = getattr(self._inside, "weights", None)
        self._inside.weights = weights.unsqueeze(1)
        try:
            yield
        finally:
            self._inside.weights = outer

    def of(self, spans: Spans, device: torch.device) -> Tensor:
        """A tensor's coefficients, [B, E], contiguous, [B, E, rows] or [B, E, rows + columns]; see `coefficients`."""
        return coefficients(self.weights.transpose(0, 1), spans).to(device)

    def batch(self, x: Tensor, layer: str) -> Tensor:
        """A layer's input with a row for each preference; one row is meant for all, as position ids are.

        Raises:
            ValueError: it has another number of rows.
        """
        if x.dim() >= 2 and x.shape[0] == self.count:
            return x
        if x.dim() >= 2 and x.shape[0] == 1:
            return x.expand(self.count, *x.shape[1:])
        raise ValueError(
            f"layer {layer!r}: got an input of shape {list(x.shape)}, expected {self.count} rows first, one for each "
            "preference, and at least one dimension more; give engine.batched as many preferences as rows, or pass "
            "isolate=True if the model reshapes its batch"
        )


@dataclass(frozen=True)
class RowTensor:
    """A small tensor, mixed for each row when called: [B, *shape] in the base's dtype.

    Attributes:
        name: its own.
        base: [*shape].
        planes: of shape [*shape]; None for a tensor that no preference changes, whose rows are all `base`.
        spans: where its coefficients lie in the routing weights.
        mix: the weights.
    """

    name: str
    base: Tensor
    planes: Deltas | None
    spans: Spans
    mix: RowMix

    def __call__(self) -> Tensor:
        """Mix, or give what was mixed before where no gradient is wanted."""
        if self.planes is None:
            return self.base.expand(self.mix.count, *self.base.shape)
        if not self.mix.may_keep:
            return self._mixed()
        if self.name not in self.mix.mixed:
            with lasting():
                self.mix.mixed[self.name] = self._mixed()
        return self.mix.mixed[self.name]

    def parts(self) -> Iterator[tuple[Tensor, Tensor | LowRank]]:
        """For each plane that changes the tensor, its weights [B], [B, rows (+ columns)] and itself, of [*shape]."""
        if self.planes is not None:
            weights = self.mix.of(self.spans, self.base.device).unbind(1)
            yield from (
                (w, delta) for w, delta in zip(weights, self.planes, strict=True) if delta is not None
            )

    def _mixed(self) -> Tensor:
        mixed = self.base.float().unsqueeze(0)
        for weight, delta in self.parts():
            shape = self.base.shape
            own = weight.view(-1, *[1] * len(shape)) if weight.dim() == 1 else spread(weight, shape)
            mixed = mixed + own * _dense(delta).float()
        return mixed.to(self.base.dtype)


@dataclass(frozen=True)
class RowsWeight:
    """A weight [O, I] with its bias, mixed for each row on the way into the product.

    Attributes:
        layer: where it belongs, for messages.
        base: [O, I].
        planes: dense ones, each [O, I], in the base's layout; None for a weight that no preference changes.
        low_rank: the others.
        spans: where its coefficients lie in the routing weights.
        transposed: whether its rows are the I inputs, as in transformers' Conv1D, rather than the O outputs.
        bias: gives [B, O], or None.
        mix: the weights.
    """

    layer: str
    base: Tensor
    planes: Tensor | Sequence[Tensor | None] | None
    low_rank: SideBySide | None
    spans: Spans
    transposed: bool
    bias: Callable[[], Tensor] | None
    mix: RowMix

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, ..., I] -> [B, ..., O]; with one preference any number of rows is its own. The bias is the weight's."""
        one = self.mix.count == 1
        x = x.unsqueeze(0) if one else self.mix.batch(x, self.layer)
        own = None if self.bias is None else self.bias()
        if self.planes is None:
            y = F.linear(x, self.base)
            y = y if own is None else y + own.view(len(own), *[1] * (y.dim() - 2), -1).to(y.dtype)
        else:
            weights = self.mix.of(self.spans, x.device)
            if isinstance(self.planes, Tensor) and weights.dim() == 2:
                y = routed_rows(x, self.base, self.planes, weights, own)
            else:
                y = self._apart(x, self.planes, weights, own)
        return y.squeeze(0) if one else y

    def _apart(
        self, x: Tensor, planes: Tensor | Sequence[Tensor | None], weights: Tensor, bias: Tensor | None
    ) -> Tensor:
        """By PyTorch, product by product: from planes that lie apart, or with coefficients of rows and columns.

        The products are computed in x's dtype and mixed in float32.

        Args:
            x: [B, ..., I].
            planes: see above.
            weights: [B, E], [B, E, rows] or [B, E, rows + columns].
            bias: [B, O] or None.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(len(x), -1, x.shape[-1])  # [B, P, I]
        y = product(rows, self.base).float()
        stored = self.base.shape[1 if self.transposed else 0]
        for weight, delta in zip(weights.unbind(1), planes, strict=True):
            if delta is not None:
                y = y + weighted(rows, weight, stored, self.transposed, [delta])
        if self.low_rank is not None:
            y = y + self.low_rank.product(rows, weights, self.transposed)
        if bias is not None:
            y = y + bias.unsqueeze(1).float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def part(self, first: int, last: int) -> RowsWeight:
        """The weight and bias of outputs first .. last, as a view; not of a transposed weight."""
        bias, planes = self.bias, self.planes
        if isinstance(planes, Tensor):
            planes = planes[:, first:last]
        elif planes is not None:
            planes = [None if delta is None else delta[first:last] for delta in planes]
        return RowsWeight(
            self.layer, self.base[first:last], planes,
            None if self.low_rank is None else self.low_rank.part(first, last),
            self.spans.part(first, last), False,
            None if bias is None else lambda: bias()[:, first:last], self.mix,
        )  # fmt: skip

    def dense(self) -> Tensor:
        """There is no one weight: NaN, of the weight's shape and dtype."""
        return placeholder(self.base)


class RowEmbedding(nn.Module):
    """`nn.Embedding` that looks up base and deltas and mixes what it found.

    Args:
        layer: its name, for messages.
        mixed: the weight [V, D], which is never mixed as a whole.
    """

    def __init__(self, layer: str, mixed: RowTensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = mixed.base.shape
        self.layer, self.mixed = layer, mixed

    @property
    def weight(self) -> Tensor:
        """There is no one weight: NaN, of the weight's shape and dtype."""
        return placeholder(self.mixed.base)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, ...] -> [B, ..., D]."""
        mixed = self.mixed
        if mixed.mix.count > 1:
            ids = mixed.mix.batch(ids, self.layer)
        found = F.embedding(ids, mixed.base).float()
        for weight, delta in mixed.parts():
            if weight.dim() == 2:  # [B, V] each id's own, and maybe [B, D] each feature's
                one = mixed.mix.count == 1
                own = weight[0][ids] if one else weight.gather(1, ids.flatten(1)).view(ids.shape)
                own = own.unsqueeze(-1)
                features = weight[:, self.num_embeddings :]
                if features.shape[1]:
                    own = own + (features[0] if one else features.view(len(ids), *[1] * (ids.dim() - 1), -1))
            else:
                own = weight.view(-1, *[1] * ids.dim())
            if isinstance(delta, LowRank):
                found = found + own * (F.embedding(ids, delta.b).float() @ delta.a.float())
            else:
                found = found + own * F.embedding(ids, delta).float()
        return found.to(mixed.base.dtype).view(*ids.shape, -1)


class RowConv(nn.Module):
    """A convolution with base and with each delta, mixed afterwards.

    Args:
        conv: what it replaces, for its stride, padding and the like.
        layer: its name, for messages.
        mixed: the weight [O, I, ...], which is never mixed as a whole.
        bias: [O], or None.
    """

    def __init__(self, conv: Any, layer: str, mixed: RowTensor, bias: RowTensor | None) -> None:
        super().__init__()
        self.conv, self.layer, self.mixed, self.row_bias = conv, layer, mixed, bias

    @property
    def weight(self) -> Tensor:
        """There is no one weight: NaN, of the weight's shape and dtype."""
        return placeholder(self.mixed.base)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, ...] -> [B, O, ...]."""
        mixed = self.mixed
        if mixed.mix.count > 1:
            x = mixed.mix.batch(x, self.layer)
        space = [1] * (mixed.base.dim() - 2)
        first = self.conv._conv_forward(x, mixed.base, None)
        y = first.float()
        for weight, delta in mixed.parts():
            part = self.conv._conv_forward(x, _dense(delta).to(mixed.base.dtype), None)
            y = y + weight.reshape(len(weight), -1, *space) * part.float()
        if self.row_bias is not None:
            y = y + self.row_bias().float().view(mixed.mix.count, -1, *space)
        return cast(Tensor, y.to(first.dtype))


def _dense(delta: Tensor | LowRank) -> Tensor:
    """A plane of a tensor that no thin product serves, decoded for this pass."""
    return delta.decode() if isinstance(delta, LowRank) else delta
