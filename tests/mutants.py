"""Mutation testing: small changes are made to the code one at a time, and some test should fail of each.

    python -m tests.mutants routing training --sample 100 --seed 0        or: make mutants ROOMS="routing training"

cosmic-ray finds and makes the changes, in a copy of the repository below build/mutants. Its own runner starts a process
for each, which imports PyTorch for seconds to run tests for one; here each mutant's tests run in a fork of one process
that has imported everything but paretofuse. Which tests those are is measured: a first run of a room's tests, those of
[tool.mutants] in pyproject.toml, notes which of them reach which line, and how long each takes. A mutant gets the tests
that reach its line, the quickest first, until one fails; all tests where the line runs while modules are imported or
shared fixtures are made, or in other processes alone. With --sample, as many mutants of each room are drawn at random,
the same ones for one seed and one state of the code. docs/mutants.md lists those that survived and why.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomllib
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec
from coverage import Coverage

ROOT = Path(__file__).parents[1]
ROOMS = ("routing", "merging", "modules", "store", "training")
IDLE = {"Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq"}
"""Operators that are left out: CPython has one object for each small integer and each interned name."""

MEMORY = 8 << 30
"""Bytes that a mutant's tests may take, so that one that makes too much ends by itself."""


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
    """Every mutant of a file, but for those that change nothing: of annotations, of signatures' bare *, of IDLE."""
    text = path.read_text(encoding="utf-8")
    idle = [
        (part.lineno, part.col_offset, part.end_lineno, part.end_col_offset)
        for part in _annotations(ast.parse(text))
    ]
    for item in _all_work_items([path], {}):
        (mutation,) = item.mutations
        line, column = mutation.start_pos
        if (
            mutation.operator_name.partition("Operator_")[2] not in IDLE
            and not text.splitlines()[line - 1].startswith("*,", column)
            and not any((a, b) <= (line, column) <= (c or a, d or b) for a, b, c, d in idle)
        ):
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


def _statement(tree: ast.Module, line: int) -> range:
    """The lines of the innermost statement that a line is part of; of `if`, `for` or `def` those before its body."""
    found = range(line, line + 1)
    for node in ast.walk(tree):  # outer ones come first
        if isinstance(node, ast.stmt):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            body = getattr(node, "body", None)
            last = max(first, body[0].lineno - 1) if body else node.end_lineno or first
            found = range(first, last + 1) if first <= line <= last else found
    return found


