"""Merging: one contract, three makers.

    out[k][p] = base[p] + sum_j weights[k, row(p), j] * plane[j][p]        weights [K, G, P] float32

A merger is bound to its base, planes and outputs once and called with weights as often as one likes: the routing
weights for routed tensors, behind which the coefficients of rows and columns may follow (`Routers`), the one row of the
static weight for static ones. It always starts from the pristine base. "reference" is plain PyTorch (the truth),
"native" the C++ core (CPU), "triton" one launch for each flat buffer (CUDA and ROCm). The maker is chosen by device or
by name, never by a silent fallback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_NAME, TO_TORCH
from paretofuse.engine.layout import TILE, Layout, Spans, TensorSpec, columns_of
from paretofuse.engine.merging.flat import FlatInputs, FlatOutputs
from paretofuse.engine.merging.native import MergePlan
from paretofuse.engine.planes.plane import memories, merged_tensor
from paretofuse.engine.routing.weights import coefficients, sent
from paretofuse.engine.stacking.stack import Stack
from paretofuse.kernels.routed_merge import SMALLEST_SHARED, bind_merge

Merger = Callable[[Tensor], None]
"""Takes weights float32 [K, G, P], [K, G + R, P] or [K, G + R + C, P], wherever they lie, and rewrites its outputs."""

MergerMaker = Callable[
    [Sequence[TensorSpec], Mapping[str, int], Stack, Sequence[Mapping[str, Tensor]]], Merger
]
"""Binds a merge: tensors, each one's row of the weights, base and planes, outputs."""

BACKENDS = ("reference", "native", "triton")


