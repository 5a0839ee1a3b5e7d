"""libparetofuse's GPU path with planes of every format and row coefficients, against the fake driver.

Each launch is carried out as the kernel's formula says, from the arguments that the library gave. What the machine code
does is for tests/kernels, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paretofuse as pf
from paretofuse.engine.store.reader import Store
from paretofuse.kernels.aot import build
from tests.store.test_column_coefficients import columns_store
from tests.store.test_row_coefficients import rows_store
from tests.support.cpplib import Library, LibraryError
from tests.support.cuda import assert_cpu_results, assert_same_merge, planes_store
from tests.support.fake_cuda import STREAM, Driver
from tests.support.kernel_folder import write_kernels
from tests.support.kernels import needs_triton
from tests.support.models import net_and_experts

R = [0.2, 0.3, 0.5]
STATIC = ["merge_any_fp32_i8_fp32", "lowrank_merge_fp32_fp32_fp32_tf32x3"]
ROUTED = [
    "merge_at_most_4_fp32_fp32_fp32", "merge_any_fp32_i8_fp32", "merge_small_groups_fp32_u8_fp32",
    "lowrank_merge_beside_dense_fp32_fp32_fp32_tf32x3", "merge_small_groups_fp32_i8x32_fp32",
]  # fmt: skip


def test_every_format_is_merged_by_its_own_kernel(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path
) -> None:
    cuda = library.open(planes_store(tmp_path / "store")).cuda(kernels, driver.path)
    assert driver.launched() == [f"{name}.cubin" for name in STATIC]
    cuda.switch(R, STREAM)
    routed = driver.launched()[len(STATIC) :]
    assert routed == [f"{name}.cubin" for name in ROUTED]
    cuda.close()
    driver.check()


def test_tensors_whose_rows_share_coefficients_are_merged_apart_from_others(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path
) -> None:
    cuda = library.open(planes_store(tmp_path / "store", by_row=True)).cuda(kernels, driver.path)
    opened = len(driver.launched())
    cuda.switch(R, STREAM)
    assert set(driver.launched()[opened:]) == {
        f"{name}.cubin"
        for name in (
            "merge_rows_at_most_4_fp32_fp32_fp32", "merge_any_row_fp32_fp32_fp32", "merge_rows_any_fp32_i8_fp32",
            "merge_any_row_fp32_i8_fp32", "merge_rows_small_groups_fp32_i8x32_fp32", "merge_any_row_fp32_i8x32_fp32",
            "merge_rows_small_groups_fp32_u8_fp32", "merge_any_row_fp32_u8_fp32",
            "lowrank_merge_rows_beside_dense_fp32_fp32_fp32_tf32x3",
        )
    }  # fmt: skip
    cuda.close()
    driver.check()


@pytest.mark.parametrize("by_row", [False, True])
def test_weights_with_and_without_row_coefficients_take_turns(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path, by_row: bool
) -> None:
    """Whatever routers the store has: one of scalars takes weights of rows, and the other way round."""
    path = planes_store(tmp_path / "store", by_row=by_row)
    engine, layout = library.open(path), pf.load(path).layout
    cuda = engine.cuda(kernels, driver.path)
    random = np.random.default_rng(3)
    groups = len(layout.groups)
    for rows in (layout.row_count, 0, layout.row_count):
        weights = random.normal(size=(groups + rows, 3)).astype(np.float32)
        assert_same_merge(engine, cuda, weights, STREAM)
    with pytest.raises(LibraryError, match="or with row coefficients"):
        cuda.switch_weights(weights[:-1])
    cuda.close()
    driver.check()


def test_more_experts_than_registers_hold_with_their_row_coefficients(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path
) -> None:
    base = {"w": torch.randn(3, 256)}
    models = {f"e{e}": {"w": torch.randn(3, 256)} for e in range(9)}
    pf.stack(base, models, family="rows").save(tmp_path / "store")
    engine = library.open(tmp_path / "store")
    cuda = engine.cuda(kernels, driver.path)
    weights = np.random.default_rng(2).normal(size=(1 + 3, 9)).astype(np.float32)
    assert_same_merge(engine, cuda, weights, STREAM)
    assert driver.launched() == ["merge_rows_any_fp32_fp32_fp32.cubin"]
    cuda.close()
    driver.check()


def test_no_dense_plane_is_made_of_low_rank_ones(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path
) -> None:
    """Base, output and factors, where dense planes would be eight bases more."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(256, 512, generator=generator)}
    models = {
        f"e{e}": {
            "w": base["w"]
            + torch.randn(256, 4, generator=generator) @ torch.randn(4, 512, generator=generator)
        }
        for e in range(8)
    }
    pf.stack(base, models, planes="lowrank:4").save(tmp_path / "store")
    cuda = library.open(tmp_path / "store").cuda(kernels, driver.path)
    allocated = sum(int(call.split()[1]) for call in driver.log() if call.startswith("cuMemAlloc "))
    one = 256 * 512 * 4
    factors = 8 * 4 * (256 + 512) * 4
    weights = (2 + 256) * 8 * 4
    assert allocated < 2 * one + factors + weights + 4096
    cuda.close()
    driver.check()


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_quantized_planes_stay_as_they_are(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path, word: str
) -> None:
    base = {"w": torch.randn(256, 512)}
    models = {f"e{e}": {"w": base["w"] + 0.1 * torch.randn(256, 512)} for e in range(8)}
    pf.stack(base, models, planes=word).save(tmp_path / "store")
    engine = library.open(tmp_path / "store")
    cuda = engine.cuda(kernels, driver.path)
    allocated = sum(int(call.split()[1]) for call in driver.log() if call.startswith("cuMemAlloc "))
    one = 256 * 512 * 4
    planes = 8 * one / (4 if word == "int8" else 8)
    scales = 8 * one / 32
    assert allocated < 2 * one + planes + scales + 16384
    engine.switch([0.125] * 8)
    cuda.switch([0.125] * 8, STREAM)
    assert_cpu_results(cuda.tensors(STREAM), engine.tensors())
    cuda.close()
    driver.check()


