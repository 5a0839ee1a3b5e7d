"""Keys and values of rows that join and leave between steps, in transformers' own cache interface.

All rows end at the same column, so that a step writes one column for all of them:

    row 0   . . . k k k k k|        start 3
    row 1   k k k k k k k k|        start 0, end 8
    row 2   . . . . . . k k|        start 6
            columns before a row's start are zero and masked; after `end` there is room to grow

Rows that share a step are neighbours, and their window is a view: nothing is copied for a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

ROOM = 64
"""Columns to grow into, at least, whenever the memory is laid out anew."""


class RowCache:
    """The cache of B rows; every layer has keys [B, heads, columns, size] and values alike."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.starts: list[int] = []
        self.end = 0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def longest(self) -> int:
        """Columns of the longest row."""
        return self.end - min(self.starts, default=self.end)

    def arrange(self, order: Sequence[int]) -> None:
        """Keep these rows only, in this order."""
        if list(order) != list(range(len(self))):
            self._lay_out(order, [], 0)

    def join(self, prefilled: DynamicCache, lengths: Sequence[int]) -> None:
        """Add rows at the end, from a left-padded prefill in which row i has lengths[i] columns of its own."""
        new: list[tuple[Tensor, Tensor]] = []
        for layer in prefilled.layers:
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                raise ValueError(
                    f"got a model whose cache has a layer of {type(layer).__name__}, expected keys and values for each "
                    "token (DynamicLayer); serve such a model by a function of your own (predict=)"
                )
            new.append((layer.keys, layer.values))
        self._lay_out(range(len(self)), new, max(lengths), lengths)

    def window(self, first: int, last: int) -> tuple[Window, int]:
        """What rows first .. last see in a step, and the first column of it."""
        start = min(self.starts[first:last])
        if self._layers and self.end == self._layers[0][0].shape[2]:
            self._lay_out(range(len(self)), [], 0)
            start = min(self.starts[first:last])
        return Window(self._layers, first, last, start, self.end), start

    def advance(self) -> None:
        """Every row has written its column."""
        self.end += 1

    def _lay_out(
        self,
        order: Sequence[int],
        new: Sequence[tuple[Tensor, Tensor]],
        added: int,
        lengths: Sequence[int] = (),
    ) -> None:
        """Copy rows in an order, and new ones after them, into fresh memory with room to grow."""
        own = [self.end - self.starts[row] for row in order]
        sizes = [*own, *lengths]
        end = max(sizes, default=0)
        capacity = end + max(ROOM, end // 2)
        layers: list[tuple[Tensor, Tensor]] = []
        for number in range(max(len(self._layers), len(new))):
            made = []
            for part in (0, 1):
                like = new[number][part] if new else self._layers[number][part]
                fresh = like.new_zeros(len(sizes), like.shape[1], capacity, like.shape[3])
                for to, (row, size) in enumerate(zip(order, own, strict=True)):
                    fresh[to, :, end - size : end] = self._layers[number][part][
                        row, :, self.end - size : self.end
                    ]
                for i, size in enumerate(lengths):
                    fresh[len(own) + i, :, end - size : end] = new[number][part][i, :, added - size : added]
                made.append(fresh)
            layers.append((made[0], made[1]))
        self._layers, self.starts, self.end = layers, [end - size for size in sizes], end


class Window(Cache):  # type: ignore[misc]
    """A view of rows first .. last and columns start .. end, as a forward takes it; a step writes column end."""

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], first: int, last: int, start: int, end: int
    ) -> None:
        super().__init__(layers=[_WindowLayer(k[first:last], v[first:last], start, end) for k, v in layers])


class _WindowLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a window."""

    def __init__(self, keys: Tensor, values: Tensor, start: int, end: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.device, self.dtype = keys.device, keys.dtype
        self._start, self._end = start, end
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column [b, heads, 1, size] and give all of them, [b, heads, columns, size]."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self._end : self._end + 1] = key_states
        self.values[:, :, self._end : self._end + 1] = value_states
        seen = slice(self._start, self._end + 1)
        return self.keys[:, :, seen], self.values[:, :, seen]

    def get_seq_length(self) -> int:
        """Columns before this step's."""
        return self._end - self._start


def mask_of(starts: Sequence[int], start: int, end: int, device: torch.device) -> Tensor | None:
    """[b, end - start] of 1, and 0 before each row's start; None where there is nothing to mask."""
    if all(own == start for own in starts):
        return None
    columns = torch.arange(start, end, device=device)
    return (columns >= torch.tensor(starts, device=device).unsqueeze(1)).long()
