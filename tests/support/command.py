"""Runs the command line for the tests: in this process, or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from paretofuse.cli import main


def run(arguments: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "paretofuse", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main([str(word) for word in arguments])
    except SystemExit as stop:  # how argparse reports wrong usage
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
