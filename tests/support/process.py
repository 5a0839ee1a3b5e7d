"""Runs other programs for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path | None = None, code: int = 0, **environment: str) -> str:
    """Run a command that must exit with `code`; returns all that it printed.

    Args:
        command: its words.
        cwd: where to run it.
        code: the exit code to expect.
        environment: variables besides those of this process.
    """
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr[-8000:]}"
    return done.stdout + done.stderr


def python(program: str, *arguments: str | Path, code: int = 0, **environment: str) -> str:
    """Run a program's text in a new Python, as `run` does."""
    return run(sys.executable, "-c", program, *arguments, code=code, **environment)


def listed_files(root: Path = ROOT) -> list[str]:
    """The repository's files that git knows, or would."""
    listed = run("git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard")
    return [name for name in listed.splitlines() if (root / name).is_file()]
