"""The documentation site builds without a warning, and CONTRIBUTING's map is of this house."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest

from tests.support.process import ROOT, run

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="the site's tools come with the extra `docs`")
    run(sys.executable, "-m", "sphinx", "-W", "-q", "-c", ROOT / "docs", ROOT, tmp_path)
    reference = (tmp_path / "docs" / "api.html").read_text(encoding="utf-8")
    for name in (
        "paretofuse.stack",
        "paretofuse.Engine.switch",
        "paretofuse.Front",
        "paretofuse.solvers.EPO",
    ):
        assert f'id="{name}"' in reference
    front = (tmp_path / "README.html").read_text(encoding="utf-8")
    assert "<munder>" in front  # the formula's sum
    for page in tmp_path.rglob("*.html"):  # the site works where there is no network
        found = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", page.read_text("utf-8")
        )
        assert found == [], page
    assert "paretofuse_switch" in (tmp_path / "docs" / "cpp_api.html").read_text(encoding="utf-8")


def test_every_page_is_on_the_site() -> None:
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f"\n{page.stem}\n" in contents, page


def test_every_public_header_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "cpp_api.md").read_text(encoding="utf-8")
    for header in (ROOT / "csrc" / "include" / "paretofuse").iterdir():
        assert f"../csrc/include/paretofuse/{header.name}\n" in page


def test_every_module_that_is_told_to_be_run_can_be() -> None:
    """`python -m` imports any module without a word: one that has no main says nothing and does nothing."""
    told = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
    told += [*(ROOT / "docs").glob("*.md"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]
    told += [path for room in ("engine", "kernels", "python") for path in (ROOT / room).rglob("*.py")]
    names = {
        name.rstrip(".")
        for path in told
        for name in re.findall(
            r"python3? -m ((?:paretofuse|benchmarks)[\w.]*)", path.read_text(encoding="utf-8")
        )
    }
    assert len(names) > 8
    assert [name for name in sorted(names) if not runs(name)] == []


def runs(name: str) -> bool:
    """Whether `python -m` has something to run."""
    spec = find_spec(name)
    assert spec is not None, name
    if spec.submodule_search_locations is not None:
        return find_spec(f"{name}.__main__") is not None
    return '__name__ == "__main__"' in Path(str(spec.origin)).read_text(encoding="utf-8")


def test_every_place_of_the_map_is_there() -> None:
    rows = re.findall(r"^\| (.*`.*) \|", CONTRIBUTING, re.M)
    places = re.findall(
        r"`((?:python|engine|kernels|csrc|benchmarks|tests|examples|docs)/.*?)`", "\n".join(rows)
    )
    assert len(places) > 30
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_every_step_of_the_walk_is_there_and_none_goes_up() -> None:
    steps = re.findall(r"^\d+\. `(.*?)`, `(.*?)`", CONTRIBUTING, re.M)
    assert len(steps) == 11
    for file, name in steps:
        assert re.search(
            rf"\b{name.split('.')[-1].split('::')[-1]}\b", (ROOT / file).read_text(encoding="utf-8")
        ), file
    rooms = [re.match(r"(engine/\w+/|engine/|csrc/\w+/)", file)[1] for file, _ in steps]  # type: ignore[index]
    # The second step asks two rooms below its own, one after the other.
    assert [room for room, _ in groupby(rooms)] == [
        "engine/", "engine/modules/", "engine/routing/", "engine/modules/", "engine/merging/", "csrc/bindings/",
        "csrc/src/",
    ]  # fmt: skip