def entries(manifest: dict[str, Any], start: str) -> list[dict[str, Any]]:
    found = [entry for entry in manifest["kernels"] if entry["name"].startswith(start)]
    assert found
    return found


def change_all(start: str, **constants: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for entry in entries(manifest, start):
            entry["constants"].update(constants)

    return change


def without(*starts: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["kernels"] = [k for k in manifest["kernels"] if not k["name"].startswith(starts)]

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "sub": (change_all("merge_rows_any_fp32", SUB=256), "row coefficients of 256 elements"),
    "places": (change_all("merge_rows_any_fp32", PLACES=False), "row coefficients without places"),
    "rows": (change_all("merge_rows_any_fp32", ROWS=3), '"ROWS", expected 0 to 2'),
    "packed": (change_all("merge_small_groups_fp32_u8", PACKED=False), "packed numbers of another type"),
    "group": (change_all("merge_small_groups_fp32_u8", GROUP=64), "deltas u8 in groups of 32; write it by"),
    "tile": (change_all("lowrank_merge_fp32", BO=128), "another tile"),
    "fields": (change_all("lowrank_merge_fp32", FIELDS=9), "another table of matrices"),
    "unaligned": (change_all("lowrank_merge_fp32", ALIGNED=False), "and planes of low rank; write it by"),
    "output": (
        lambda m: entries(m, "lowrank_merge_fp32")[0]["arguments"][8].update(type="*bf16"),
        "an output of another type",
    ),
    "grid": (lambda m: entries(m, "lowrank_merge_fp32")[0].update(grid="1, 1, 1"), "another launch grid"),
    "no low rank": (without("lowrank"), "has no merge of base fp32 and planes of low rank"),
    "no rows": (without("merge_rows", "merge_any_row"), "and deltas fp32 by row; write it by"),
    "no low rank by row": (
        without("lowrank_merge_rows"),
        "planes of low rank beside deltas fp32 by row; write it by",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_kernels(library: Library, driver: Driver, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    folder = write_kernels(tmp_path / "kernels", change)
    with pytest.raises(LibraryError) as caught:
        library.open(planes_store(tmp_path / "store")).cuda(folder, driver.path)
    assert caught.value.status == Library.DEVICE
    assert message in str(caught.value)
    driver.check()


@pytest.mark.parametrize("by_row", [False, True])
def test_real_kernels_are_chosen_from_a_real_export(
    library: Library, driver: Driver, tmp_path: Path, by_row: bool
) -> None:
    needs_triton()
    kernels = build.export("sm_90", tmp_path / "kernels", ("bf16",)).parent
    engine = library.open(planes_store(tmp_path / "store", torch.bfloat16, by_row=by_row))
    cuda = engine.cuda(kernels, driver.path)
    engine.switch(R)
    cuda.switch(R, STREAM)
    assert_cpu_results(cuda.tensors(STREAM), engine.tensors())
    for loaded in {call.split()[1] for call in driver.log() if call.startswith("cuModuleLoad")}:
        assert Path(loaded).read_bytes().startswith(b"\x7fELF")
    cuda.close()
    driver.check()


def test_a_store_of_float32_under_half_experts_needs_their_kernels_too(
    library: Library, driver: Driver, tmp_path: Path
) -> None:
    """A folder without `--delta-dtype` says so, by row as well."""
    base, experts = net_and_experts()
    pf.stack(base, experts, delta_dtype=torch.bfloat16).save(tmp_path / "store")
    folder = write_kernels(tmp_path / "kernels", lambda m: m.update(kernels=of_one_dtype(m)))
    with pytest.raises(LibraryError, match="--dtype fp32 --delta-dtype bf16"):
        library.open(tmp_path / "store").cuda(folder, driver.path)
    driver.check()


def of_one_dtype(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [k for k in manifest["kernels"] if "fp32_bf16_fp32" not in k["name"]]


def test_column_coefficients_are_refused(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path
) -> None:
    words = 'merges no column coefficients; use the engine on the CPU, or train with family="rows"'
    engine = library.open(columns_store(tmp_path / "columns"))
    with pytest.raises(
        LibraryError, match=f"got a store whose routers have columns.weight: .* {words}"
    ) as caught:
        engine.cuda(kernels, driver.path)
    assert caught.value.status == Library.INVALID
    assert driver.log() == []
    weights = Store.open(tmp_path / "columns").core.routing_weights([0.2, 0.8])
    cuda = library.open(rows_store(tmp_path / "rows")).cuda(kernels, driver.path)
    launched = driver.launched()
    with pytest.raises(LibraryError, match=f"got routing weights of columns: .* {words}"):
        cuda.switch_weights(weights, STREAM)
    assert driver.launched() == launched
    cuda.close()
    driver.check()
