"""How fast, how small and how sound is libparetofuse? In programs without Python.

A GPT-2-sized store (124 million parameters, four experts, bfloat16) is opened in fresh processes: the opening itself,
the first switch, which pages the files in, and later ones, next to a copy with the same stores in the same process. The
files come from the system's page cache, and in further runs from the disk, after the system was told to forget them; a
plain read of the same files from the disk stands beside that. Replicas are acquired by 1, 2 and 8 threads: hits among
eight merged ones, and misses, each of which merges the model by one thread, so that the far quantiles of misses are
the slowest of a few dozen. The numbers hold the clock's own share. More threads than cores wait for their turn, not for
each other's locks.

Then: the library's size without symbols, a clean build on two cores, a whole process of examples/cpp/hello_switch on a
store of the demo's size, 10,000 switches under the address sanitizer and without, and eight threads for a minute under
the thread sanitizer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import paretofuse as pf
from benchmarks.harness.record import (
    CACHE,
    ROOT,
    BenchmarkError,
    MissingContender,
    Options,
    Row,
    check,
    milliseconds,
)
from benchmarks.models.tiny_vit import TinyViT
from benchmarks.speed import disk_merge

STACK = """
import sys
import paretofuse as pf
base, *experts = sys.argv[2:]
pf.stack(base, {name.rpartition("/")[2]: name for name in experts}).save(sys.argv[1])
"""
THREADS = (1, 2, 8)
SWITCHES = 10_000


def run(options: Options) -> list[Row]:
    """Measure all of it."""
    if shutil.which("cmake") is None:
        raise MissingContender("needs cmake and a C++17 compiler")
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        folder = Path(name)
        rows = [*_opening_and_replicas(options, folder), *_size_and_build(options, folder)]
        small = folder / "small"
        _write_demo_store(small)
        return [*rows, *_hello(options, small), *_soundness(options, small)]


def _opening_and_replicas(options: Options, folder: Path) -> list[Row]:
    program = _build("cpp", "measure", "-DPARETOFUSE_BENCHMARKS=ON")
    seconds = 0.2 if options.quick else 2.0
    disk_merge.write_models(folder, options.quick)
    models = [str(folder / model) for model in ("base", *disk_merge.SHARES)]
    store = folder / "store"
    _call(sys.executable, "-c", STACK, store, *models)
    opened = [_json(program, "open", store) for _ in range(options.repeat(9))]
    cold, reads = [], []
    for _ in range(options.repeat(5)):
        _forget(store)
        reads.append(_timed(lambda: _read(store)))
        _forget(store)
        cold.append(_json(program, "open", store))
    check(options.quick or opened[0]["moved"] > 1e9, "the store is not of GPT-2's size")
    switches = sorted(r["switch"] for r in opened)
    median, share = switches[len(switches) // 2], sorted(r["share"] for r in opened)[len(switches) // 2]
    nbytes = sum(file.stat().st_size for file in _tensor_files(store))
    cold_first = sorted(r["first"] / read for r, read in zip(cold, reads, strict=True))[len(cold) // 2]
    rows = [
        _milliseconds("open GPT-2's store", [r["open"] for r in opened], target="<= 20"),
        _milliseconds("open GPT-2's store, from the disk", [r["open"] for r in cold]),
        _milliseconds("first switch", [r["first"] for r in opened]),
        Row(
            "first switch, from the disk", "libparetofuse", "time", "ms", milliseconds([r["first"] for r in cold]),
            comparison="ours / reading the files", ratio=cold_first,
        ),
        Row(
            "first switch, from the disk", "reading the files", "time", "ms", milliseconds(reads),
            gb_per_s=nbytes / sorted(reads)[len(reads) // 2] / 1e9,
        ),
        Row(
            "later switches", "libparetofuse", "time", "ms", milliseconds(switches),
            gb_per_s=opened[0]["moved"] / median / 1e9,
            comparison="bandwidth, ours / copy", ratio=share, target=">= 0.85",
        ),
    ]  # fmt: skip
    for mode in ("hits", "misses"):
        for threads in THREADS:
            results = [
                _json(program, mode, store, str(threads), str(seconds)) for _ in range(options.repeat(3))
            ]
            for quantile in ("p50", "p99", "p99.9"):
                values = [result[quantile] / 1000 for result in results]
                target = "<= 1" if (mode, threads, quantile) == ("hits", 8, "p50") else ""
                case = f"acquire, {mode}, {threads} threads, {quantile}"
                rows.append(Row(case, "libparetofuse", quantile, "µs", values, target=target))
    return rows


def _size_and_build(options: Options, folder: Path) -> list[Row]:
    rounds = 1 if options.quick else options.repeat(3)
    targets = ("paretofuse_shared", "paretofuse_static")
    seconds = [_timed(partial(_build_in, folder / f"build{i}", *targets)) for i in range(rounds)]
    stripped = folder / "stripped"
    _call("strip", "-o", stripped, (folder / "build0" / "libparetofuse.so").resolve())
    size = stripped.stat().st_size / 1e3
    return [
        Row("shared library, stripped", "libparetofuse", "size", "kB", [size], target="<= 500"),
        Row("clean build, both libraries, two jobs", "libparetofuse", "time", "s", seconds, target="<= 30"),
    ]  # fmt: skip


def _hello(options: Options, store: Path) -> list[Row]:
    program = _build("cpp", "hello_switch", "-DPARETOFUSE_EXAMPLES=ON", inside="examples/hello_switch")
    processes, inner = [], []
    for _ in range(options.repeat(31)):
        start = time.perf_counter()
        printed = _call(program, store)
        processes.append(time.perf_counter() - start)
        inner.append(float(printed.split()[-2]) / 1000)
    return [
        _milliseconds("hello_switch, the whole process", processes, target="<= 10"),
        _milliseconds("hello_switch, open and switch", inner, target="<= 10"),
    ]


def _soundness(options: Options, store: Path) -> list[Row]:
    """Each program exits with an error, which stops the benchmark, where something leaks, races or is wrong."""
    switches = 200 if options.quick else SWITCHES
    calls = 100 if options.quick else 5000  # of each of 8 threads
    tests = "-DPARETOFUSE_TESTS=ON"
    soak = _build("cpp", "soak", tests)
    half, end = map(int, re.findall(r"(\d+) KiB", _call(soak, store, str(switches))))
    sanitized = _build("cpp-asan", "soak", tests, "-DPARETOFUSE_SANITIZE=address,undefined")
    environment = {"ASAN_OPTIONS": "detect_leaks=1:quarantine_size_mb=1"}
    _call(sanitized, store, str(switches), **environment)
    racing = _build(
        "cpp-tsan", "stress_replicas", tests, "-DPARETOFUSE_STD_THREADS=ON", "-DPARETOFUSE_SANITIZE=thread"
    )
    (wrong,) = map(int, re.findall(r"(\d+) wrong", _call(racing, store, str(calls), "8", "3", "6")))
    return [
        Row(f"{switches} switches", "libparetofuse", "growth of memory", "KiB", [max(0, end - half)], target="<= 1024"),
        Row(f"{switches} switches, address sanitizer", "libparetofuse", "leaks", "", [0], target="<= 0"),
        Row(f"8 threads, 3 replicas, {8 * calls} calls, thread sanitizer", "libparetofuse", "wrong checksums", "",
            [wrong], target="<= 0"),
    ]  # fmt: skip


def _write_demo_store(path: Path) -> None:
    """Of the demo's shape, with random weights."""
    torch.manual_seed(0)
    pf.stack(TinyViT(), {"first": TinyViT(), "second": TinyViT()}, route="tensor").save(path)


