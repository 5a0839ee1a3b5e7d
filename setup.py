"""The native extension, and the packages found in the folders that pyproject.toml maps; all else is there."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import nlohmann_json
import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

# Products and sums are rounded one by one (no contraction), so that all instruction sets give the same bits.
COMPILE = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra"]

# Apple's compiler has no OpenMP.
THREADS = ["-DPARETOFUSE_STD_THREADS"] if sys.platform == "darwin" else ["-fopenmp"]

headers = sorted(path.as_posix() for path in Path("csrc").rglob("*.h"))
core = sorted(path for room in ("core", "simd", "store") for path in Path("csrc/src", room).glob("*.cpp"))

# pyproject.toml's own patterns know no package whose folder lies elsewhere than its name says.
ROOMS = {"paretofuse": "python/paretofuse", "paretofuse.engine": "engine", "paretofuse.kernels": "kernels"}
packages = [
    name
    for room, folder in ROOMS.items()
    for name in (room, *(f"{room}.{found}" for found in find_packages(folder)))
]


class BuildExt(build_ext):
    """Keeps the objects in the checkout; an editable install would compile all of them anew each time."""

    def initialize_options(self) -> None:
        """Name the folder before setuptools names a temporary one, by all that an object is made with."""
        super().initialize_options()
        python = f"{sys.platform}-{sys.implementation.cache_tag}"
        self.build_temp = (
            f"build/objects-{python}-pybind11-{pybind11.__version__}-json-{version('nlohmann-json')}"
        )


def is_old(built: str, source: str) -> bool:
    """Whether an object is older than what it is made of; of headers and settings, any of them."""
    made_of = (source, *headers, __file__, "pyproject.toml")
    return Path(built).stat().st_mtime <= max(Path(path).stat().st_mtime for path in made_of)


ParallelCompile("MAX_JOBS", needs_recompile=is_old).install()  # MAX_JOBS=1: one file at a time
setup(
    packages=[*packages, "paretofuse.csrc"],
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Pybind11Extension(
            "paretofuse._C",
            [path.as_posix() for path in (*core, *sorted(Path("csrc/bindings").glob("*.cpp")))],
            include_dirs=["csrc/include", "csrc/src", nlohmann_json.get_include()],
            depends=headers,
            cxx_std=17,
            extra_compile_args=[*COMPILE, *THREADS],
            extra_link_args=THREADS,
        )
    ],
)
