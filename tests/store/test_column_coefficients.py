"""Stores whose columns have coefficients of their own, through the C++ core: routing weights, merges from disk and in
libparetofuse against the definition, and what is refused where it lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paretofuse as pf
from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import rows_of
from paretofuse.engine.merging import native
from paretofuse.engine.planes.plane import memories
from paretofuse.engine.store.reader import Store
from tests.store.test_row_coefficients import rows_store
from tests.support import cpplib
from tests.support.cpplib import Library, LibraryError, assert_same_bits

R = [0.2, 0.8]
WRITE = {"head": "", "files": {}, "threads": 2, "progress": None, "shard_bytes": 1 << 30}


def matrices(store: Store) -> list[tuple[str, int]]:
    """Routed matrices and the number of their columns, in the manifest's order."""
    return [
        (spec.name, spec.shape[1])
        for spec in store.layout.tensors
        if spec.role == "routed" and len(spec.shape) == 2
    ]


def put_routers(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The store with other router parameters, which its manifest says it has."""
    held = dict(load_file(path / "routers.safetensors"))
    change(held)
    save_file(held, path / "routers.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["routers.safetensors"]["bytes"] = (path / "routers.safetensors").stat().st_size
    manifest["routers"]["family"] = "rows+columns"
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def columns_store(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A store of a few kB with row and column coefficients over planes of every format, odd sizes and absent planes."""
    rows_store(path, dtype)
    count = sum(columns for _, columns in matrices(Store.open(path)))
    generator = torch.Generator().manual_seed(3)
    weight = 0.2 * torch.randn(2, 2, count, generator=generator)
    return put_routers(path, lambda held: held.update({"columns.weight": weight}))


def merged_by_definition(path: Path, weights: np.ndarray) -> dict[str, torch.Tensor]:
    """Every routed tensor of the store, merged alone by the native core from planes that the Python engine read."""
    engine = pf.load(path.parent / "rows")
    stack = engine._stack
    groups, rows, planes = len(engine.groups), engine.layout.row_count, weights.shape[1]
    row, column = groups, groups + rows
    merged = {}
    for spec in engine.layout.tensors:
        if spec.role != "routed":
            continue
        base, own = stack.base[spec.name], [held.get(spec.name) for held in stack.planes]
        by_row = np.ascontiguousarray(weights[row : row + rows_of(spec.shape)].T)
        row += rows_of(spec.shape)
        width = spec.shape[1] if len(spec.shape) == 2 else 0
        by_column = np.ascontiguousarray(weights[column : column + width].T)
        column += width
        out = torch.full_like(base, torch.nan)
        native.MergePlan(
            base=[base.data_ptr()], planes=[memories(own)], lengths=[base.numel()], rows=[0],
            columns=[base.numel() // rows_of(spec.shape)], base_dtypes=[spec.dtype], out_dtypes=[spec.dtype],
            plane_count=planes, row_count=1,
        ).run(
            np.ascontiguousarray(weights[engine.groups.index(spec.group)]).reshape(1, 1, planes), [[out.data_ptr()]],
            row_weights=[[by_row.ctypes.data]], column_weights=[[by_column.ctypes.data if width else 0]],
        )  # fmt: skip
        merged[spec.name] = out
    assert column == len(weights)
    return merged


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["F32", "BF16"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    rows_store(tmp_path / "rows", request.param)
    return columns_store(tmp_path / "store", request.param)


def test_routing_weights_go_on_with_the_columns(path: Path) -> None:
    store = Store.open(path)
    weights = store.core.routing_weights(R)
    rows = Store.open(path.parent / "rows").core.routing_weights(R)
    np.testing.assert_array_equal(weights[: len(rows)], rows)
    s = load_file(path / "routers.safetensors")["columns.weight"].double()
    expected = (R[0] * s[0] + R[1] * s[1]).float()
    np.testing.assert_array_equal(weights[len(rows) :], expected.T.numpy())
    assert len(weights) == len(rows) + sum(columns for _, columns in matrices(store))


def test_the_library_and_disk_give_the_bits_of_the_definition(
    library: Library, path: Path, tmp_path: Path
) -> None:
    store = Store.open(path)
    weights = store.core.routing_weights(R)
    rows = store.layout.row_count
    columns = sum(columns for _, columns in matrices(store))
    truth = merged_by_definition(path, weights)
    assert {len(tensor.shape) for tensor in truth.values()} == {2, 3}  # the latter without columns
    for threads in (1, 3):
        engine = library.open(path, threads=threads)
        assert engine.routing_weights(R, rows + columns).tobytes() == weights.tobytes()
        engine.switch(R)
        own = engine.tensors()
        assert_same_bits({name: own[name] for name in truth}, truth)
        some = {name: np.full_like(own[name], 7) for name in truth}
        engine.merge_into(R, some)
        assert_same_bits(some, truth)
        replica = engine.acquire(R)
        assert_same_bits({name: replica.view(name).array() for name in truth}, truth)
        replica.release()
    for batch in (8, 1000, 8 << 20):  # which cut matrices between rows
        for isa in [name for name, usable in native.instruction_sets().items() if usable]:
            out = tmp_path / "merged.safetensors"
            store.core.merge(weights, out, isa=isa, batch_bytes=batch, **WRITE)  # type: ignore[arg-type]
            merged = load_file(out)
            for name, array in own.items():
                assert cpplib.bits(merged[name]).tobytes() == array.tobytes(), (name, batch, isa)
    for count in (len(weights) - columns - 1, len(weights) - 1, len(weights) - columns + 1):
        with pytest.raises(
            LibraryError, match=f"{rows} rows, or with column coefficients {columns} columns more"
        ):
            engine.switch_weights(weights[:count])
    scalar = library.open(path.parent / "rows")
    for fewer in (len(weights) - columns, len(store.layout.groups)):  # valid as ever
        engine.switch_weights(weights[:fewer])
        scalar.switch_weights(weights[:fewer])
        for name, array in scalar.tensors().items():
            assert engine.tensors()[name].tobytes() == array.tobytes()
    scalar.switch_weights(weights)  # what the routers of a store lack, weights may have
    for name, array in own.items():
        assert scalar.tensors()[name].tobytes() == array.tobytes()


def parameter(
    *shape: int, value: float = 0.0, name: str = "columns.weight"
) -> Callable[[dict[str, Any]], None]:
    return lambda held: held.update({name: torch.full(shape, value)})


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "fewer columns": (parameter(2, 2, 3), "lack 'columns.weight' of a shape that fits"),
    "one dimension": (parameter(4), "lack 'columns.weight' of a shape that fits"),
    "no numbers": (parameter(2, 2, 0), "lack 'columns.weight' of a shape that fits"),
    "other planes": (parameter(2, 3, 69), "lack 'columns.weight' of a shape that fits"),
    "NaN": (
        lambda held: held["columns.weight"].fill_(float("nan")),
        "'columns.weight' holds NaN or infinity",
    ),
    "no rows beside them": (lambda held: held.pop("rows.weight"), "lack 'rows.weight' of a shape that fits"),
    "half floats": (
        lambda held: held.update({"columns.weight": held["columns.weight"].half()}),
        "should be F32",
    ),
    "another parameter": (parameter(2, name="planes.weight"), "unknown router parameters"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_routers_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    path = put_routers(columns_store(tmp_path / "store"), ATTACKS[name][0])
    with pytest.raises(StoreError) as caught:
        Store.open(path)
    assert ATTACKS[name][1] in str(caught.value)
    assert "create the store again" in str(caught.value)


def test_more_columns_than_can_be_counted_are_refused(tmp_path: Path) -> None:
    path = columns_store(tmp_path / "store")
    manifest = json.loads((path / "manifest.json").read_text())
    for spec in manifest["tensors"]:
        if spec["role"] == "routed":
            spec["shape"] = [0, (1 << 62) - 1]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="has too many columns"):
        Store.open(path)
