"""What all benchmarks share: interleaved timing, peak memory, one row for each result, and the CSV files.

A row is one contender in one case: the median and the quartiles over rounds in which all contenders take their turn,
so that noise hits them alike, and one ratio to another contender: the median of the rounds' own ratios.
"""

from __future__ import annotations

import csv
import datetime
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from paretofuse.engine.merging import native

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "benchmarks" / "cache"
DATA = ROOT / "benchmarks" / "data"


class BenchmarkError(RuntimeError):
    """A benchmark cannot run or gave a wrong result; the message says why."""


class MissingContender(BenchmarkError):
    """Another project's package that a benchmark compares with cannot be had."""


@dataclass(frozen=True)
class Options:
    """How to run: `quick` makes everything tiny, only to see that it works."""

    quick: bool = False
    threads: int = field(default_factory=lambda: min(2, available_cores()))
    rounds: int | None = None

    def repeat(self, full: int) -> int:
        """Rounds to run: as asked for, else 2 when quick, else the benchmark's own number."""
        return self.rounds or (2 if self.quick else full)


@dataclass(frozen=True)
class Row:
    """One line of the CSV file.

    Attributes:
        case: what was done, such as "merge fp32".
        contender: who did it.
        quantity: "time" or what else was measured; `unit` is its unit.
        values: one for each round.
        gb_per_s: necessary bytes by the median time, 10^9 bytes a second.
        bandwidth_share: that by the copy's, in the same process.
        comparison: what `ratio` divides, such as "theirs / ours".
        target: what the ratio should be, such as ">= 15"; empty where there is none.
    """

    case: str
    contender: str
    quantity: str
    unit: str
    values: Sequence[float]
    gb_per_s: float | None = None
    bandwidth_share: float | None = None
    comparison: str = ""
    ratio: float | None = None
    target: str = ""

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third, over the rounds."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        lower, _, upper = statistics.quantiles(self.values, n=4, method="inclusive")
        return lower, upper

    @property
    def met(self) -> bool | None:
        """Whether the ratio (or, without one, the median) reached the target; None where there is none."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        value = self.median if self.ratio is None else self.ratio
        return value >= float(bound) if sign == ">=" else value <= float(bound)


@dataclass(frozen=True)
class Context:
    """When, where and with what a run was made; the same in all of its rows."""

    date: str
    quick: bool
    cpu: str
    cores: int
    isa: str
    threads: int
    python: str
    torch: str
    paretofuse: str
    commit: str


COLUMNS = (
    "benchmark", "case", "contender", "quantity", "unit", "rounds", "median", "lower_quartile", "upper_quartile",
    "gb_per_s", "bandwidth_share", "comparison", "ratio", "target", "met", *(f.name for f in fields(Context)),
)  # fmt: skip


def context(options: Options) -> Context:
    """The context of a run that starts now."""
    return Context(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        quick=options.quick,
        cpu=_cpu(),
        cores=available_cores(),
        isa=native.chosen_isa(),
        threads=options.threads,
        python=platform.python_version(),
        torch=version("torch"),
        paretofuse=version("paretofuse"),
        commit=_commit(),
    )


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, by contender: every round calls each once, and the next starts with another."""
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def milliseconds(seconds: Sequence[float]) -> list[float]:
    """For rows."""
    return [1e3 * value for value in seconds]


def write(name: str, rows: Sequence[Row], about: Context, folder: Path) -> Path:
    """Append rows to a benchmark's CSV file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            lower, upper = row.quartiles
            record: dict[str, object] = {
                "benchmark": name,
                "case": row.case,
                "contender": row.contender,
                "quantity": row.quantity,
                "unit": row.unit,
                "rounds": len(row.values),
                "median": _number(row.median),
                "lower_quartile": _number(lower),
                "upper_quartile": _number(upper),
                "gb_per_s": _number(row.gb_per_s),
                "bandwidth_share": _number(row.bandwidth_share),
                "comparison": row.comparison,
                "ratio": _number(row.ratio),
                "target": row.target,
                "met": "" if row.met is None else ("yes" if row.met else "no"),
            }
            writer.writerow(record | asdict(about))
    return path


def table(rows: Sequence[Row]) -> str:
    """Rows as text."""
    lines = [("case", "contender", "median", "quartiles", "GB/s", "of copy", "ratio", "target")]
    for row in rows:
        lower, upper = row.quartiles
        ratio = "" if row.ratio is None else f"{row.comparison} = {row.ratio:.3g}"
        target = "" if row.met is None else f"{row.target} {'met' if row.met else 'MISSED'}"
        share = "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}"
        speed = "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}"
        spread = f"{lower:.4g} to {upper:.4g}" if len(row.values) > 1 else ""
        lines.append(
            (row.case, row.contender, f"{row.median:.4g} {row.unit}", spread, speed, share, ratio, target)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def check(condition: bool, message: str) -> None:
    """Stop a benchmark whose result is wrong: its speed would mean nothing.

    Raises:
        BenchmarkError: with the message, unless the condition holds.
    """
    if not condition:
        raise BenchmarkError(message)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reset_peak() -> None:
    """From now on `peak_bytes` counts anew (Linux only; elsewhere it keeps counting from the process's start)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory that was resident at once since `reset_peak`, all kinds of pages together."""
    found = resident("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident(entry: str = "VmRSS") -> int | None:
    """Bytes by an entry of /proc/self/status (VmRSS: all resident memory, RssAnon: not backed by a file)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), None)


_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss]))
"""
"""Starts the process to measure from a bare interpreter: a peak that starts from a larger parent would be its own."""


def measured_process(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[float, int]:
    """Run a command; its wall seconds from start to end, and its peak resident bytes.

    Raises:
        BenchmarkError: it failed; with the end of its output.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, *command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **(environment or {})},
    )
    code, seconds, peak = json.loads(done.stdout)
    if code != 0:
        raise BenchmarkError(f"{' '.join(command)}: exit code {code}\n{done.stderr[-3000:]}")
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)


def fetched(name: str, *requirements: str) -> Path:
    """A folder with packages of another project, installed by pip without their dependencies if not yet there.

    They stay out of this environment's own packages: put the folder on a child's PYTHONPATH, or load one file of it.

    Raises:
        MissingContender: pip failed.
    """
    target = CACHE / name
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=CACHE, prefix=f"{name}-"))
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new)]
        done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MissingContender(f"pip could not install {', '.join(requirements)}:\n{done.stderr[-1000:]}")
        if not target.is_dir():  # else another process was quicker
            new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target


def load_file_as_module(path: Path, name: str) -> ModuleType:
    """Import one Python file by its path, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MissingContender(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        # Rows that another benchmark of the same run has just added do not make the code another.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/data")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+dirty" if changed else commit
