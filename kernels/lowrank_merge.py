"""The merge of planes of low rank: matrices whose planes are factors, for K preferences, in one launch for all of them.

    out[k, o, i] = base[o, i] + sum_r w(o, plane(r)) * B[o, r] * A[r, i] + sum_d w(o, plane(d)) * D_d[o, i]
    w(o, p) = weights[k, group, p] + weights[k, row(o), p]

    base [O, I]   B [O, R]   A [R, I], the factors of all planes side by side   D_d [O, I], dense planes beside them
    weights [K, G, P], or [K, G + rows, P]   out [K, M], with each matrix somewhere in it

No plane of low rank is ever made dense. A program takes a tile [BLOCK_O, BLOCK_I] of one matrix, reads its base once,
and adds the products of slices of B and A and the dense planes' tiles for each preference, in float32; the result is
rounded once. Tables say which tile is whose, and where dense planes lie. Where the device has no matrix instruction for
float32 (NVIDIA), each factor is split into two TF32 numbers, which three products multiply to about float32's own
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from paretofuse.kernels import checks
from paretofuse.kernels.launch import Launch
from paretofuse.kernels.numeric import dot, round_to
from paretofuse.kernels.triton_or_none import interpreted, jit, require, tl

INSTEAD = "paretofuse.kernels.reference.merge_tensor_reference"

BLOCK_O, BLOCK_I, RANKS = 64, 64, 16
"""The tile of a matrix, and how much of the rank is multiplied at a time: what tensor cores take at least."""

WARPS, MANY_WARPS, STAGES = 4, 8, 1
"""With twice the tile, or with loads of factors ahead, registers leave no room for a second program. Many warps where
four would spill: for row coefficients over a float32 base (sm_100), for float32 factors over a half one (sm_80)."""

FIELDS = 12
"""Of a matrix in the table, int64: distance of its base from the first one and place of its output, in elements; places
of its B and A among the factors and of its ranks; O, I, R; its group, and the row of its first row's weights; the place
of its first dense plane among those, and their number."""


@partial(jit, any_value=("preferences", "width", "planes"))
def lowrank_merge_kernel(
    factors: tl.tensor,
    base: tl.tensor,
    dense: tl.tensor,
    plane_of: tl.tensor,
    weights: tl.tensor,
    matrices: tl.tensor,
    tiles: tl.tensor,
    dense_planes: tl.tensor,
    out: tl.tensor,
    preferences: tl.tensor,
    width: tl.tensor,
    planes: tl.tensor,
    out_stride: tl.tensor,
    FIELDS: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (tiles,). tiles [tiles, 3] int32: a matrix, and where in it the tile begins. R is a multiple of RANKS.

    dense_planes [planes, 2] int64: a plane's number, and its distance from the first one, in elements.
    """
    place = tiles + tl.program_id(0) * 3
    matrix = matrices + tl.load(place).to(tl.int64) * FIELDS
    o = tl.load(place + 1) + tl.arange(0, BO)  # [BO]
    i = tl.multiple_of(tl.load(place + 2), BI) + tl.arange(0, BI)  # [BI]
    distance, to = tl.load(matrix), tl.load(matrix + 1)
    b, a = factors + tl.load(matrix + 2), factors + tl.load(matrix + 3)
    owners = plane_of + tl.load(matrix + 4)
    outs, ins, ranks = tl.load(matrix + 5), tl.load(matrix + 6), tl.load(matrix + 7)
    group, row = tl.load(matrix + 8), tl.load(matrix + 9)
    if ALIGNED:
        distance, to, ins = tl.multiple_of(distance, 16), tl.multiple_of(to, 16), tl.multiple_of(ins, 16)
        b, a = tl.multiple_of(b, 16), tl.multiple_of(a, 16)
    ranks = tl.multiple_of(ranks, RANKS)
    inside = (o < outs)[:, None] & (i < ins)[None, :]
    at = o[:, None] * ins + i[None, :]  # [BO, BI] int64
    pristine = tl.load(base + distance + at, mask=inside, other=0.0)
    for k in range(0, preferences):
        own = weights + tl.cast(k, tl.int64) * width * planes
        total = pristine.to(tl.float32)
        for first in range(0, ranks, RANKS):
            r = first + tl.arange(0, RANKS)  # [RANKS]
            p = tl.load(owners + r)
            w = tl.load(own + group * planes + p)[None, :]  # [1, RANKS]
            if ROWS:
                by_row = own + (row + o[:, None]) * planes + p[None, :]
                w += tl.load(by_row, mask=(o < outs)[:, None] & (row >= 0), other=0.0)  # [BO, RANKS]
            left = tl.load(b + o[:, None] * ranks + r[None, :], mask=(o < outs)[:, None], other=0.0)
            right = tl.load(a + r[:, None] * ins + i[None, :], mask=(i < ins)[None, :], other=0.0)
            scaled = left.to(tl.float32) * w  # [BO, RANKS]
            total = dot(scaled, right.to(tl.float32), total, PRECISION, INTERPRETED)
        if DENSE:
            entry = dense_planes + tl.load(matrix + 10) * 2
            for _ in range(0, tl.load(matrix + 11)):
                d, apart = tl.load(entry), tl.load(entry + 1)
                if ALIGNED:
                    apart = tl.multiple_of(apart, 16)
                share = tl.load(own + group * planes + d)
                if ROWS:
                    by_rows = own + (row + o[:, None]) * planes + d
                    share += tl.load(by_rows, mask=(o < outs)[:, None] & (row >= 0), other=0.0)  # [BO, 1]
                total += share * tl.load(dense + apart + at, mask=inside, other=0.0).to(tl.float32)
                entry += 2
        rounded = round_to(total, out.dtype.element_ty, INTERPRETED)
        tl.store(out + tl.cast(k, tl.int64) * out_stride + to + at, rounded, mask=inside)