class Survey:
    """A plugin of pytest that notes which lines of a folder each test runs, and the seconds it takes.

    What runs in no test or for several of them is noted for the test "".
    """

    def __init__(self, folder: Path) -> None:
        self.coverage = Coverage(data_file=None, config_file=False, include=[f"{folder}/*"])
        self.seconds: dict[str, float] = {}
        self._test = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._test, begun = item.nodeid, time.monotonic()
        self.coverage.switch_context(item.nodeid)
        result = yield
        self.seconds[item.nodeid] = time.monotonic() - begun
        self._test = ""
        self.coverage.switch_context("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        shared = fixturedef.scope != "function"
        self.coverage.switch_context("" if shared else self._test)
        result = yield
        self.coverage.switch_context(self._test)
        return result

    def write(self, root: Path) -> None:
        """Write root/survey.json: the seconds by test, and the tests by line by file."""
        data = self.coverage.get_data()
        lines = {
            str(Path(file).relative_to(root)): data.contexts_by_lineno(file) for file in data.measured_files()
        }
        (root / "survey.json").write_text(json.dumps({"seconds": self.seconds, "lines": lines}))


class Chosen:
    """A plugin of pytest that runs the chosen tests in their order, and ends the process where one takes too long."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits = limits

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {test: place for place, test in enumerate(self.limits)}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        signal.setitimer(signal.ITIMER_REAL, self.limits[item.nodeid])  # nobody handles it: the process ends
        result = yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        return result


def run_tests(root: Path, paths: list[str], plugin: Survey | Chosen) -> int:
    """Run tests in a fork until the first failure; returns how it ended: an exit code, or less than 0 for a signal."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        told = os.open(root / "last.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(told, stream)
        os.chdir(root)
        options = ["-x", "-q", "-m", "not slow and not long", "-p", "no:cacheprovider", "--assert=plain"]
        if isinstance(plugin, Survey):
            plugin.coverage.start()
        code = pytest.main([*paths, *options], plugins=[plugin])
        if isinstance(plugin, Survey):
            plugin.coverage.stop()
            plugin.write(root)
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that its tests have started
    return os.waitstatus_to_exitcode(status)


def run(room: str, sample: int | None, seed: int, root: Path) -> tuple[int, list[Survivor]]:
    """Try a room's mutants; returns how many there were, and those that survived.

    Raises:
        RuntimeError: the tests fail without any mutant.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        paths: list[str] = tomllib.load(file)["tool"]["mutants"][room]
    if run_tests(root, paths, Survey(root / "engine" / room)) != 0:
        raise RuntimeError(f"{room}: the tests fail without any mutant; {root}/last.log says how")
    survey = json.loads((root / "survey.json").read_text())
    mutants = [m for path in sorted((root / "engine" / room).glob("**/*.py")) for m in mutants_of(path)]
    random.Random(seed).shuffle(mutants)
    tried, survivors = 0, []
    for mutant in mutants:
        if tried == sample:
            break
        name = str(mutant.module_path.relative_to(root))
        place = f"{name}:{mutant.start_pos[0]}"
        limits = _tests_for(mutant, survey["lines"].get(name, {}), survey["seconds"])
        files = list(dict.fromkeys(test.partition("::")[0] for test in limits))
        operator = get_operator(mutant.operator_name)(**mutant.operator_args)
        begun = time.monotonic()
        with use_mutation(mutant.module_path, operator, mutant.occurrence) as (before, after):
            if after is None or not _is_code(after):
                continue
            code = run_tests(root, files, Chosen(limits))
        tried += 1
        how = {0: "SURVIVED", -signal.SIGALRM: "killed (took too long)"}.get(code, "killed")
        seconds = f"{time.monotonic() - begun:.0f} s, {len(limits)} tests"
        print(f"{room} {tried} {how} {place} {mutant.operator_name} ({seconds})", flush=True)
        if code == 0:
            old, new = before.splitlines(), after.splitlines()
            line = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new) - 1)
            survivors.append(Survivor(place, mutant.operator_name, old[line].strip(), new[line].strip()))
            print(f"    `{survivors[-1].before}` -> `{survivors[-1].after}`", flush=True)
    return tried, survivors


def _is_code(text: str) -> bool:
    """Whether a mutant can be compiled at all: `[*names]` gives `[/names]` too."""
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _tests_for(
    mutant: MutationSpec, lines: dict[str, list[str]], seconds: dict[str, float]
) -> dict[str, float]:
    """The tests that should notice a mutant, the likeliest first, and the seconds that each may take."""
    tree = ast.parse(mutant.module_path.read_text(encoding="utf-8"))
    reach = {t for n in _statement(tree, mutant.start_pos[0]) for t in lines.get(str(n), [])}
    nearby = {test for tests in lines.values() for test in tests}
    tests = [test for test in seconds if test in reach or "" in reach or not reach]
    tests.sort(key=lambda test: (test not in reach, test not in nearby, seconds[test]))
    return {test: 20 + 10 * seconds[test] for test in tests}


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
    os.environ["TRITON_INTERPRET"] = "1"  # what merges by Triton kernels is tested where there is no GPU
    sys.dont_write_bytecode = True
    code = 0
    for room in options.rooms:
        root = ROOT / "build" / "mutants" / room
        copy_of_the_repository(root)
        sys.path[:] = [str(root), *(part for part in sys.path if part not in ("", str(ROOT)))]
        import hypothesis  # noqa: F401
        import moocore  # noqa: F401
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
