"""The programs of docs/embedding.md compile and do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import paretofuse as pf
from tests.support import cpplib
from tests.support.models import net_and_experts

TEXT = (cpplib.ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def release() -> Path:
    return cpplib.build("release", "-DCMAKE_BUILD_TYPE=Release", "-DPARETOFUSE_TESTS=ON")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "net"
    base, experts = net_and_experts(count=2)
    pf.stack(base, experts).save(path)
    return path


def bias(store: Path, preference: list[float]) -> float:
    return float(pf.load(store).merge_state_dict(preference)["second.bias"][0])


def test_the_cpp_programs(
    release: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, gpu = blocks("cpp")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{cpplib.ROOT / 'csrc' / 'include'}"]
    (tmp_path / "program.cpp").write_text(whole)
    (tmp_path / "gpu.cpp").write_text(gpu)
    program, library = tmp_path / "program", release / "libparetofuse.a"
    threads = ["-fopenmp", "-ldl", "-pthread"]
    cpplib.run(["c++", *flags, tmp_path / "program.cpp", library, *threads, "-o", program])
    cpplib.run(["c++", *flags, "-fsyntax-only", tmp_path / "gpu.cpp"])
    monkeypatch.chdir(tmp_path)
    first, second = cpplib.run([program, store]).splitlines()
    assert first.split()[:2] == ["F32", "8"]
    assert float(first.split()[2]) == pytest.approx(bias(store, [0.25, 0.75]), rel=1e-7)
    assert float(second) == pytest.approx(bias(store, [1.0, 0.0]), rel=1e-7)
    assert (tmp_path / "merged.safetensors").is_file()


def test_the_ctypes_program(release: Path, store: Path) -> None:
    (block,) = blocks("python")
    (library,) = (path for path in release.glob("libparetofuse.*") if path.suffix in (".so", ".dylib"))
    names = {"library": str(library), "store": str(store).encode()}
    exec(block, names)
    assert names["first"] == pytest.approx(bias(store, [0.25, 0.75]), rel=1e-7)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (cpplib.ROOT / "docs" / link).exists(), link
