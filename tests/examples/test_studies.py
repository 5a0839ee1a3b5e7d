"""The examples that are study files: each runs from its models to its report, at the smallest sizes."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import paretofuse as pf
from tests.support.command import call
from tests.support.process import ROOT


@pytest.fixture(params=["lora", "vision"])
def example(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of an example whose study takes two steps and two points, in the current directory."""
    for package in {"lora": ("peft",), "vision": ("open_clip", "sklearn")}[request.param]:
        pytest.importorskip(package)
    folder = shutil.copytree(
        ROOT / "examples" / request.param,
        tmp_path / request.param,
        ignore=shutil.ignore_patterns("models", "study"),
    )
    text = (folder / "paretofuse.toml").read_text(encoding="utf-8")
    text, count = re.subn(r"(steps|points) = \d+", r"\1 = 2", text)
    assert count == 2
    (folder / "paretofuse.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks for it
def test_from_models_to_a_report(capsys: pytest.CaptureFixture[str], example: Path) -> None:
    (models,) = example.glob("*_models.py")
    with torch.random.fork_rng(devices=[]):
        import_module(models.stem).main(1)
    code, out, err = call(capsys, "study", "paretofuse.toml", "--quiet")
    assert (code, err) == (0, "")
    assert "study/report.html: the report" in out
    front = pf.Front.from_csv("study/sweep/front.csv")
    assert front.values.shape == (2, 2)
    made = {path.name for path in Path("study/merge/balanced").iterdir()}
    assert made & {"config.json", "open_clip_config.json"}
    assert Path("study/adapter/balanced/adapter_config.json").exists() == (example.name == "lora")


def test_held_out_rows_are_not_learned(example: Path) -> None:
    if example.name == "lora":
        texts = import_module("lora_texts")
        for name in texts.NAMES:
            learned, held_out = (texts.rows(name, held_out=own) for own in (False, True))
            assert len(held_out) > 128
            both = {tuple(row) for row in learned.tolist()} & {tuple(row) for row in held_out.tolist()}
            assert len(both) < 0.02 * len(held_out)  # a few are the same in many documents
    else:
        tasks = import_module("clip_tasks")
        learned, held_out = (tasks.images_of("digits", held_out=own)[0] for own in (False, True))
        assert (len(learned), len(held_out)) == (1348, 449)
