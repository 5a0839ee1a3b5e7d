"""Who may enter which room: imports only go downwards, and the light paths stay light."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import paretofuse
from tests.support.process import ROOT, python

FOLDERS = {
    "paretofuse.kernels": ROOT / "kernels",
    "paretofuse.engine": ROOT / "engine",
    "paretofuse": ROOT / "python" / "paretofuse",
}

ORDER = [
    # From the ground up: a room may import itself and those of lines above its own; rooms of one line know nothing of
    # each other. A room is the longest name here that a module's name begins with.
    ["paretofuse._C", "paretofuse.kernels"],
    [
        "paretofuse.engine.errors",
        "paretofuse.engine.layout",
        "paretofuse.engine.extension",
        "paretofuse.engine.termination",
    ],
    ["paretofuse.engine.dtypes", "paretofuse.engine.distributed"],
    ["paretofuse.engine.routing"],
    ["paretofuse.engine.planes"],
    ["paretofuse.engine.store"],
    ["paretofuse.engine.methods"],
    ["paretofuse.engine.stacking"],
    ["paretofuse.engine.merging"],
    ["paretofuse.engine.modules"],
    ["paretofuse.engine.engine", "paretofuse.engine.solvers", "paretofuse.engine.evaluation"],
    ["paretofuse.engine.training"],
    ["paretofuse"],
    ["paretofuse.serving"],
    ["paretofuse.cli"],
    ["paretofuse.__main__"],
]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
PACKAGES = {"paretofuse", "paretofuse.engine", "paretofuse.kernels"}
"""Imported for their sub-modules, which are named one by one."""


def module_of(path: Path) -> str:
    """A file's dotted name."""
    for package, folder in FOLDERS.items():
        if path.is_relative_to(folder):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(part for part in parts if part != "__init__")
    raise ValueError(path)


FILES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))


def room_of(module: str) -> str:
    """The room that a module lies in."""
    return max((room for room in LEVELS if f"{module}.".startswith(f"{room}.")), key=len)


def imports(source: str) -> list[str]:
    """Every module that a file imports, anywhere in it; of `from a import b` a.b, and a where b is no module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names = [f"{prefix}.{alias.name}" for alias in node.names]
            found += names if prefix in PACKAGES else [prefix, *names]
    return found


def wrong_imports(module: str, source: str) -> list[str]:
    """The imports that a module must not make, each with the reason."""
    own = room_of(module)
    wrong = []
    for name in imports(source):
        if name.startswith("."):
            wrong.append(f"{name}: relative")
        elif name.split(".")[0] in ("engine", "kernels", "benchmarks", "tests"):
            wrong.append(f"{name}: not under paretofuse")
        elif name.split(".")[0] == "paretofuse":
            room = room_of(name)
            if room != own and LEVELS[room] >= LEVELS[own]:
                wrong.append(f"{name}: {own} stands below {room}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_imports_go_downwards(path: Path) -> None:
    assert wrong_imports(module_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("paretofuse.engine.routing.preference", "from paretofuse.engine.store.reader import Store"),
        ("paretofuse.engine.merging.flat", "import paretofuse.engine.modules.live"),
        ("paretofuse.engine.modules.live", "def f():\n    from paretofuse.engine.engine import Engine"),
        ("paretofuse.engine.solvers.epo", "from paretofuse.engine.evaluation import indicators"),
        ("paretofuse.engine.store.reader", "from paretofuse.engine import merging"),
        ("paretofuse.engine.layout", "import paretofuse"),
        ("paretofuse.kernels.launch", "from paretofuse.engine.layout import TILE"),
        ("paretofuse.engine.engine", "from .merging import bound"),
        ("paretofuse.engine.engine", "from engine.merging import bound"),
    ],
)
def test_a_back_edge_is_found(module: str, source: str) -> None:
    assert len(wrong_imports(module, source)) > 0


def test_every_folder_of_the_engine_is_a_room_with_a_charter() -> None:
    rooms = {f"paretofuse.engine.{path.parent.name}" for path in (ROOT / "engine").glob("*/__init__.py")}
    assert rooms <= set(LEVELS)
    for path in (ROOT / "engine").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_only_one_file_calls_the_extension() -> None:
    callers = [p for p in FILES if any("paretofuse._C" in n for n in imports(p.read_text(encoding="utf-8")))]
    assert callers == [ROOT / "engine" / "extension.py"]


def test_the_extension_works_for_the_store_and_one_file_of_a_room() -> None:
    users = {p for p in FILES if "paretofuse.engine.extension" in imports(p.read_text(encoding="utf-8"))}
    store = {p for p in users if p.parent == ROOT / "engine" / "store"}
    others = (
        "routing/routers.py", "merging/native.py", "merging/disk.py", "methods/native.py", "modules/bindings.py",
    )  # fmt: skip
    assert users - store == {ROOT / "engine" / name for name in others}


def test_only_the_binding_sees_pybind11_and_nothing_sees_torch_or_python() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp")]
    assert sources
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include\s*<(torch|ATen|c10)", text), path
        if path.parent.name != "bindings":
            assert not re.search(r"pybind11|Python\.h", text), path


def test_files_stay_small() -> None:
    long = {
        str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines())
        for folder in ("python", "engine", "kernels", "csrc", "benchmarks")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".cpp", ".h") and "cache" not in p.relative_to(ROOT).parts  # others' packages
    }
    assert {name: lines for name, lines in long.items() if lines > 450} == {}


def test_import_loads_neither_torch_nor_numpy() -> None:
    loaded = python(
        "import sys, paretofuse; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_every_public_name_resolves() -> None:
    program = "import paretofuse as pf; print([n for n in pf.__all__ if getattr(pf, n) is None])"
    assert python(program).strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        paretofuse.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "layout",
        "routing.preference",
        "extension",
        "planes.memory",
        "store.atomic",
        "store.safetensors_file",
        "store.reader",
        "store.writer",
        "merging.native",
        "merging.card",
        "merging.disk",
        "methods.registry",
    ],
)
def test_the_store_and_the_native_merge_need_no_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import paretofuse.engine.{module}; print('torch' in sys.modules)"
    assert python(code).strip() == "True"
