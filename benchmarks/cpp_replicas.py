"""How fast is libparetofuse? Opening, switching and acquiring replicas, in programs without Python.

A GPT-2-sized store (124 million parameters, three experts) is opened in fresh processes: the opening itself, the first
switch, which pages the files in (from the system's cache here), and later ones, next to a copy with the same stores in
the same process. Replicas are acquired by 1, 2 and 8 threads: hits among eight merged ones, and misses, each of which
merges the model by one thread, so that the far quantiles of misses are the slowest of a few dozen. The numbers hold the
clock's own share. More threads than cores wait for their turn, not for each other's locks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import disk_merge
from benchmarks.record import CACHE, ROOT, BenchmarkError, MissingContender, Options, Row, check, milliseconds

STACK = """
import sys
import paretofuse as pf
base, *experts = sys.argv[2:]
pf.stack(base, {name.rpartition("/")[2]: name for name in experts}).save(sys.argv[1])
"""
THREADS = (1, 2, 8)


def run(options: Options) -> list[Row]:
    """Measure all of it."""
    program = _build()
    seconds = 0.2 if options.quick else 2.0
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        folder = Path(name)
        disk_merge.write_models(folder, options.quick)
        models = [str(folder / model) for model in ("base", *disk_merge.SHARES)]
        store = str(folder / "store")
        _call(sys.executable, "-c", STACK, store, *models)
        opened = [_json(program, "open", store) for _ in range(options.repeat(9))]
        acquired = {
            (mode, threads): [
                _json(program, mode, store, str(threads), str(seconds)) for _ in range(options.repeat(3))
            ]
            for mode in ("hits", "misses")
            for threads in THREADS
        }
    check(options.quick or opened[0]["moved"] > 1e9, "the store is not of GPT-2's size")
    rows = [
        _milliseconds("open GPT-2's store", [r["open"] for r in opened], target="<= 20"),
        _milliseconds("first switch", [r["first"] for r in opened]),
        Row(
            "later switches", "libparetofuse", "time", "ms", milliseconds([r["switch"] for r in opened]),
            gb_per_s=opened[0]["moved"] / sorted(r["switch"] for r in opened)[len(opened) // 2] / 1e9,
            comparison="bandwidth, ours / copy", ratio=sorted(r["share"] for r in opened)[len(opened) // 2],
            target=">= 0.85",
        ),
    ]  # fmt: skip
    for (mode, threads), results in acquired.items():
        for quantile in ("p50", "p99", "p99.9"):
            values = [result[quantile] / 1000 for result in results]
            target = "<= 1" if (mode, threads, quantile) == ("hits", 8, "p50") else ""
            case = f"acquire, {mode}, {threads} threads, {quantile}"
            rows.append(Row(case, "libparetofuse", quantile, "µs", values, target=target))
    return rows


def _milliseconds(case: str, seconds: list[float], target: str = "") -> Row:
    return Row(case, "libparetofuse", "time", "ms", milliseconds(seconds), target=target)


def _build() -> Path:
    """The measuring program, built in the benchmarks' cache."""
    if shutil.which("cmake") is None:
        raise MissingContender("needs cmake and a C++17 compiler")
    folder = CACHE / "cpp"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DPARETOFUSE_BENCHMARKS=ON"]
    spec = find_spec("nlohmann_json")
    if spec is not None and spec.origin is not None:
        options.append(f"-DPARETOFUSE_JSON_INCLUDE={Path(spec.origin).parent / 'include'}")
    _call("cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), *options)
    _call("cmake", "--build", str(folder), "--parallel", "2", "--target", "measure")
    return folder / "measure"


def _json(program: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_call(str(program), *arguments))
    return found


def _call(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError((done.stdout + done.stderr)[-2000:])
    return done.stdout
