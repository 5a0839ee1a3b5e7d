"""What docs/stability.md and the other pages of the house promise: public names, one version, a changelog."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path

import paretofuse as pf

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def promised() -> dict[str, list[str]]:
    """Each line of the page's list of names: what holds them, and they."""
    _, listed = text("docs/stability.md").split("## The names")
    entries = re.findall(r"^- `(.*?)`:((?:.|\n  )*)", listed, re.M)
    return {holder: re.findall(r"`(\w+)`", names) for holder, names in entries}


def missing(holder: str, names: list[str]) -> list[str]:
    """Those of the names that a module or a public class does not have; its constructor's attributes count."""
    if holder.startswith("paretofuse.") and holder.count(".") == 1 and hasattr(pf, holder.split(".")[1]):
        found = getattr(pf, holder.split(".")[1])
        if inspect.isclass(found):
            own = re.findall(r"self\.(\w+)", inspect.getsource(found)) + list(
                inspect.signature(found).parameters
            )
            return [name for name in names if not hasattr(found, name) and name not in own]
    public = import_module(holder).__all__
    return [name for name in names if name not in public]


def test_every_promised_name_is_there() -> None:
    lists = promised()
    assert {"paretofuse", "paretofuse.Engine", "paretofuse.Front", "paretofuse.solvers"} == set(lists)
    assert {holder: missing(holder, names) for holder, names in lists.items()} == {name: [] for name in lists}


def test_a_name_that_left_is_found() -> None:
    assert missing("paretofuse", ["stack", "gone"]) == ["gone"]
    assert missing("paretofuse.Engine", ["switch", "routers", "gone"]) == ["gone"]


def test_the_version_has_one_source() -> None:
    """pyproject.toml and CMake read the package's; only CITATION.cff, which is data, repeats it."""
    assert 'version = { attr = "paretofuse.__version__" }' in text("pyproject.toml")
    assert "project(paretofuse VERSION ${paretofuse_version} " in text("csrc/CMakeLists.txt")
    assert metadata("paretofuse")["Version"] == pf.__version__
    assert re.findall(r"^version: (\S+)$", text("CITATION.cff"), re.M) == [pf.__version__]


def test_the_changelog_tells_of_this_version() -> None:
    sections = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", text("CHANGELOG.md"), re.M)
    assert sections[0] == ("Unreleased", "")
    dates = dict(sections[1:])
    assert pf.__version__ in dates
    assert all(dates.values())
    assert f"date-released: {dates[pf.__version__]}" in text("CITATION.cff")


def test_every_claimed_python_has_its_classifier() -> None:
    project = text("pyproject.toml")
    claimed = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', project)
    assert claimed == [str(minor) for minor in range(int(claimed[0]), int(claimed[-1]) + 1)]
    assert f'requires-python = ">=3.{claimed[0]}"' in project
    workflow = text(".github/workflows/ci.yml")
    assert all(f"          3.{minor}\n" in workflow for minor in claimed[:-1])
    assert "bash .ci/run" in workflow


def test_modules_for_users_are_there_once_the_package_is() -> None:
    program = (
        "import paretofuse as pf; print(pf.solvers.EPO(), pf.methods.Group.__name__, 'solvers' in dir(pf))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "EPO(tolerance=0.0001) Group True\n"
