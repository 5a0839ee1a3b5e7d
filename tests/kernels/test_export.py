"""Binaries for other programs: what the manifest says is what the binaries hold, and every run writes the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch

from paretofuse.kernels import launch, lowrank_merge, routed_grad, routed_merge
from paretofuse.kernels.aot import build, variants
from tests.support.kernels import needs_triton

needs_triton()

SIZES = {"i32": 4, "i64": 8}
PARAMETERS_START = 0x210
"""Where kernel parameters begin in the constant bank on sm_90."""


def sections(elf: bytes) -> dict[str, int]:
    """The sections of a 64-bit ELF file by name, and their sizes in bytes."""
    start, size, count, names = *struct.unpack_from("<Q", elf, 0x28), *struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<2I4Q", elf, start + size * i) for i in range(count)]
    text = headers[names][4]
    return {elf[text + h[0] : elf.index(b"\0", text + h[0])].decode(): h[5] for h in headers}


def parameter_bytes(arguments) -> int:
    """The size of a parameter block in which each argument is aligned to its own size."""
    end = 0
    for argument in arguments:
        size = 8 if argument["type"].startswith("*") else SIZES[argument["type"]]
        end = -(-end // size) * size + size
    return end


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels")
    assert build.main(["--arch", "sm_90", "--dtype", "bf16", "-o", str(path)]) == 0
    return path


def test_manifest_describes_the_binaries(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["architecture"] == "sm_90"
    assert {k["symbol"] for k in manifest["kernels"]} == {
        "lowrank_merge_kernel",
        "merge_kernel",
        "partials_kernel",
        "segment_sums_kernel",
    }
    assert {k["file"] for k in manifest["kernels"]} == {p.name for p in exported.glob("*.cubin")}
    for kernel in manifest["kernels"]:
        binary = (exported / kernel["file"]).read_bytes()
        assert hashlib.sha256(binary).hexdigest() == kernel["sha256"]
        found = sections(binary)
        assert f".text.{kernel['symbol']}" in found
        block = found[f".nv.constant0.{kernel['symbol']}"] - PARAMETERS_START
        assert block == parameter_bytes(kernel["arguments"])
        assert kernel["threads"] == 32 * kernel["warps"]
        known = (
            {a["name"] for a in kernel["arguments"]}
            | {"segments", "tiles", "ceil"}
            | set(kernel["constants"])
        )
        assert {
            word for word in "".join(c if c.isalpha() or c == "_" else " " for c in kernel["grid"]).split()
        } <= known


def test_deltas_of_another_dtype_are_written_when_asked_for():
    plain, mixed = (
        {v.name for v in build.variants("sm_90", ("fp32",), deltas)} for deltas in ((), ("bf16", "fp32"))
    )
    assert plain < mixed
    assert {name.split("_", 1)[0] for name in mixed - plain} == {"merge", "lowrank"}
    assert all("_fp32_bf16_fp32" in name for name in mixed - plain)
    assert {"merge_at_most_4_fp32_bf16_fp32", "merge_rows_at_most_4_fp32_bf16_fp32"} <= mixed


def test_two_runs_write_the_same_bytes(exported, tmp_path):
    """The second in another process, with another working directory and an empty cache of compiled kernels."""
    module, options = "paretofuse.kernels.aot", ["--arch", "sm_90", "--dtype", "bf16"]
    subprocess.run(
        [sys.executable, "-m", module, *options, "-o", tmp_path / "again"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}, cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    first, second = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (exported, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_no_path_of_the_checkout_is_in_the_binaries(exported):
    assert not [p.name for p in exported.glob("*.cubin") if b"routed_" in p.read_bytes()]


def test_interpreted_kernels_are_refused(tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "paretofuse.kernels.aot", "--arch", "sm_90", "-o", tmp_path],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 1
    assert "TRITON_INTERPRET=1" in child.stderr


def by_rule(kernel, **sizes: int) -> tuple[int, ...]:
    """A grid by the manifest's rule; `ceil(a / b)` rounds up, other divisions leave no rest."""
    words = {"ceil": math.ceil, **{k: v for k, v in kernel["constants"].items()}, **sizes}
    found = eval(f"({kernel['grid']})", {"__builtins__": {}}, words)
    assert all(float(size).is_integer() for size in found)
    return tuple(int(size) for size in found)


@pytest.mark.parametrize(
    ("k", "experts", "tiles", "groups"), [(1, 3, 5, 2), (1, 8, 3, 1), (3, 2, 7, 4), (9, 17, 2, 2)]
)
def test_grid_rules_are_the_launchers_own(exported, k, experts, tiles, groups):
    kernels = {
        kernel["name"]: kernel for kernel in json.loads((exported / "manifest.json").read_text())["kernels"]
    }
    n = tiles * variants.TILE
    base, deltas = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(experts, n, dtype=torch.bfloat16)
    tile_group = (torch.arange(tiles) % groups).int()
    weights = torch.zeros(k, groups, experts)
    config = launch.merge_config(experts, 2)
    found = routed_merge.merge_launch(
        base, deltas, tile_group, weights, None, None, torch.zeros(k, n), variants.TILE, 0, config
    )
    use = next(use for use, other in launch.MERGE_CONFIGS.items() if other is config)
    merge = kernels[f"merge_{use}_bf16_bf16_bf16".replace(" ", "_")]
    assert three(found.grid) == by_rule(merge, n=n)
    partials, found = routed_grad.partials_launch(
        base, deltas, None, variants.TILE, variants.TILE, launch.grad_config(2)
    )
    assert three(found.grid) == by_rule(kernels["grad_narrow_deltas_bf16_bf16"], n=n)
    plan = routed_grad.plan_groups(tile_group, groups, variants.TILE)
    sums, found = routed_grad.sums_launch(partials, plan.order, plan.pieces, torch.float64)
    assert three(found.grid) == by_rule(kernels["piece_sums"], experts=experts, segments=len(plan.pieces) - 1)
    _, found = routed_grad.sums_launch(sums, plan.order, plan.starts, torch.float32)
    assert three(found.grid) == by_rule(kernels["group_sums"], experts=experts, segments=groups)


def three(grid: tuple[int, ...]) -> tuple[int, ...]:
    """A grid in all three dimensions."""
    return (*grid, 1, 1)[:3]


def test_variants_and_launcher_agree_on_arguments(exported):
    """The manifest lists a kernel's run-time arguments in the order of its definition, which the driver needs."""
    kernels = {"merge_kernel": routed_merge.merge_kernel, "partials_kernel": routed_grad.partials_kernel,
               "segment_sums_kernel": routed_grad.segment_sums_kernel,
               "lowrank_merge_kernel": lowrank_merge.lowrank_merge_kernel}  # fmt: skip
    for entry in json.loads((exported / "manifest.json").read_text())["kernels"]:
        names = [name for name in kernels[entry["symbol"]].arg_names if name not in entry["constants"]]
        assert [argument["name"] for argument in entry["arguments"]] == [*names, *entry["null_arguments"]]
