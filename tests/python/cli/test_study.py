"""`paretofuse study`: one file, one command; what is done stays, what changed is done anew; the report."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import paretofuse
from paretofuse.cli.program import COMMANDS
from paretofuse.cli.studies.file import read_study
from tests.support.command import call
from tests.support.models import perturbed, tiny_gpt2

TASKS = """
import torch

def loss(module, batch):
    return module(batch, labels=batch).loss

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 101, (2, 8), generator=generator) for _ in range(2)]

def objectives():
    return {"news": (batches(0), loss), "poems": (batches(1), loss)}

def losses(module):
    with open("count", "a") as file:
        file.write("x")
    return {name: float(loss(module, data[0])) for name, (data, _) in objectives().items()}

def late(module):
    import os, pathlib
    if len(pathlib.Path("count").read_text()) == int(os.environ["STOP_AT"]):
        raise KeyError("the disk is full")
    return losses(module)
"""
STUDY = """
title = "News <and> poems"
out = "made"

[all]
evaluate = "study_tasks:losses"
minimize = true
threads = 1

[stack]
base = "base"
expert = { news = "news", poems = "poems" }
head = ["nothing.*", "neither"]
static_weight = 0.2

[fit]
objectives = "study_tasks:objectives"
steps = 3
row-lr = 0.02
family = "rows"

[sweep]
points = 3
reference = { news = 9.0, poems = 9.0 }

[evaluate.even]
preference = { news = 0.5, poems = 0.5 }

