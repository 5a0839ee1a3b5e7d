"""examples/notebook: every cell runs, from two directories to a server that answers, at the smallest sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.process import ROOT

NOTEBOOK = ROOT / "examples" / "notebook" / "front.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::ResourceWarning")
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the notebook's tools are among what the tests need")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (first, *_) = (cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, count = re.subn(r"STEPS = \d+", "STEPS = 4", first.source)
    assert count == 1
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    (folder,) = tmp_path.glob("paretofuse-*")
    assert (folder / "merged" / "config.json").is_file()
    assert (folder / "front.html").is_file()
    answers = notebook.cells[-2].outputs[-1]["data"]["text/plain"]
    assert answers.count(":") >= 3
    assert notebook.cells[-1].outputs[-1]["data"]["text/plain"] if notebook.cells[-1].outputs else True
