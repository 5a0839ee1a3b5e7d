"""The programs of docs/embedding.md compile and do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import paretofuse as pf
from tests.support import cpplib
from tests.support.process import ROOT, run

TEXT = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def bias(store: Path, preference: list[float]) -> float:
    return float(pf.load(store).merge_state_dict(preference)["second.bias"][0])


def test_the_cpp_programs(
    release: Path, two_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, gpu = blocks("cpp")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc' / 'include'}"]
    (tmp_path / "program.cpp").write_text(whole)
    (tmp_path / "gpu.cpp").write_text(gpu)
    program, library = tmp_path / "program", release / "libparetofuse.a"
    threads = ["-fopenmp", "-ldl", "-pthread"]
    run("c++", *flags, tmp_path / "program.cpp", library, *threads, "-o", program)
    run("c++", *flags, "-fsyntax-only", tmp_path / "gpu.cpp")
    monkeypatch.chdir(tmp_path)
    first, second = run(program, two_experts).splitlines()
    assert first.split()[:2] == ["F32", "8"]
    assert float(first.split()[2]) == pytest.approx(bias(two_experts, [0.25, 0.75]), rel=1e-7)
    assert float(second) == pytest.approx(bias(two_experts, [1.0, 0.0]), rel=1e-7)
    assert (tmp_path / "merged.safetensors").is_file()


def test_the_ctypes_program(release: Path, two_experts: Path) -> None:
    (block,) = blocks("python")
    names = {"library": str(cpplib.shared_library(release)), "store": str(two_experts).encode()}
    exec(block, names)
    assert names["first"] == pytest.approx(bias(two_experts, [0.25, 0.75]), rel=1e-7)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
