"""The README's example runs as it stands, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import perturbed, tiny_gpt2

ROOT = Path(__file__).parents[1]


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = module(batch, labels=batch).loss
    return result


def test_the_twelve_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len([line for line in block.splitlines() if line.strip()]) == 12
    monkeypatch.chdir(tmp_path)
    base = tiny_gpt2()
    for seed, name in enumerate(("base", "news", "poems")):
        perturbed(base, seed, 0.02).save_pretrained(f"gpt2-{name}")
    batches = torch.randint(0, 101, (4, 2, 12), generator=torch.Generator().manual_seed(0))

    def perplexities(module: nn.Module) -> dict[str, float]:
        return {"news": float(loss(module, batches[0]).exp()), "poems": float(loss(module, batches[1]).exp())}

    names: dict[str, Any] = {
        "news_batches": list(batches[:2]),
        "poem_batches": list(batches[2:]),
        "loss": loss,
        "perplexities": perplexities,
        "prompt": torch.arange(1, 6).unsqueeze(0),
    }
    exec(block, names)
    assert names["text"].shape == (1, 13)
    assert type(names["dense"]) is type(base)
    assert (tmp_path / "gpt2-half" / "model.safetensors").is_file()
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert len(names["front"].values) == 11


def test_links_and_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", text, re.M):
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
