"""Every kernel is launched through one function, on the device of its tensors."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from paretofuse.kernels.launch import Launch

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