def _tensor_files(store: Path) -> list[Path]:
    return sorted(store.rglob("*.safetensors"))


def _forget(store: Path) -> None:
    """Ask the system to drop a store's files from its page cache."""
    for path in _tensor_files(store):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(store: Path) -> None:
    block = bytearray(16 << 20)
    for path in _tensor_files(store):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _milliseconds(case: str, seconds: list[float], target: str = "") -> Row:
    return Row(case, "libparetofuse", "time", "ms", milliseconds(seconds), target=target)


def _build(name: str, target: str, *options: str, inside: str | None = None) -> Path:
    """A program, built in the benchmarks' cache."""
    _build_in(CACHE / name, target, options=options)
    return CACHE / name / (inside or target)


def _build_in(folder: Path, *targets: str, options: tuple[str, ...] = ()) -> None:
    words = ["-DCMAKE_BUILD_TYPE=Release", *options]
    spec = find_spec("nlohmann_json")
    if spec is not None and spec.origin is not None:
        words.append(f"-DPARETOFUSE_JSON_INCLUDE={Path(spec.origin).parent / 'include'}")
    _call("cmake", "-S", ROOT / "csrc", "-B", folder, *words)
    _call("cmake", "--build", folder, "--parallel", "2", "--target", *targets)


def _json(program: Path, *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_call(program, *arguments))
    return found


def _call(*command: str | Path, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        raise BenchmarkError((done.stdout + done.stderr)[-2000:])
    return done.stdout
