"""The native extension, and the packages found in the folders that pyproject.toml maps; all else is there."""

from __future__ import annotations

import sys
from pathlib import Path

import nlohmann_json
from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

# Products and sums are rounded one by one (no contraction), so that all instruction sets give the same bits.
COMPILE = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra"]

# Apple's compiler has no OpenMP.
THREADS = ["-DPARETOFUSE_STD_THREADS"] if sys.platform == "darwin" else ["-fopenmp"]

core = sorted(path for room in ("core", "simd", "store") for path in Path("csrc/src", room).glob("*.cpp"))

# pyproject.toml's own patterns know no package whose folder lies elsewhere than its name says.
ROOMS = {"paretofuse": "python/paretofuse", "paretofuse.engine": "engine", "paretofuse.kernels": "kernels"}
packages = [
    name
    for room, folder in ROOMS.items()
    for name in (room, *(f"{room}.{found}" for found in find_packages(folder)))
]

setup(
    packages=[*packages, "paretofuse.csrc"],
    ext_modules=[
        Pybind11Extension(
            "paretofuse._C",
            [path.as_posix() for path in (*core, *sorted(Path("csrc/bindings").glob("*.cpp")))],
            include_dirs=["csrc/include", "csrc/src", nlohmann_json.get_include()],
            depends=sorted(path.as_posix() for path in Path("csrc").rglob("*.h")),
            cxx_std=17,
            extra_compile_args=[*COMPILE, *THREADS],
            extra_link_args=THREADS,
        )
    ],
)
