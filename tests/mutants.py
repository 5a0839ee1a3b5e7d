"""Mutation testing: small changes are made to the code one at a time, and some test should fail of each.

    python -m tests.mutants routing training --sample 100 --seed 0        or: make mutants ROOMS="routing training"

cosmic-ray finds and makes the changes, in a copy of the repository below build/mutants. Its own runner starts a process
for each, which imports PyTorch for seconds to run tests for one; here each mutant's tests run in a fork of one process
that has imported everything but paretofuse. pyproject.toml says which tests belong to which file ([tool.mutants]). With
--sample, as many mutants of each room are drawn at random, the same ones for one seed. Mutants of annotations, which
nothing executes, are left out. docs/mutants.md lists those that survived and why.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomllib
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).parents[1]
ROOMS = ("routing", "merging", "modules", "store", "training")


@dataclass(frozen=True)
class Survivor:
    """A mutant that no test noticed: where, what cosmic-ray calls it, and the line before and after."""

    place: str
    operator: str
    before: str
    after: str


def copy_of_the_repository(target: Path) -> None:
    """A tree to be changed, with the package put together from its rooms as an installation does."""
    shutil.rmtree(target, ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info")
    for name in ("engine", "kernels", "python", "csrc", "benchmarks", "tests", "docs", "examples"):
        shutil.copytree(ROOT / name, target / name, ignore=skipped, symlinks=True)
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, target / name)
    package = target / "paretofuse"
    package.mkdir()
    for path in (target / "python" / "paretofuse").iterdir():
        (package / path.name).symlink_to(path)
    for room in ("engine", "kernels"):
        (package / room).symlink_to(target / room)


def mutants_of(path: Path) -> Iterator[MutationSpec]:
    """Every mutant of a file, but of its annotations."""
    idle = [
        (part.lineno, part.col_offset, part.end_lineno, part.end_col_offset)
        for part in _annotations(ast.parse(path.read_text(encoding="utf-8")))
    ]
    for item in _all_work_items([path], {}):
        (mutation,) = item.mutations
        line, column = mutation.start_pos
        if not any((a, b) <= (line, column) <= (c or a, d or b) for a, b, c, d in idle):
            yield mutation


def _annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """The parts of a file that are there for readers and type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns
    for statement in tree.body:  # aliases such as Number = Tensor | float
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp | ast.Subscript):
            yield statement.value


def tests_pass(root: Path, tests: list[str], timeout: float) -> bool:
    """Run tests in a fork until the first failure; a run that takes too long counts as failed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        told = os.open(root / "last.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(told, stream)
        os.chdir(root)
        import pytest

        code = pytest.main([*tests, "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--assert=plain"])
        os._exit(int(code))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run(room: str, sample: int | None, seed: int, root: Path) -> tuple[int, list[Survivor]]:
    """Try a room's mutants; returns how many there were, and those that survived.

    Raises:
        RuntimeError: the tests fail without any mutant.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        chosen: dict[str, list[str]] = tomllib.load(file)["tool"]["mutants"]
    mutants = [m for path in sorted((root / "engine" / room).glob("**/*.py")) for m in mutants_of(path)]
    if sample is not None and sample < len(mutants):
        mutants = random.Random(seed).sample(mutants, sample)
    survivors: list[Survivor] = []
    seconds: dict[str, float] = {}
    for number, mutant in enumerate(mutants, start=1):
        name = str(mutant.module_path.relative_to(root))
        tests = chosen.get(name) or chosen[f"engine/{room}"]
        key = " ".join(tests)
        if key not in seconds:
            begun = time.monotonic()
            if not tests_pass(root, tests, 1800):
                raise RuntimeError(f"{key}: the tests fail without any mutant; {root}/last.log says how")
            seconds[key] = time.monotonic() - begun
        operator = get_operator(mutant.operator_name)(**mutant.operator_args)
        with use_mutation(mutant.module_path, operator, mutant.occurrence) as (before, after):
            alive = after is not None and tests_pass(root, tests, 60 + 5 * seconds[key])
        place = f"{name}:{mutant.start_pos[0]}"
        print(
            f"{room} {number}/{len(mutants)} {'SURVIVED' if alive else 'killed'} {place} {mutant.operator_name}",
            flush=True,
        )
        if alive:
            old, new = before.splitlines(), (after or "").splitlines()
            line = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new) - 1)
            survivors.append(Survivor(place, mutant.operator_name, old[line].strip(), new[line].strip()))
    return len(mutants), survivors


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rooms", nargs="*", default=ROOMS, help=f"of {', '.join(ROOMS)}; all by default")
    parser.add_argument("--sample", type=int, help="mutants of each room, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    code = 0
    for room in options.rooms:
        root = ROOT / "build" / "mutants" / room
        copy_of_the_repository(root)
        sys.path[:] = [str(root), *(part for part in sys.path if part not in ("", str(ROOT)))]
        import hypothesis  # noqa: F401
        import moocore  # noqa: F401
        import pytest  # noqa: F401
        import torch
        import torch.utils.data
        import transformers  # noqa: F401

        torch.set_num_threads(1)
        count, survivors = run(room, options.sample, options.seed, root)
        killed = count - len(survivors)
        print(f"{room}: {killed} of {count} killed ({killed / max(count, 1):.0%})")
        for survivor in survivors:
            print(f"- {survivor.place} {survivor.operator}: `{survivor.before}` -> `{survivor.after}`")
        code |= killed < 0.9 * count
    return code


if __name__ == "__main__":
    sys.exit(main())