[merge.even]
preference = { news = 0.5, poems = 0.5 }
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = tiny_gpt2()
    for seed, name in enumerate(("base", "news", "poems")):
        (base if name == "base" else perturbed(base, seed, 0.02)).save_pretrained(folder / name)  # type: ignore[operator]
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study beside its models and its module."""
    for name in ("base", "news", "poems"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "study_tasks.py").write_text(TASKS)
    (tmp_path / "paretofuse.toml").write_text(STUDY.replace('head = ["nothing.*", "neither"]\n', ""))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "study_tasks", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second must be seen
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("study_tasks", None)


def study(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, str, str]:
    sys.modules.pop("study_tasks", None)
    return call(capsys, "study", folder / "paretofuse.toml", "--quiet", *words)


def steps(out: str) -> dict[str, str]:
    """What was said of each step, by its name."""
    lines = [line.split(": ", 1) for line in out.splitlines() if ": " in line]
    return {
        name: said
        for name, said in lines
        if name.split(".")[0] in ("stack", "fit", "sweep", "evaluate", "merge")
    }


def edit(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def test_everything_once_then_only_what_changed(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, err = study(capsys, folder)
    assert (code, err) == (0, "")
    made = folder / "made"
    assert all(said.startswith("done in") for said in steps(out).values())
    assert list(steps(out)) == ["stack", "fit", "sweep", "evaluate.even", "merge.even"]
    engine = paretofuse.load(made / "fit" / "store")
    assert (engine.training or {})["steps"] == 3
    assert engine.routers.family == "rows"
    front = paretofuse.Front.from_csv(made / "sweep" / "front.csv")
    assert (len(front), front.directions) == (3, (False, False))
    even = json.loads((made / "evaluate" / "even" / "metrics.json").read_text())
    assert list(even["metrics"].values()) == pytest.approx(front.values[1].tolist(), rel=1e-5)
    assert (made / "merge" / "even" / "config.json").is_file()

    report = (made / "report.html").read_text(encoding="utf-8")
    assert "News &lt;and&gt; poems" in report
    assert "paretofuse fit made/stack " in report
    assert "--steps=3" in report
    assert "hypervolume" in report
    assert version("torch") in report
    assert '"store": "made/fit/store"' in report
    assert 'src="http' not in report

    count = len((folder / "count").read_text())
    code, out, _ = study(capsys, folder)
    assert (code, set(steps(out).values())) == (0, {"done before"})
    assert len((folder / "count").read_text()) == count

    edit(folder, "paretofuse.toml", "points = 3", "points = 2")
    code, out, _ = study(capsys, folder, "--dry-run")
    assert steps(out)["sweep"] == "would be done, as points changed"
    code, out, _ = study(capsys, folder)
    assert [name for name, said in steps(out).items() if said != "done before"] == ["sweep"]
    assert len(paretofuse.Front.from_csv(made / "sweep" / "front.csv")) == 2


def test_a_training_is_lost_only_by_force(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert study(capsys, folder)[0] == 0
    edit(folder, "paretofuse.toml", "steps = 3", "steps = 2")
    before = (folder / "made" / "fit" / "store" / "manifest.json").read_bytes()
    code, out, err = study(capsys, folder)
    assert (code, out) == (1, "")
    assert "[fit] was begun already, and steps changed since" in err
    assert (folder / "made" / "fit" / "store" / "manifest.json").read_bytes() == before
    edit(folder, "study_tasks.py", "manual_seed(seed)", "manual_seed(seed + 1)")
    code, out, _ = study(capsys, folder, "--force")
    assert code == 0
    said = steps(out)
    assert said.pop("stack") == "done before"
    assert all(text.startswith("done in") for text in said.values())
    assert (paretofuse.load(folder / "made" / "fit" / "store").training or {})["steps"] == 2


def test_what_was_cut_short_goes_on(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(
        folder,
        "paretofuse.toml",
        '[all]\nevaluate = "study_tasks:losses"',
        '[all]\nevaluate = "study_tasks:late"',
    )
    (folder / "count").write_text("")
    monkeypatch.setenv("STOP_AT", "2")
    code, _, err = study(capsys, folder)
    assert code == 1
    assert "the disk is full" in err
    if sys.version_info >= (3, 11):
        assert "in the step sweep" in err
    assert not (folder / "made" / "report.html").exists()
    monkeypatch.setenv("STOP_AT", "99")
    code, out, _ = study(capsys, folder)
    assert code == 0
    assert [steps(out)[name] for name in ("stack", "fit")] == ["done before"] * 2
    assert len((folder / "count").read_text()) == 3 + 1  # the third of the sweep, and evaluate.even
    (folder / "made" / "sweep" / "front.csv").unlink()
    code, out, _ = study(capsys, folder)
    assert [name for name, said in steps(out).items() if said != "done before"] == ["sweep"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 3", "stpes = 3", "got the key 'stpes' in [fit], which is not known; did you mean steps?"),
        ("[fit]", "[fitt]", "got the key 'fitt' in the file, which is not known; did you mean fit?"),
        ("threads = 1", "thread = 1", "got the key 'thread' in [all], which is not known; did you mean threads?"),
        ("steps = 3", "steps = 0", "[fit] steps: got '0', expected a whole number of at least 1"),
        ("steps = 3", "steps = true", "[fit] steps: got True, expected a text or a number"),
        ("minimize = true", "minimize = 1", "[sweep] minimize: got 1, expected true or false"),
        ('base = "base"', "", "[stack] the following arguments are required: BASE"),
        ('family = "rows"', 'family = "columns"', "[fit] family: invalid choice: 'columns'"),
        ('family = "rows"', 'checkpoint = "c"', "got the key 'checkpoint' in [fit], which is not known"),
        ("{ news = 0.5, poems = 0.5 }", "{ news = 0.5, poems = \"half\" }", "expected NAME=NUMBER"),
        ("[sweep]", "[merge.front]", "expected [stack] and at least one of [sweep] and [search]"),
        ("[merge.even]", "[merge.\"a b\"]", "expected tables with names of letters"),
        ('"made"', '"base"', "got the results' folder base, which is there and no study's"),
        ('"made"', '"made', "this is no TOML"),
        ("study_tasks:objectives", "study_tasks:goals", "[fit] objectives study_tasks:goals, but study_tasks has no"),
        ("study_tasks:losses", "study_tusks:losses", "there is no module 'study_tusks'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, old: str, new: str, message: str
) -> None:
    edit(folder, "paretofuse.toml", old, new)
    code, out, err = study(capsys, folder)
    assert (code, out) == (1, "")
    assert message in err
    assert not (folder / "made" / "fit").exists()  # found before any training


def test_yaml_and_another_folder(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "study.yaml").write_text(
        "all: {evaluate: study_tasks:losses, minimize: true}\n"
        "stack:\n  base: base\n  expert: {news: news, poems: poems}\n"
        "search: {budget: 4}\n"
    )
    pytest.importorskip("optuna")
    monkeypatch.chdir(folder.parent)
    words = ["study", folder / "study.yaml", "-o", "elsewhere-made", "--json", "--quiet"]
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    document = json.loads(out)
    place = folder.parent / "elsewhere-made"
    assert (document["out"], document["report"]) == (str(place), str(place / "report.html"))
    assert len(document["steps"]["search"]["preferences"]) == 4
    assert (place / "search" / "search.db").is_file()
    (folder / "study.yaml").write_text("stack: {base: base}\nstack: {}\n")
    assert "line 2: got the key 'stack' twice" in call(capsys, *words[:2])[2]


RECIPE = """
merge_method: linear
models:
  - {model: news, parameters: {weight: 0.5}}
  - {model: poems, parameters: {weight: 0.5}}
