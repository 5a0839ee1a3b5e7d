"""How long until work can begin? `import paretofuse`, and opening a GPT-2-sized store.

The import is timed as whole interpreters: one that imports paretofuse less one that imports nothing, in pairs. The
opening is timed inside fresh processes that have imported torch: first `paretofuse.api` (what `pf.load` and `pf.stack`
need, loaded when first used), then the first `pf.load` of the process, then another. "Anonymous memory" is what an
opening added to the process that no file backs: a store that is mapped and not copied adds next to none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.record import ROOT, BenchmarkError, Options, Row, check, interleave, milliseconds
from benchmarks.speed import disk_merge

IMPORT = "import paretofuse"
LOADED = "import sys, paretofuse; print('torch' in sys.modules)"
OPEN = """
import json, sys, time
import torch
from benchmarks.harness.record import resident
start = time.perf_counter()
import paretofuse.api as pf
imported = time.perf_counter() - start

def opened():
    before, start = resident("RssAnon"), time.perf_counter()
    engine = pf.load(sys.argv[1])
    seconds = time.perf_counter() - start
    return engine, seconds, ((resident("RssAnon") or 0) - (before or 0)) / 1e6

first, second = opened(), opened()
parameters = sum(spec.numel for spec in second[0].layout.tensors)
print(json.dumps({"first": first[1:], "again": second[1:], "imported": imported, "parameters": parameters}))
"""
STACK = """
import sys
import paretofuse as pf
base, *experts = sys.argv[2:]
pf.stack(base, {name.rpartition("/")[2]: name for name in experts}).save(sys.argv[1])
"""


def run(options: Options) -> list[Row]:
    """Measure both."""
    check(_python(LOADED).strip() == "False", "import paretofuse imports torch")
    times = interleave({"bare": lambda: _python("pass"), "ours": lambda: _python(IMPORT)}, options.repeat(21))
    added = [ours - bare for ours, bare in zip(times["ours"], times["bare"], strict=True)]
    rows = [
        Row("import paretofuse", "ours", "time", "ms", milliseconds(added), target="<= 100"),
        Row("bare interpreter", "python", "time", "ms", milliseconds(times["bare"])),
    ]
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        folder = Path(name)
        disk_merge.write_models(folder, options.quick)
        models = [str(folder / model) for model in ("base", *disk_merge.SHARES)]
        _python(STACK, str(folder / "store"), *models)
        found = [json.loads(_python(OPEN, str(folder / "store"))) for _ in range(options.repeat(9))]
    check(found[0]["parameters"] > (1e4 if options.quick else 1e8), "the store is not of GPT-2's size")
    imported = milliseconds([result["imported"] for result in found])
    rows.append(Row("import paretofuse.api after torch", "ours", "time", "ms", imported))
    for which, case in (
        ("first", "open GPT-2's store, first in its process"),
        ("again", "open GPT-2's store again"),
    ):
        seconds = [result[which][0] for result in found]
        grown = [result[which][1] for result in found]
        rows.append(Row(case, "pf.load", "time", "ms", milliseconds(seconds), target="<= 100"))
        rows.append(Row(case, "pf.load", "anonymous memory added", "MB", grown))
    return rows


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchmarkError(done.stderr[-2000:])
    return done.stdout
