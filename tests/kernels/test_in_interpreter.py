"""Runs every `test_*_interpreted.py` in Triton's interpreter.

Triton decides at import whether kernels are interpreted, once for a process, and other tests need them compiled or
absent. So the checks that need the interpreter stand in files of their own, which skip themselves here and run in a
child process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.kernels import needs_triton

triton = needs_triton()
if [int(n) for n in triton.__version__.split(".")[:2]] < [3, 7] and np.lib.NumpyVersion(
    np.__version__
) >= "2.4.0":
    pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(HERE.glob("test_*_interpreted.py")), ids=lambda path: path.stem)
def test_interpreted(file):
    """The interpreter's checks all pass, and none is skipped."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-W", "ignore:Conversion of an array with ndim:DeprecationWarning",  # by Triton before 3.7
         str(file)],
        # Plugins of others take as long to load as torch.
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, cwd=HERE.parents[1], check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"\d+ passed in", child.stdout), child.stdout
