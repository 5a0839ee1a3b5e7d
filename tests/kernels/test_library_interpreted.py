"""libparetofuse's launches, carried out by the Triton kernels themselves; `test_in_interpreter.py` runs it.

The fake CUDA driver notes each launch's arguments. They are read back here, tables and planes where the library put
them, and the kernel that the manifest names runs on them in Triton's interpreter: so the C++ library and the kernels
agree on what each argument means.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paretofuse.kernels.aot.variants import DTYPES
from paretofuse.kernels.lowrank_merge import lowrank_merge_kernel
from paretofuse.kernels.routed_merge import merge_kernel
from tests.support.cpplib import Library
from tests.support.cuda import ROUNDING, planes_store
from tests.support.fake_cuda import Driver
from tests.support.kernel_folder import write_kernels

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

NAMES = {torch.float32: "float32", torch.bfloat16: "uint16", torch.float16: "float16"}
KERNELS = {"merge_kernel": merge_kernel, "lowrank_merge_kernel": lowrank_merge_kernel}


def carried_out(launch: str, kernels: dict[str, dict[str, Any]], driver: Driver) -> tuple[Tensor, Tensor]:
    """What a launch that the driver noted writes, in the interpreter and in the fake; the former poisoned first."""
    grid = int(launch.split(" grid ")[1].split()[0])
    entry = kernels[launch.split(" file ")[1].split()[0]]
    values: dict[str, Any] = {}
    for argument, field in zip(entry["arguments"], launch.split(" arguments ")[1].split(), strict=True):
        number = int.from_bytes(bytes.fromhex(field), "little")
        kind = argument["type"]
        values[argument["name"]] = (
            driver.memory(number, DTYPES[kind[1:]]) if kind[0] == "*" and number else number
        )
    written = values["out"]
    values["out"] = torch.full_like(written, float("nan"))
    for scratch in entry["null_arguments"]:
        assert values.pop(scratch) == 0
    KERNELS[entry["symbol"]][(grid,)](*values.values(), **{**entry["constants"], "INTERPRETED": True})
    return values["out"], written


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_make_of_each_launch_what_the_cpu_does(
    library: Library, driver: Driver, tmp_path: Path, dtype: torch.dtype, by_row: bool
) -> None:
    folder = write_kernels(tmp_path / "kernels")
    listed = json.loads((folder / "manifest.json").read_text())["kernels"]
    kernels = {entry["file"]: entry for entry in listed}
    cuda = library.open(planes_store(tmp_path / "store", dtype, by_row=by_row)).cuda(folder, driver.path)
    static = sum(call.startswith("cuLaunchKernel") for call in driver.log())  # their inputs are given back
    cuda.switch([0.2, 0.3, 0.5])
    launches = [call for call in driver.log() if call.startswith("cuLaunchKernel")][static:]
    assert len(launches) == (9 if by_row else 5)
    for launch in launches:
        found, truth = carried_out(launch, kernels, driver)
        kept = truth != 0  # a matrix of low rank leaves the rest of its last tile alone
        assert kept.any()
        assert torch.isfinite(found[kept]).all()
        error = (found[kept].double() - truth[kept].double()).abs().max()
        assert error <= ROUNDING[NAMES[dtype]] * truth.double().abs().max(), launch[:80]
    cuda.close()
    driver.check()
