"""The README's example runs as it stands, on tiny models."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.support.command import call
from tests.support.models import perturbed, tiny_gpt2

ROOT = Path(__file__).parents[1]


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = module(batch, labels=batch).loss
    return result


def python_blocks() -> list[str]:
    """The twelve lines, and tasks.py."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def tokenizer() -> Any:
    """A word a token, w0 to w99."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(101)}, unk_token="w100"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w100")


@pytest.mark.slow
def test_the_shell_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stack, train, sweep and merge: the headline, in a directory with what they name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (paretofuse \S.*)$", text, re.M)
    assert [line.split()[1] for line in lines] == ["stack", "fit", "sweep", "merge"]
    _, tasks = python_blocks()
    (tmp_path / "tasks.py").write_text(tasks, encoding="utf-8")
    base = tiny_gpt2()
    for seed, name in enumerate(("base", "news", "poems")):
        perturbed(base, seed, 0.02).save_pretrained(tmp_path / f"gpt2-{name}")
        tokenizer().save_pretrained(tmp_path / f"gpt2-{name}")
    generator = torch.Generator().manual_seed(0)
    for name in ("news", "poems", "news-test", "poems-test"):
        numbers = torch.randint(0, 100, (70,), generator=generator).tolist()
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{number}" for number in numbers), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for line in lines:
            code, _, err = call(capsys, *shlex.split(line)[1:])
            assert code == 0, err
    finally:
        sys.modules.pop("tasks", None)

    assert len(pf.Front.from_csv(tmp_path / "front.csv")) == 11
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    engine = pf.load(tmp_path / "both.pareto")
    assert not torch.allclose(engine.routers([0.7, 0.3]), torch.tensor([0.7, 0.3]))  # trained
    merged = type(base).from_pretrained(tmp_path / "gpt2-merged")
    expected = engine.merge({"news": 0.7, "poems": 0.3}).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_the_twelve_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, _ = python_blocks()
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
