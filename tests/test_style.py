"""ruff, mypy and clang-format find nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def clean(*command: str | Path, **environment: str) -> None:
    import os

    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_check() -> None:
    clean(BIN / "ruff", "check", "--output-format", "concise", ".")


def test_ruff_format() -> None:
    clean(BIN / "ruff", "format", "--check", ".")


def test_clang_format() -> None:
    sources = [p for folder in ("csrc", "tests/csrc", "examples") for p in (ROOT / folder).rglob("*")]
    clean(
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
    clean(
        BIN / "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", cache, "-p", "paretofuse",
        MYPYPATH=str(tmp_path),
    )  # fmt: skip
