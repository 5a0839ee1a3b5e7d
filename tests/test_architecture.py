"""Who may enter which room: imports only go downwards, and the light paths stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import paretofuse

ROOT = Path(__file__).parents[1]
ROOMS = {
    "kernels": (ROOT / "kernels", ("paretofuse.kernels",)),
    "engine": (ROOT / "engine", ("paretofuse.engine", "paretofuse.kernels")),
    "python": (ROOT / "python" / "paretofuse", ("paretofuse",)),
}
FILES = [(room, path) for room, (folder, _) in ROOMS.items() for path in sorted(folder.rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            found += [prefix] + [f"{prefix}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize(("room", "path"), FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES])
def test_imports_go_downwards(room: str, path: Path) -> None:
    allowed = ROOMS[room][1]
    for name in imports(path):
        assert not name.startswith("."), f"{path}: relative import {name}"
        assert name.split(".")[0] not in ("engine", "kernels", "benchmarks", "tests"), (
            f"{path}: bare import {name}"
        )
        if name == "paretofuse" or name.startswith("paretofuse."):
            if name in ("paretofuse", "paretofuse._C"):
                assert room == "python" or path.name == "native.py", f"{path}: {name}"
            else:
                assert name.startswith(allowed), f"{path} (in {room}) imports {name}"


def test_only_one_file_calls_the_extension() -> None:
    callers = [p for _, p in FILES if any("paretofuse._C" in name for name in imports(p))]
    assert callers == [ROOT / "engine" / "native.py"]


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
        if p.suffix in (".py", ".cpp", ".h")
        and "cache" not in p.parts  # other projects, fetched to compare with
    }
    assert {name: lines for name, lines in long.items() if lines > 450} == {}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_numpy() -> None:
    loaded = run(
        "import sys, paretofuse; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_every_public_name_resolves() -> None:
    assert (
        run("import paretofuse as pf; print([n for n in pf.__all__ if getattr(pf, n) is None])").strip()
        == "[]"
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        paretofuse.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "layout",
        "safetensors_file",
        "manifest",
        "atomic",
        "store",
        "preference",
        "routing",
        "native",
        "stream",
    ],
)
def test_the_store_and_the_native_merge_need_no_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import paretofuse.engine.{module}; print('torch' in sys.modules)"
    assert run(code).strip() == "True"
