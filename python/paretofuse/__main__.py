"""`python -m paretofuse`: the command line, and `--cmakedir` for builds that embed the C++ library."""

from __future__ import annotations

import sys
from pathlib import Path


def cmake_dir() -> Path:
    """The folder with libparetofuse's sources and CMakeLists.txt, for CMake's add_subdirectory.

    Raises:
        FileNotFoundError: this installation lacks them.
    """
    here = Path(__file__).resolve()
    # Installed beside this file; in a checkout, and so in an editable installation, at the top.
    for folder in (here.parent / "csrc", here.parents[2] / "csrc"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise FileNotFoundError(
        f"no C++ sources beside {here.parent}; install paretofuse again, from a wheel or a checkout"
    )


def main() -> int:
    """Run the command line of this process and return its exit code."""
    if sys.argv[1:] == ["--cmakedir"]:
        print(cmake_dir())
        return 0
    from paretofuse.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
