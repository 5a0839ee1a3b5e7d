"""The tests on every Python that pyproject.toml claims, and once with the oldest dependencies that it allows.

    python .ci/versions.py                          all, one after the other, each in an environment of its own
    python .ci/versions.py --only 3.12 lowest       some
    python .ci/versions.py --only triton-3.6        the kernels alone, their whole static proof too, with that Triton
    python .ci/versions.py -- tests/store -x        other arguments for pytest than the default, all quick tests

"lowest" is the oldest Python with the oldest allowed torch, numpy and so on, those of the users' extras too. A
Python that this machine lacks is told at the end, and fails the run: nothing counts as tried that was not. Each
environment takes about 6 GB with PyTorch's default build and is removed at its end.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
USERS_EXTRAS = ("hf", "openclip", "plot", "torchjd")
QUICK = ["-q", "-n", "2", "-m", "not slow and not long", "--ignore", "tests/test_style.py", "tests"]
LOWEST = "lowest"
TRITON = "triton-3.6"
"""Of a ready-made image with torch 2.11; the interpreter of that Triton needs NumPy before 2.4."""
TRITON_PINS = ["torch==2.11.*", "triton==3.6.*", "numpy==2.3.*"]
KERNELS = ["-q", "-m", "", "tests/kernels"]


def claimed() -> list[str]:
    """The versions of Python in the classifiers, oldest first."""
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c) for c in PROJECT["classifiers"]]
    return sorted((match[1] for match in found if match), key=lambda version: int(version.split(".")[1]))


def lowest_requirements() -> list[str]:
    """Every requirement of users, as a constraint to the oldest release it allows."""
    optional = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for extra in USERS_EXTRAS for line in optional[extra])]
    return [re.sub(r"\[.*?\]", "", line).replace(">=", "==") for line in wanted]


def interpreter(version: str) -> Path | None:
    """A Python of that version on this machine: on the path, or one that pyenv keeps."""
    found = shutil.which(f"python{version}")
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for path in ([Path(found)] if found else []) + kept:
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        told = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if told.stdout.strip() == version:  # a shim of pyenv may be there without its Python
            return path
    return None


def run(python: Path, constraints: list[str], pytest: list[str]) -> bool:
    """Whether the tests pass with an interpreter in a new environment, under pip's constraints."""
    with tempfile.TemporaryDirectory(prefix="paretofuse-versions-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = Path(folder) / "bin" / "python"
        pins = Path(folder) / "constraints.txt"
        pins.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        install = [own, "-m", "pip", "install", "--quiet", "--constraint", pins, "--editable", ".[test]"]
        if subprocess.run(install, cwd=ROOT, check=False).returncode != 0:
            return False
        subprocess.run([own, "-m", "pip", "list"], cwd=ROOT, check=True)
        return subprocess.run([own, "-m", "pytest", *pytest], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = [*claimed(), LOWEST, TRITON]
    parser.add_argument("--only", nargs="+", choices=runs, default=runs, metavar="RUN", help=", ".join(runs))
    options = parser.parse_args(words[:at])
    results = {}
    for name in options.only:
        python = interpreter({LOWEST: claimed()[0], TRITON: claimed()[-1]}.get(name, name))
        print(f"== {name}: {python or 'no interpreter'}", flush=True)
        if python is None:
            results[name] = "MISSING: not tried, no such Python on this machine"
            continue
        constraints = {LOWEST: lowest_requirements(), TRITON: TRITON_PINS}.get(name, [])
        # Old releases warn of each other's ways, which is no fault of ours.
        lenient = ["-W", "default"] if constraints else []
        tests = words[at + 1 :] or (KERNELS if name == TRITON else QUICK)
        passed = run(python, constraints, [*lenient, *tests])
        results[name] = "passed" if passed else "FAILED"
    print("\n".join(f"{name}: {result}" for name, result in results.items()))
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