dtype: float32
"""


def test_a_recipe_makes_an_expert_and_the_result_is_served(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    served: list[tuple[Path, int]] = []

    def serve(app: Any, host: str, port: int, *, store: Path, **_: Any) -> None:
        assert app.state.serving.preferences.front is not None
        served.append((store.resolve(), port))

    monkeypatch.setattr("paretofuse.serving.server.serve", serve)
    (folder / "mixed.yml").write_text(RECIPE)
    (folder / "study_tasks.py").write_text(TASKS + "def answer(module, given): return given\n")
    (folder / "paretofuse.toml").write_text(
        '[stack]\nbase = "base"\nexpert = { news = "news", mixed = "study/recipe/mixed" }\n'
        '[sweep]\nevaluate = "study_tasks:losses"\nminimize = true\npoints = 2\n'
        '[recipe.mixed]\nconfig = "mixed.yml"\n'
        '[serve]\nport = 1234\npredict = "study_tasks:answer"\n'
    )
    code, out, err = study(capsys, folder, "--serve")
    assert (code, err) == (0, "")
    names = [line.split(": ")[0] for line in out.splitlines() if ": done in" in line]
    assert names == ["recipe.mixed", "stack", "sweep"]
    assert "no longer served" in out
    assert served == [(folder / "study" / "stack", 1234)]
    report = (folder / "study" / "report.html").read_text(encoding="utf-8")
    assert "paretofuse serve study/stack --port=1234 " in report
    assert "--front=study/sweep/front.csv" in report

    perturbed(tiny_gpt2(), 5, 0.02).save_pretrained(folder / "other")  # type: ignore[operator]
    (folder / "news").unlink()
    (folder / "news").symlink_to(folder / "other")
    code, out, _ = study(capsys, folder, "--dry-run", "--serve")
    assert "recipe.mixed: would be done, as the content of news changed" in out
    edit(folder, "paretofuse.toml", "port = 1234", "prot = 1234")
    code, out, err = study(capsys, folder)
    assert code == 1
    assert "got the key 'prot' in [serve], which is not known; did you mean port?" in err
    assert len(served) == 1


def test_the_guides_example_is_a_study(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "study.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", guide, re.S)
    (tmp_path / "paretofuse.toml").write_text(block)
    found = read_study(tmp_path / "paretofuse.toml", None, COMMANDS)
    assert [step.name for step in found.steps] == ["stack", "fit", "sweep", "merge.balanced"]
    assert (found.title, found.out, found.store) == ("News and poems", Path("study"), Path("study/fit/store"))