def choose_backend(device: torch.device, backend: str | None) -> str:
    """The backend's name: the given one where it can work on this device, else the device's own.

    Raises:
        ValueError: no such backend, or it cannot work there.
    """
    if backend is None:
        return {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
    if backend not in BACKENDS:
        raise ValueError(f"got backend={backend!r}, expected one of {list(BACKENDS)} or None")
    if backend == "native" and device.type != "cpu":
        raise ValueError(
            f'got backend="native" with tensors on {device}; it works on the CPU only, use "triton"'
        )
    return backend


def separate_outputs(
    specs: Sequence[TensorSpec], count: int, places: Mapping[str, torch.device]
) -> list[dict[str, Tensor]]:
    """Outputs of K merges, each tensor with its own storage on its device."""
    return [
        {
            spec.name: torch.empty(spec.shape, dtype=TO_TORCH[spec.dtype], device=places[spec.name])
            for spec in specs
        }
        for _ in range(count)
    ]


def reference_merger(
    specs: Sequence[TensorSpec], rows: Mapping[str, int], stack: Stack, out: Sequence[Mapping[str, Tensor]]
) -> Merger:
    """Bind a merge by PyTorch, tensor by tensor, on whatever device they are.

    Args:
        specs: the tensors to merge.
        rows: the row of the weights that each tensor takes; of all that take some, so that it tells G.
        stack: base and deltas.
        out: for each preference, the tensors to write, by name.
    """
    device = out[0][specs[0].name].device if specs else None

    def merge(weights: Tensor) -> None:
        weights = weights if device is None else sent(weights, device)
        for spec in specs:
            planes = [own.get(spec.name) for own in stack.planes]
            for k, tensors in enumerate(out):
                own = coefficients(weights[k], stack.layout.spans.get(spec.name, Spans(0)))
                tensors[spec.name].copy_(
                    merged_tensor(stack.base[spec.name], planes, own, TO_TORCH[spec.dtype])
                )

    return merge


def native_merger(
    specs: Sequence[TensorSpec], rows: Mapping[str, int], stack: Stack, out: Sequence[Mapping[str, Tensor]]
) -> Merger:
    """Bind a merge by the C++ core: one pass over the memory of all tensors, which may be mapped from files.

    Args: as `reference_merger`'s.
    """

    groups, none = len(set(rows.values())), slice(0)
    spans = [stack.layout.spans.get(spec.name, Spans(0)) if spec.numel else Spans(0) for spec in specs]
    row_spans, column_spans = [own.rows or none for own in spans], [own.columns or none for own in spans]
    plan = MergePlan(
        base=[stack.base[spec.name].data_ptr() for spec in specs],
        planes=[memories([own.get(spec.name) for own in stack.planes]) for spec in specs],
        lengths=[spec.numel for spec in specs],
        rows=[rows[spec.name] for spec in specs],
        columns=[columns_of(spec.shape) for spec in specs],
        base_dtypes=[spec.dtype for spec in specs],
        out_dtypes=[TO_NAME[out[0][spec.name].dtype] for spec in specs],
        plane_count=len(stack.planes),
        row_count=groups,
    )
    addresses = np.array([[t[spec.name].data_ptr() for spec in specs] for t in out], dtype=np.uint64)

    def merge(weights: Tensor, _keep_alive: object = (stack, out)) -> None:
        weights = weights.cpu()
        by_row = _coefficients(weights, row_spans if weights.shape[1] > groups else [])
        by_column = _coefficients(weights, column_spans if weights.shape[1] > stack.layout.widths[1] else [])
        plan.run(
            weights[:, :groups].contiguous().numpy(),
            addresses,
            row_weights=_addresses(by_row),
            column_weights=_addresses(by_column),
            threads=torch.get_num_threads(),
        )

    return merge


def _coefficients(weights: Tensor, spans: Sequence[slice]) -> list[list[Tensor]]:
    """Of each preference and tensor those of its rows or columns, [P, count], as the core reads them."""
    return [[w[span].T.contiguous() for span in spans] for w in weights]


def _addresses(tensors: Sequence[Sequence[Tensor]]) -> np.ndarray | None:
    """Where they lie; None where there are none."""
    table = np.array([[t.data_ptr() for t in row] for row in tensors], np.uint64)
    return table if table.size else None


def frugal_merger(
    specs: Sequence[TensorSpec], rows: Mapping[str, int], stack: Stack, out: Sequence[Mapping[str, Tensor]]
) -> Merger:
    """Like `native_merger`, tensor by tensor: each one's mapped pages go before the next one's come."""
    mergers = [(spec.name, native_merger([spec], rows, stack, out)) for spec in specs]

    def merge(weights: Tensor) -> None:
        for name, merge_one in mergers:
            merge_one(weights)
            stack.release([name])

    return merge


def by_shape(bind: Callable[[torch.Size], Merger]) -> Merger:
    """A merge that is bound for each shape of weights when the first ones of that shape come."""
    bound: dict[torch.Size, Merger] = {}

    def merge(weights: Tensor) -> None:
        if weights.shape not in bound:
            bound[weights.shape] = bind(weights.shape)
        bound[weights.shape](weights)

    return merge


def triton_merger(
    inputs: Sequence[FlatInputs],
    out: FlatOutputs,
    specs: Sequence[TensorSpec],
    rows: Mapping[str, int],
    layout: Layout,
) -> Merger:
    """Bind a merge by the Triton kernel: one launch for each flat buffer, whichever of its tensors are wanted.

    Args:
        inputs: the flat buffers.
        out: outputs of exactly these tensors, or of whole buckets.
        specs: the tensors to merge.
        rows: as `reference_merger`'s.
        layout: the tensor table, which tells where row coefficients lie.
    """
    groups, names = len(set(rows.values())), {spec.name for spec in specs}
    parts = [
        (flat, out.buffers[wanted], _Places(flat, wanted, layout))
        for flat in inputs
        if (wanted := tuple(spec for spec in flat.bucket.specs if spec.name in names))
    ]
    return by_shape(lambda shape: _bind(parts, shape, shape[1] > groups))


def _bind(
    parts: Sequence[tuple[FlatInputs, Tensor, _Places]], shape: torch.Size, by_row: bool
) -> Callable[[Tensor], None]:
    """A merge of flat buffers that reads weights of one shape where they are copied to.

    Nothing is allocated and nothing waited for, so that a CUDA graph can hold it: from pinned memory one asynchronous
    copy, and a launch for each buffer.
    """
    if not parts:
        return lambda weights: None
    k, width, _ = shape
    device = parts[0][0].base.device
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    chosen: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    launches = []
    for flat, target, places in parts:
        stored, own = flat.stored, whole
        if len(stored.planes) < shape[2]:
            some = torch.empty(k, width, len(stored.planes), dtype=torch.float32, device=device)
            own = chosen.setdefault(stored.planes, (places.planes, some))[1]
        launches.append(
            bind_merge(
                flat.base, stored.values, flat.tiles, own, target, scales=stored.scales, tile=TILE,
                places=places.table if by_row or not places.whole else None, shared=places.shared if by_row else 0,
            )
        )  # fmt: skip

    def merge(weights: Tensor) -> None:
        whole.copy_(weights, non_blocking=True)
        for planes, some in chosen.values():
            torch.index_select(whole, 2, planes, out=some)
        for launch in launches:
            launch()

    return merge


class _Places:
    """Where the tiles of chosen tensors of a flat buffer lie, and their row coefficients.

    Attributes:
        whole: whether all of its tensors are chosen.
        table: int32 [M / TILE, 5], as `routed_merge` takes it.
        planes: which of all planes the buffer holds, int64.
        shared: how many elements have one row coefficient in all of them: a power of two that divides every row.
    """

    def __init__(self, flat: FlatInputs, wanted: Sequence[TensorSpec], layout: Layout) -> None:
        self.whole = len(wanted) == len(flat.bucket.specs)
        offsets = dict(zip(flat.bucket.specs, flat.bucket.offsets, strict=True))
        entries, self.shared = [], TILE
        for spec in wanted:
            tiles, columns = -(-spec.numel // TILE), columns_of(spec.shape)
            span = layout.spans.get(spec.name, Spans(0)).rows or slice(-1, 0)
            if spec.rows > 1:
                self.shared = math.gcd(self.shared, columns)
            else:
                columns = tiles * TILE
            first = offsets[spec] // TILE
            entries += [(first + i, i, columns, span.start, span.stop - 1) for i in range(tiles)]
        if self.shared < SMALLEST_SHARED:
            self.shared = 1
        table = torch.tensor(entries, dtype=torch.int32).view(-1, 5)
        self.table = table.to(flat.base.device)
        self.planes = torch.tensor(flat.stored.planes, device=flat.base.device)
