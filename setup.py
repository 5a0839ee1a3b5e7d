"""The native extension; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# Products and sums are rounded one by one (no contraction), so that all instruction sets give the same bits.
COMPILE = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra"]

# Apple's compiler has no OpenMP.
THREADS = ["-DPARETOFUSE_STD_THREADS"] if sys.platform == "darwin" else ["-fopenmp"]

core = sorted(Path("csrc/src").glob("*.cpp"))

setup(
    ext_modules=[
        Pybind11Extension(
            "paretofuse._C",
            [path.as_posix() for path in (*core, Path("csrc/bindings/module.cpp"))],
            include_dirs=["csrc/include", "csrc/src"],
            depends=sorted(path.as_posix() for path in Path("csrc").rglob("*.h")),
            cxx_std=17,
            extra_compile_args=[*COMPILE, *THREADS],
            extra_link_args=THREADS,
        )
    ]
)