@dataclass(frozen=True)
class Matrix:
    """One tensor to merge.

    Attributes:
        base: [O, I], contiguous.
        planes: of each of low rank that changes it: its number, B [O, r] and A [r, I].
        offset: of its output in out[k].
        group: its row of the weights.
        first_row: where its first row's own coefficients lie in the weights; negative: it has none.
        dense: of each other plane that changes it: its number, and D [O, I], contiguous.
    """

    base: Tensor
    planes: Sequence[tuple[int, Tensor, Tensor]]
    offset: int
    group: int
    first_row: int
    dense: Sequence[tuple[int, Tensor]] = ()


class Factors:
    """The factors of many matrices side by side: of each B [O, R] and A [R, I], R filled up with zeros.

    In the dtype of all of them, or float32 where they have several.

    Attributes:
        values: all of them, flat.
        plane_of: int32, the plane of each of R ranks, matrix by matrix.
        places: of each matrix B, A and the ranks in them, and R.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.places: list[tuple[int, int, int, int]] = []
        owners: list[int] = []
        end = 0
        for matrix in matrices:
            ranks = [(j, len(a)) for j, _, a in matrix.planes]
            size = -(-sum(rank for _, rank in ranks) // RANKS) * RANKS
            outs, ins = matrix.base.shape
            self.places.append((end, end + outs * size, len(owners), size))
            end += -(-(outs + ins) * size // RANKS) * RANKS
            own = [j for j, rank in ranks for _ in range(rank)]
            owners += own + [0] * (size - len(own))
        device = matrices[0].base.device
        dtypes = {factor.dtype for matrix in matrices for _, b, a in matrix.planes for factor in (b, a)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self.values = torch.zeros(end, dtype=dtype, device=device)
        self.plane_of = torch.tensor(owners, dtype=torch.int32, device=device)
        self._changing: list[tuple[Tensor, Tensor]] = []
        for matrix, (b_at, a_at, _, size) in zip(matrices, self.places, strict=True):
            outs, ins = matrix.base.shape
            b_all = self.values[b_at : b_at + outs * size].view(outs, size)
            a_all = self.values[a_at : a_at + ins * size].view(size, ins)
            first = 0
            for _, b, a in matrix.planes:
                last = first + len(a)
                pairs = ((b_all[:, first:last], b.detach()), (a_all[first:last], a.detach()))
                for mine, given in pairs:
                    mine.copy_(given)
                if b.requires_grad:
                    self._changing += pairs
                first = last

    def refresh(self) -> None:
        """Read those again that want a gradient: they are being trained."""
        for mine, given in self._changing:
            mine.copy_(given)


def lowrank_merge_launch(
    matrices: Sequence[Matrix], factors: Factors, weights: Tensor, out: Tensor, by_row: bool, precision: str
) -> Launch:
    """One launch on `out` [K, M]; all arguments already checked, the weights [K, G, P] contiguous.

    Args:
        matrices: bases of one dtype, and dense planes of one.
        factors: of them.
        weights, out: as above.
        by_row: whether rows have coefficients.
        precision: "tf32x3", or "ieee" where matrix instructions multiply float32 as it is.
    """
    first = matrices[0].base
    dense = [plane for matrix in matrices for _, plane in matrix.dense]
    nearest = dense[0] if dense else first
    entries: list[tuple[int, int]] = []
    rows, tiles = [], [torch.empty(0, 3, dtype=torch.int64)]
    for number, (matrix, (b_at, a_at, ranks_at, size)) in enumerate(
        zip(matrices, factors.places, strict=True)
    ):
        outs, ins = matrix.base.shape
        rows.append(
            (
                _apart(matrix.base, first), matrix.offset, b_at, a_at, ranks_at, outs, ins, size, matrix.group,
                matrix.first_row, len(entries), len(matrix.dense),
            )
        )  # fmt: skip
        entries += [(j, _apart(plane, nearest)) for j, plane in matrix.dense]
        starts = torch.arange(0, outs, BLOCK_O), torch.arange(0, ins, BLOCK_I)
        tiles.append(torch.cartesian_prod(torch.tensor([number]), *starts))
    aligned = all(n % 16 == 0 for row in rows for n in (row[0], row[1], row[3], row[6]))
    aligned = aligned and all(distance % 16 == 0 for _, distance in entries)
    wide = first.dtype == torch.float32
    many = by_row if wide else factors.values.dtype == torch.float32
    k, width, planes = weights.shape
    table = torch.cat(tiles).to(out.device, torch.int32)
    return Launch(
        lowrank_merge_kernel,
        (len(table) if k else 0,),
        (
            factors.values, first, nearest, factors.plane_of, weights,
            torch.tensor(rows, dtype=torch.int64, device=out.device), table,
            torch.tensor(entries or [(0, 0)], dtype=torch.int64, device=out.device), out, k, width, planes,
            out.stride(0),
        ),
        {
            "FIELDS": FIELDS, "BO": BLOCK_O, "BI": BLOCK_I, "RANKS": RANKS, "ROWS": by_row,
            "DENSE": bool(dense), "ALIGNED": aligned,
            "PRECISION": precision, "INTERPRETED": interpreted(lowrank_merge_kernel),
            "num_warps": MANY_WARPS if many else WARPS, "num_stages": STAGES,
        },
    )  # fmt: skip


def _apart(tensor: Tensor, first: Tensor) -> int:
    """How many elements one tensor lies behind another of its dtype."""
    return (tensor.data_ptr() - first.data_ptr()) // first.element_size()


def bind_lowrank_merge(
    matrices: Sequence[Matrix], factors: Factors, weights: Tensor, out: Tensor, *, by_row: bool = False
) -> Callable[[], None]:
    """Bind a merge into `out` [K, M], over and over: the weights are rewritten where they lie in between.

    Factors that want a gradient are copied again at each call. The rest is checked here, once; a call then costs the
    host no more than the launch. It is no operator of torch: nothing tells autograd that `out` was written to.

    Args:
        matrices: at least one; bases of one dtype (float32, bfloat16 or float16) on one device, and dense planes of
            one of these dtypes.
        factors: `Factors` of these matrices, which merges of several shapes may share.
        weights: [K, G, P] float32, contiguous; with row coefficients [K, G + rows, P]. Groups, rows and planes of the
            matrices must be in range: they are read on the device only, and not checked.
        out: [K, M] of one of those dtypes, rows contiguous; it must overlap no input.
        by_row: whether the rows' own coefficients are read.

    Raises:
        ImportError: Triton is not installed.
        TypeError, ValueError: a dtype, shape, stride or device does not fit, an output ends outside of `out`, or the
            tensors are on the CPU outside Triton's interpreter.
    """
    if not matrices:
        raise ValueError("matrices: got none, expected at least one; there is nothing to merge")
    first = matrices[0].base
    require(lowrank_merge_kernel, first.device.type, INSTEAD)
    kinds = {plane.dtype for matrix in matrices for _, plane in matrix.dense}
    if len(kinds) > 1:
        raise TypeError(f"dense: got {sorted(map(str, kinds))}, expected one dtype; bind a merge for each")
    for matrix in matrices:
        _check(matrix, first, out.shape[-1])
    checks.check_tensor("weights", weights, (torch.float32,), (len(out), *weights.shape[1:]), first.device)
    checks.check_contiguous("weights", weights)
    checks.check_tensor("out", out, checks.FLOATS, tuple(out.shape), first.device)
    checks.check_rows("out", out)
    precision = "ieee" if torch.version.hip else "tf32x3"
    launch = lowrank_merge_launch(matrices, factors, weights, out, by_row, precision).repeated()

    def merge(_keep_alive: object = matrices) -> None:
        factors.refresh()
        launch()

    return merge


def _check(matrix: Matrix, first: Tensor, length: int) -> None:
    """Raise TypeError or ValueError unless a matrix fits the first base and outputs of so many elements."""
    base = matrix.base
    if base.ndim != 2:
        raise ValueError(
            f"base: got shape {tuple(base.shape)}, expected [O, I]; flatten all but the first dimension"
        )
    checks.check_tensor("base", base, checks.FLOATS, tuple(base.shape), first.device)
    if base.dtype != first.dtype:
        raise TypeError(
            f"base: got {base.dtype} beside {first.dtype}, expected one dtype; bind a merge for each"
        )
    checks.check_contiguous("base", base)
    if not 0 <= matrix.offset <= length - base.numel():
        raise ValueError(
            f"offset: got {matrix.offset} for {base.numel()} elements, expected them within the {length} of out"
        )
    for _, b, a in matrix.planes:
        rank = a.shape[0] if a.ndim else 0
        checks.check_tensor("B", b, checks.FLOATS, (base.shape[0], rank), first.device)
        checks.check_tensor("A", a, checks.FLOATS, (rank, base.shape[1]), first.device)
    for _, plane in matrix.dense:
        checks.check_tensor("dense", plane, checks.FLOATS, tuple(base.shape), first.device)
        checks.check_contiguous("dense", plane)
