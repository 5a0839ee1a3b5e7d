"""The layout: which tensors a model has, which routing group each belongs to, and where it sits in flat memory.

Needs no torch: the store and the native merge read it too. Dtypes carry the names of the safetensors format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Role = Literal["routed", "static", "constant"]

ITEM_SIZE: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element of every safetensors dtype that a model may hold."""

MERGED_DTYPES = ("F32", "BF16", "F16")
"""The dtypes that can be merged."""

TILE = 1024
"""Elements per tile of a flat buffer. A tile belongs to one group, so every tensor starts on a tile boundary."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model.

    Attributes:
        name: its name in the state dict.
        shape: its shape, in elements.
        dtype: safetensors dtype of the base tensor, and of the merged one.
        role: "routed" (mixed by its group's routing weights), "static" (mixed by one constant weight for every
            expert) or "constant" (taken from the base untouched: integers, booleans, scalar buffers, heads).
        group: name of its routing group; None unless routed.
        delta_dtype: safetensors dtype of the deltas; equal to `dtype` for constants, which have none.
        aliases: further names of the same tensor (tied weights); stored once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    group: str | None
    delta_dtype: str
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows, as `rows_of` counts them."""
        return rows_of(self.shape)

    @property
    def own_columns(self) -> int:
        """Columns that can have coefficients of their own: a matrix's; none of any other tensor."""
        return self.shape[1] if len(self.shape) == 2 else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the base tensor."""
        return self.numel * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Spans:
    """Where a tensor's coefficients lie on the first axis of routing weights, [G], [G + R] or [G + R + C].

    Attributes:
        group: its group's place, which the weights always have.
        rows: those of its rows, R for all routed tensors; None for a static tensor.
        columns: those of its columns, C for all routed matrices; None for what is no routed matrix.
    """

    group: int
    rows: slice | None = None
    columns: slice | None = None

    def part(self, first: int, last: int) -> Spans:
        """Those of its rows first .. last."""
        rows = None if self.rows is None else slice(self.rows.start + first, self.rows.start + last)
        return Spans(self.group, rows, self.columns)


@dataclass(frozen=True)
class Member:
    """A plane's place in the mixture.

    Attributes:
        plane: its name: the expert's.
        objective: the objective that it belongs to; None where it belongs to none.
        share: what it starts with of its objective's preference, 1 / k for each of k experts; 0 without an objective.
    """

    plane: str
    objective: str | None
    share: float


@dataclass(frozen=True)
class Layout:
    """The tensor table of a stack, with everything about it that is not numbers.

    Attributes:
        objectives: the objectives' names, in the order of every [.., M] axis.
        tensors: every stored tensor, in file order.
        static_weight: the constant weight of an objective's experts in static tensors, shared out among them.
        members: every plane, in the order of every [.., P] axis; none given: an expert for each objective, of its name.
    """

    objectives: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]
    static_weight: float
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        """Fill in the members."""
        if not self.members:
            object.__setattr__(self, "members", one_for_each(self.objectives))

    @property
    def planes(self) -> tuple[str, ...]:
        """The planes' names."""
        return tuple(member.plane for member in self.members)

    @property
    def static_weights(self) -> list[float]:
        """Each plane's weight in static tensors, [P]."""
        return [self.static_weight * member.share for member in self.members]

    def first_expert(self, objective: str) -> str:
        """The first of an objective's planes, whose head the objective has."""
        return next(member.plane for member in self.members if member.objective == objective)

    def free_name(self, name: str) -> str:
        """A name for one more plane: this one, or with the first number behind it that makes it new."""
        found, number = name, 1
        while found in self.planes:
            number += 1
            found = f"{name}{number}"
        return found

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Routing groups in the order of their first tensor; the [G] axis."""
        return tuple(dict.fromkeys(t.group for t in self.tensors if t.group is not None))

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """Every stored tensor by its own name and by its aliases."""
        return {name: spec for spec in self.tensors for name in (spec.name, *spec.aliases)}

    @cached_property
    def group_index(self) -> dict[str, int]:
        """Row of the routing weights [G, P] for each routed tensor, by its stored name."""
        rows = {group: row for row, group in enumerate(self.groups)}
        return {t.name: rows[t.group] for t in self.tensors if t.group is not None}

    @cached_property
    def spans(self) -> dict[str, Spans]:
        """Where each routed tensor's coefficients lie: behind the groups all rows, behind these all columns."""
        spans = {}
        row, column, _ = self.widths
        for spec in self.with_role("routed"):
            rows, columns = slice(row, row + spec.rows), slice(column, column + spec.own_columns)
            spans[spec.name] = Spans(
                self.group_index[spec.name], rows, columns if len(spec.shape) == 2 else None
            )
            row, column = rows.stop, columns.stop
        return spans

    @property
    def row_count(self) -> int:
        """Rows of all routed tensors together: R."""
        return sum(spec.rows for spec in self.with_role("routed"))

    @property
    def column_count(self) -> int:
        """Columns of all routed matrices together: C."""
        return sum(spec.own_columns for spec in self.with_role("routed"))

    @cached_property
    def widths(self) -> tuple[int, int, int]:
        """Lengths of the first axis of routing weights: G, with rows G + R, with columns too G + R + C."""
        with_rows = len(self.groups) + self.row_count
        return len(self.groups), with_rows, with_rows + self.column_count

    def summary(self) -> str:
        """Sizes at a glance."""
        routed = sum(spec.numel for spec in self.with_role("routed"))
        total = sum(spec.numel for spec in self.tensors)
        several = self.planes != self.objectives
        others = f"{len(self.planes)} planes {list(self.planes)}, " if several else ""
        return (
            f"{len(self.objectives)} objectives {list(self.objectives)}, {others}{len(self.groups)} groups, "
            f"{routed:,} of {total:,} parameters routed"
        )

    def with_role(self, *roles: Role) -> tuple[TensorSpec, ...]:
        """The tensors of the given roles, in file order."""
        return tuple(t for t in self.tensors if t.role in roles)


def one_for_each(objectives: Sequence[str]) -> tuple[Member, ...]:
    """An expert for each objective, of its name."""
    return tuple(Member(name, name, 1.0) for name in objectives)


def is_text(name: object) -> bool:
    """Whether this can be a name in a manifest: a text without halves of surrogate pairs, which UTF-8 cannot hold."""
    return isinstance(name, str) and not any("\ud800" <= character <= "\udfff" for character in name)


def rows_of(shape: Sequence[int]) -> int:
    """Rows of a tensor: the size of its first dimension; one row for scalars and vectors."""
    return shape[0] if len(shape) > 1 else 1


def columns_of(shape: Sequence[int]) -> int:
    """Elements of a row."""
    return math.prod(shape[1:] if len(shape) > 1 else shape)


def place(lengths: Sequence[int], tile: int = TILE) -> tuple[list[int], int]:
    """Offsets (in elements) of tensors laid one after the other, each on a tile boundary, and the total length."""
    offsets, end = [], 0
    for length in lengths:
        offsets.append(end)
        end += -(-length // tile) * tile
    return offsets, end


def tile_groups(lengths: Sequence[int], groups: Sequence[int], tile: int = TILE) -> list[int]:
    """The group of each tile of the flat buffer that `place` describes: a list of length total / tile."""
    return [g for length, g in zip(lengths, groups, strict=True) for _ in range(-(-length // tile))]
