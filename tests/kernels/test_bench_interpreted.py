"""Every contender of `benchmarks.gpu.bench`, in Triton's interpreter; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import bench
from benchmarks.gpu.cases import Contender, Tools, grad_case, merge_case
from benchmarks.harness.record import BenchmarkError, MissingContender

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)


class LikePWEMoE:
    """The interface of PWEMoE's module as the benchmark uses it, by the formula of its paper."""

    def __init__(self, base: nn.Module, experts: list[nn.Module], router_hidden_layers: int) -> None:
        assert router_hidden_layers == 2
        self.base, self.experts = base, experts
        count = len(experts)
        self.gate = nn.Sequential(nn.Linear(count, 2 * count), nn.ReLU(), nn.Linear(2 * count, count))
        self.preference_vector: Any = None

    def to(self, device: torch.device, dtype: torch.dtype) -> LikePWEMoE:
        self.gate.to(device, dtype)
        return self

    def _merge_state_dict(self) -> dict[str, Tensor]:
        weights = self.gate(self.preference_vector)
        states = [expert.state_dict() for expert in self.experts]
        return {
            name: tensor + sum(w * (state[name] - tensor) for w, state in zip(weights, states, strict=True))
            for name, tensor in self.base.state_dict().items()
        }


def tools(pwemoe: Any) -> Tools:
    return Tools(torch.device("cpu"), lambda function: function, lambda call: call, pwemoe)


def idle(call: Any) -> tuple[float, float, float]:
    """Stands for a timer where the calls have been checked already, and are slow here."""
    return 2.0, 1.0, 3.0


def timer(call: Any) -> tuple[float, float, float]:
    call()
    return 2.0, 1.0, 3.0


def test_every_case_runs_and_is_right(tmp_path: Path) -> None:
    about = dict.fromkeys(bench.COLUMNS[8:], "here")
    speed = bench.copy_speed(timer, torch.device("cpu"), 1000)
    assert speed == pytest.approx(1e-3)
    path = tmp_path / "gpu_bench.csv"
    done = bench.run(bench.cases(True, tools(lambda: LikePWEMoE)), idle, speed, path, about, 5.0)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert done == len({row["case"] for row in rows}) == 8
    assert sum(row["contender"] == "PWEMoE, eager" for row in rows) == 2
    assert all(row["device"] == "here" and float(row["median_ms"]) == 2.0 for row in rows)
    assert {row["time_by_ours"] for row in rows} == {"", "1"}


def test_a_wrong_contender_ends_the_run_and_a_missing_one_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def absent() -> Any:
        raise MissingContender("not here")

    case = next(merge_case("tiny", nn.Linear(4, 4).bfloat16(), 2, tools(absent)))
    assert "PWEMoE is left out: not here" in capsys.readouterr().out
    assert "PWEMoE, eager" not in case.contenders
    right = case.contenders["ours"]
    case.contenders["wrong"] = Contender(lambda: right.call() * 1.1, 1.0, right.allowed)
    with pytest.raises(BenchmarkError, match=r"wrong: off by 0\.1"):
        bench.measure(case, timer, 1.0)


def test_no_case_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    case = grad_case("tiny", 4096, 2, 2, torch.float32, tools(lambda: LikePWEMoE))
    about = dict.fromkeys(bench.COLUMNS[8:])
    assert bench.run(iter([case, case]), timer, 1.0, tmp_path / "x.csv", about, 0.0) == 1
