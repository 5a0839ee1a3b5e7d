"""Every kernel is launched through one function, on the device of its tensors."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from paretofuse.kernels.launch import (
    MERGE_CONFIGS,
    PROGRAMS,
    Launch,
    dot_precision,
    linear_config,
    merge_config,
    piece_of,
    rows_merge_first,
)

KERNELS = Path(__file__).parents[2] / "kernels"


class Near:
    """As much of a tensor as a launch looks at."""

    def __init__(self, device: int | None) -> None:
        self.device = device
        self.is_cuda = device is not None


class Kernel:
    """Notes what it is launched with, and on which device."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.calls = current, []

    def __getitem__(self, grid):
        return lambda *a, **c: self.calls.append((grid, a, c, self.current[-1]))


@pytest.fixture
def current(monkeypatch):
    """The stack of current devices, by a guard in place of torch's."""
    devices = [0]

    @contextmanager
    def device_of(tensor):
        devices.append(tensor.device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return devices


@pytest.mark.parametrize(("device", "ran_on"), [(1, 1), (3, 3), (0, 0), (None, 0)])
def test_a_kernel_runs_on_the_device_of_its_tensors(current, device, ran_on):
    kernel = Kernel(current)
    near = Near(device)
    Launch(kernel, (4, 2), (near, 7), {"BLOCK": 16}, threads=128).run()
    assert kernel.calls == [((4, 2), (near, 7), {"BLOCK": 16, "num_warps": 4}, ran_on)]
    assert current == [0]


@pytest.mark.parametrize("grid", [(0,), (3, 0)])
def test_an_empty_grid_launches_nothing(current, grid):
    kernel = Kernel(current)
    Launch(kernel, grid, (Near(1),), {}).run()
    assert kernel.calls == []


def test_no_kernel_is_launched_past_it():
    found = []
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched = ast.unparse(node.func.value)
                if "kernel" in launched:
                    found.append((path.name, launched))
    assert found == [("launch.py", "self.kernel")]


@pytest.fixture
def as_before():
    """Leaves torch's precision of float32 products as it is by default."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("told", "kind"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_products_are_torchs(as_before, monkeypatch, told, kind):
    """As cuBLAS would now; ROCm multiplies float32 as it is, and half precisions have nothing to choose."""
    torch.set_float32_matmul_precision(told)
    assert dot_precision(torch.float32) == kind
    assert dot_precision(torch.bfloat16) == dot_precision(torch.float16) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dot_precision(torch.float32) == "ieee"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has one interface"
)
def test_float32_products_are_torchs_by_its_newer_interface(as_before):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert dot_precision(torch.float32) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert dot_precision(torch.float32) == "ieee"


def test_torch_before_2_9_is_asked_by_its_only_interface(as_before, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    torch.set_float32_matmul_precision("high")
    assert dot_precision(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert dot_precision(torch.float32) == "ieee"


@pytest.mark.parametrize("step", [16, 64])
@pytest.mark.parametrize("ins", [0, 1, 63, 64, 768, 3072, 16384])
@pytest.mark.parametrize("tiles", [0, 1, 12, 48, 264, 5000])
def test_pieces_cover_the_inputs_and_fill_a_gpu(tiles, ins, step):
    piece = piece_of(tiles, ins, step)
    pieces = max(1, -(-ins // piece))
    assert piece % step == 0
    assert piece > 0
    assert pieces * max(1, tiles) <= max(PROGRAMS, tiles)
    if pieces > 1:
        assert piece >= 2 * step
    if tiles and ins >= 2 * step * PROGRAMS:
        assert 2 * pieces * tiles >= PROGRAMS


def test_few_rows_of_common_layers_keep_every_multiprocessor_busy():
    """An H100 has 132; without pieces GPT-2's would use 12 of them."""
    for outs, ins in ((768, 3072), (3072, 768), (4096, 4096), (4096, 14336)):
        config = linear_config(8, 2, 2)
        tiles = -(-outs // config.outs)
        assert tiles * -(-ins // piece_of(tiles, ins, config.ins)) >= 132


@pytest.mark.parametrize(
    ("per", "experts", "dtype", "merged"),
    [
        (1, 8, torch.bfloat16, False), (49, 8, torch.bfloat16, False), (50, 8, torch.bfloat16, True),
        (128, 2, torch.float16, False), (200, 2, torch.float16, True), (3, 8, torch.float32, False),
        (4, 8, torch.float32, True),
    ],
)  # fmt: skip
def test_many_rows_of_a_preference_are_merged_first(per, experts, dtype, merged):
    assert rows_merge_first(per, experts, dtype) is merged


@pytest.mark.parametrize(
    ("experts", "itemsize", "group", "shared", "use"),
    [
        (8, 2, 0, 0, "at most 8"), (9, 2, 0, 0, "at most 16"), (17, 2, 0, 0, "any"), (3, 1, 1024, 0, "any"),
        (3, 1, 32, 0, "small groups"), (8, 2, 0, 256, "at most 8"), (9, 2, 0, 256, "any"), (3, 1, 1024, 64, "any"),
        (3, 1, 32, 64, "small groups"), (3, 1, 32, 1, "any row"), (3, 4, 0, 1, "any row"),
    ],
)  # fmt: skip
def test_a_merge_holds_what_registers_have_room_for(
    experts: int, itemsize: int, group: int, shared: int, use: str
) -> None:
    """Small groups have many scales, and row coefficients take registers of their own: so says the static proof."""
    assert merge_config(experts, itemsize, group=group, shared=shared) is MERGE_CONFIGS[use]
