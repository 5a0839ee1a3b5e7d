"""The guides' examples run as they stand, one after the other, on tiny models."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import paretofuse as pf
from tests.support.models import perturbed, tiny_gpt2

ROOT = Path(__file__).parents[1]


def run_guide(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute a guide's Python blocks in one namespace."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S)):
        exec(compile(block, f"docs/{name}, block {number + 1}", "exec"), names)
    return names


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = module(batch, labels=batch).loss
    return result


def token_batches(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 101, (2, 12), generator=generator) for _ in range(count)]


def test_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_gpt2()
    for seed, name in enumerate(("base", "news", "poems")):
        perturbed(base, seed, 0.02).save_pretrained(name)
    engine = pf.stack("base", {"news": "news", "poems": "poems"})
    names: dict[str, Any] = {
        "__name__": "guide",
        "engine": engine,
        "loss": loss,
        "batches": {"news": token_batches(0, 2), "poems": token_batches(1, 2)},
        "held_out": {"news": token_batches(2, 1), "poems": token_batches(3, 1)},
    }
    run_guide("training.md", names)
    assert len(names["records"]) == 40
    assert names["front"].values.shape == (11, 2)
    assert names["corners"].shape == (32, 16)
    assert names["inside"].shape == (64, 16)
    assert not names["mapped"]._in_place.built
    assert pf.load("trained.pareto").objectives == ("news", "poems")


def test_sweeps(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    base = tiny_gpt2()
    engine = pf.stack(base, {"news": perturbed(base, 0, 0.02), "poems": perturbed(base, 1, 0.02)})
    held_out = {"news": token_batches(2, 1), "poems": token_batches(3, 1)}
    names: dict[str, Any] = {
        "pf": pf,
        "engine": engine,
        "grid": pf.simplex_grid(2, 3),
        "perplexities": lambda module: pf.evaluate(module, {n: (d, loss) for n, d in held_out.items()}),
    }
    run_guide("sweeps.md", names)
    assert len(names["front"]) == 8


def test_production(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    base = BertForSequenceClassification(config).eval()
    experts = {name: perturbed(base, seed) for seed, name in enumerate(("cola", "sst2"))}
    pf.stack(base, experts, heads=["classifier"]).save(tmp_path / "store")
    names: dict[str, Any] = {"pf": pf, "store": tmp_path / "store", "tokens": torch.arange(10).view(2, 5)}
    run_guide("production.md", names)
    engine = names["engine"]
    truth = engine.merge({"cola": 0.7, "sst2": 0.3})(names["tokens"]).logits
    assert torch.equal(names["logits"], truth)
    assert torch.equal(asyncio.run(names["answer"]({"cola": 0.7, "sst2": 0.3})), truth)
    engine.switch({"cola": 1.0})
    own = engine.merge({"cola": 1.0}, head="cola")(names["tokens"]).logits
    assert torch.equal(names["cola"](names["tokens"]).logits, own)


def test_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="the official client is among what the tests need")
    serving = pytest.importorskip("paretofuse.serving")
    from tests.support.served import running, text_store

    monkeypatch.chdir(tmp_path)
    store = text_store(tmp_path)
    preferences, values = [[1.0, 0.0], [0.0, 1.0]], [[20.0, 50.0], [60.0, 25.0]]
    front = pf.Front(preferences, values, ("news", "poems"), ("news", "poems"), maximize=False)  # type: ignore[arg-type]
    with running(serving.create_app(pf.load(store), front=front)) as url:
        names = run_guide("serving.md", {"url": url, "store": store, "front": front})
    assert names["answer"].preference == {"news": 1.0, "poems": 0.0}
    assert names["answer"].choices[0].text in capsys.readouterr().out
    assert len(names["engine"].pool) == 4
    assert "GPT-2 on news and poems" in (tmp_path / "front.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")  # pinned memory without a GPU
def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    base = tiny_gpt2()
    base.save_pretrained("base")

    def examples(step: int, held_out: bool) -> list[dict[str, list[int]]]:
        """Counting up from anywhere; every fourth beginning is held out."""
        rows = [[(first + step * i) % 100 for i in range(10)] for first in range(100)]
        return [{"input_ids": row, "labels": row} for row in rows if (row[0] % 4 == 0) == held_out]

    names: dict[str, Any] = {
        "__name__": "guide",
        "train": {"news": examples(1, False), "poems": examples(2, False)},
        "held_out": {"news": examples(1, True), "poems": examples(2, True)},
    }
    run_guide("transformers.md", names)
    front = names["front"]
    untrained = pf.evaluate(base, names["tests"])
    for objective in ("news", "poems"):  # its expert learned, and so a preference for it is a better model
        values = front.values[:, front.metrics.index(objective)]
        assert values.min() < 0.9 * untrained[objective]
    assert min(front.rank_correlation().values()) > 0.5
    assert type(names["model"]) is type(base)
    merged = names["engine"].merge({"news": 0.7, "poems": 0.3}).state_dict()
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(tensor, merged[name])
    lines = (tmp_path / "fit.csv").read_text().splitlines()
    assert 2 <= len(lines) <= 31


def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        perturbed(tiny_gpt2(), seed, 0.02).save_pretrained(f"model{seed}")
    models = "".join(f"- model: model{seed}\n" for seed in range(3))
    Path("median.yml").write_text(f"merge_method: median\nmodels:\n{models}")
    names = run_guide("recipes.md", {"__name__": "guide"})
    states = [load_file(f"model{seed}/model.safetensors") for seed in range(3)]
    for name, found in load_file("merged/model.safetensors").items():
        assert torch.equal(found, torch.stack([state[name] for state in states]).median(0).values)
    assert names["Median"].name == "median"
