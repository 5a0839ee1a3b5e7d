"""Every contender of `benchmarks.gpu.bench`, in Triton's interpreter; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import bench
from benchmarks.gpu.cases import Case, Contender, Tools, grad_case, merge_case
from benchmarks.gpu.peers import lora_case
from benchmarks.gpu.record import COLUMNS
from benchmarks.harness.record import MissingContender

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


def timer(call: Any) -> tuple[float, float, float]:
    call()
    return 2.0, 1.0, 3.0


def test_pwemoe_beside_ours() -> None:
    case = next(iter(merge_case("tiny", lambda: nn.Linear(40, 30).bfloat16(), 3, tools(lambda: LikePWEMoE))))
    case.verify("ours")
    case.verify("PWEMoE, eager")


def test_who_is_wrong_raises_or_is_missing_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Any:
        raise MissingContender("not here")

    case = next(merge_case("tiny", lambda: nn.Linear(4, 4).bfloat16(), 2, tools(absent)))
    assert "PWEMoE is left out: not here" in capsys.readouterr().out
    assert "PWEMoE, eager" not in case.contenders
    right = case.contenders["ours"]
    case.contenders["wrong"] = Contender(lambda: right.call() * 1.1, 1.0, right.allowed)
    case.contenders["raises"] = Contender(lambda: 1 / 0, 1.0, right.allowed)

    def makes_none() -> list[Case]:
        raise RuntimeError("out of memory")

    about = dict.fromkeys(COLUMNS[12:], "here")
    path = tmp_path / "gpu_bench.csv"
    done = bench.run([lambda: [case], makes_none], timer, 1.0, path, about, 5.0)
    assert done == (1, 3)
    rows = {row["contender"]: row for row in csv.DictReader(path.read_text().splitlines())}
    assert rows["wrong"]["error"].startswith("BenchmarkError: merge tiny bf16 E=2, wrong: off by 0.")
    assert rows["raises"]["error"] == "ZeroDivisionError: division by zero"
    assert rows["wrong"]["median_ms"] == rows["raises"]["median_ms"] == ""
    assert float(rows["ours"]["median_ms"]) == 2.0
    assert "FAILED before any contender ran: RuntimeError: out of memory" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
def test_peft_beside_ours_and_left_out_where_it_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, maker, experts = list(bench.models(True, torch.device("cpu")))[1]
    words = (name, maker, ("c_attn", "c_fc"), experts, 2, tools(lambda: LikePWEMoE))
    case = lora_case(*words)
    for label in ("engine.switch(preference)", "PEFT, add_weighted_adapter and merge"):
        for _ in range(2):  # PEFT takes its last mixture out again
            case.verify(label)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert list(lora_case(*words).contenders) == ["engine.switch(preference)"]
    assert "PEFT is left out: " in capsys.readouterr().out


def test_no_case_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    def make() -> list[Case]:
        return [grad_case("tiny", 4096, 2, 2, torch.float32, tools(lambda: LikePWEMoE))]

    about = dict.fromkeys(COLUMNS[12:], "here")
    assert bench.run([make, make], timer, 1.0, tmp_path / "x.csv", about, 0.0) == (1, 0)
