"""Many threads open and write stores at once; in a process of its own, as what goes wrong here would end it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.process import ROOT, python

MAKE = {
    "writers": "_C.Fresh(f'{folder}/{number}.{index}', directory=False).discard()",
    "stores": "_C.Store(store)",
    "files": "_C.SafetensorsFile(store + '/base.safetensors')",
}

PROGRAM = """
import sys, threading
from paretofuse.engine.extension import _C
sys.setswitchinterval(1e-6)
store, folder = sys.argv[1:]

def work(number):
    for index in range(400):
        kept = [{make} for _ in range(6)]

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
"""


@pytest.mark.parametrize("kind", MAKE)
def test_objects_are_made_by_many_threads_at_once(tmp_path: Path, kind: str) -> None:
    """Made without the interpreter's lock, they broke pybind11's table of instances, one run in three."""
    store = ROOT / "tests" / "store" / "data" / "format1.pareto"
    assert python(PROGRAM.format(make=MAKE[kind]), store, tmp_path) == "done\n"


def test_no_constructor_is_called_without_the_lock() -> None:
    for source in (ROOT / "csrc" / "bindings").glob("*.cpp"):
        for constructor in re.findall(
            r"\.def\(py::init.*?(?=\n {6}\.def|;\n\n|;\n})", source.read_text(), re.S
        ):
            assert "call_guard" not in constructor, f"{source.name}: {constructor}"
