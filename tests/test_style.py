"""ruff, mypy and clang-format find nothing to say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.process import ROOT, run

BIN = Path(sys.executable).parent


def test_ruff_check() -> None:
    run(BIN / "ruff", "check", "--output-format", "concise", ".", cwd=ROOT)


def test_ruff_format() -> None:
    run(BIN / "ruff", "format", "--check", ".", cwd=ROOT)


def test_clang_format() -> None:
    sources = [p for folder in ("csrc", "tests/csrc", "examples") for p in (ROOT / folder).rglob("*")]
    run(
        BIN / "clang-format",
        "--dry-run",
        "--Werror",
        *[p for p in sources if p.suffix in (".h", ".cpp", ".c")],
    )


@pytest.mark.slow
def test_mypy(tmp_path: Path) -> None:
    # The rooms become one package only when installed; a tree of links shows mypy the same.
    package = tmp_path / "paretofuse"
    package.mkdir()
    for path in (ROOT / "python" / "paretofuse").iterdir():
        (package / path.name).symlink_to(path)
    for room in ("engine", "kernels"):
        (package / room).symlink_to(ROOT / room)
    cache = ROOT / ".mypy_cache"
    run(
        BIN / "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", cache, "-p", "paretofuse",
        MYPYPATH=str(tmp_path),
    )  # fmt: skip
