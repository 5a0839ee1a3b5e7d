"""Wheel, sdist and editable installs: each is built, installed into an empty environment, imported and used."""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.packages import copy_checkout, distributions, lend_objects
from tests.support.process import ROOT, listed_files, run

USE = """
import paretofuse, paretofuse._C, paretofuse.engine.merging.native, paretofuse.kernels, paretofuse.adapters
import paretofuse.engine.solvers
import torch, paretofuse as pf
engine = pf.stack({"w": torch.zeros(3)}, {"a": {"w": torch.ones(3)}}, route="tensor")
assert engine.merge_state_dict([1.0])["w"].tolist() == [1, 1, 1]
print(paretofuse.__file__)
"""


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The python of a new environment that has our dependencies (by a link to ours), but not us."""
    venv.create(tmp_path / "env", with_pip=False)
    scheme = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    site = Path(
        sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else None, scheme)
    )
    # A .pth inside a linked folder is not followed, so our own editable install stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "env" / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation",
        "--no-index", "--force-reinstall", "--quiet", *what,
    )  # fmt: skip


@pytest.mark.slow
def test_sdist_and_wheel(empty: Path, tmp_path: Path) -> None:
    sdist, wheel = distributions()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # The wheel is built of it, but with the checkout's objects: that all the sources are there is told here alone.
    sources = {name for name in listed_files() if name.startswith("csrc/")}
    assert {"setup.py", "LICENSE", *sources} <= names
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert {"paretofuse/py.typed", "paretofuse/_C.pyi", "paretofuse/engine/store/reader.py"} <= files
    pages = [p for p in (ROOT / "python").rglob("page/*") if p.suffix in (".html", ".css", ".js")]
    assert pages
    assert {path.relative_to(ROOT / "python").as_posix() for path in pages} <= files
    assert any(name.startswith("paretofuse/_C") and name.endswith(".so") for name in files)
    assert not any(name.startswith(("engine/", "kernels/", "tests/", "benchmarks/")) for name in files)
    install(empty, wheel)
    assert str(empty.parents[1]) in run(empty, "-c", USE, cwd=tmp_path)
    assert "usage: paretofuse" in run(empty.parent / "paretofuse", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_editable(empty: Path, tmp_path: Path) -> None:
    """Both modes; the second build, and one after a change of one file, compile only what is not compiled yet.

    `make test` itself is an editable install that compiles everything, so the first one here borrows its objects.
    """
    checkout = copy_checkout(tmp_path / "checkout")
    lend_objects(checkout)
    objects: dict[Path, int] = {}
    for mode, changed in (("lenient", None), ("strict", None), ("lenient", "routing")):
        if changed:
            (source,) = checkout.glob(f"csrc/src/*/{changed}.cpp")
            source.touch()
        install(empty, f"--config-settings=editable_mode={mode}", "--editable", checkout)
        found = run(empty, "-c", USE, cwd=tmp_path).strip()
        assert os.path.realpath(found) == os.path.realpath(checkout / "python" / "paretofuse" / "__init__.py")
        before, objects = objects, {path: path.stat().st_mtime_ns for path in checkout.rglob("*.o")}
        assert {"module", "merge", "kernels_scalar", "routing"} <= {path.stem for path in objects}
        if before:
            compiled = {path.stem for path, when in objects.items() if before.get(path) != when}
            assert compiled == ({changed} if changed else set())


def test_objects_older_than_a_header_or_a_setting_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_checkout(tmp_path / "checkout"))
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("distutils.ccompiler.CCompiler.compile", None)
    is_old = runpy.run_path("setup.py")["is_old"]
    source = Path("csrc/src/core/merge.cpp")
    built = tmp_path / "merge.o"
    for changed in (source, Path("csrc/src/core/planes.h"), Path("pyproject.toml"), Path("setup.py")):
        built.touch()
        future = built.stat().st_mtime_ns + 1_000_000_000
        os.utime(built, ns=(future, future))
        assert not is_old(str(built), str(source))
        os.utime(changed, ns=(future + 1, future + 1))
        assert is_old(str(built), str(source))
