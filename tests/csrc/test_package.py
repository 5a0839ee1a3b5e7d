"""libparetofuse in other people's builds: find_package, pkg-config, add_subdirectory; its size, name and symbols."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import paretofuse as pf
from tests.support import cpplib
from tests.support.packages import distributions
from tests.support.process import ROOT, listed_files, run

PROGRAM = """
#include <cstdio>
#include <stdexcept>
#include <paretofuse/engine.h>
#include <paretofuse/isa.h>
#include <paretofuse/merge.h>
#include <paretofuse/paretofuse.h>
#include <paretofuse/replicas.h>

int main(int, char** arguments) {
  auto engine = paretofuse::Engine::open(arguments[1]);
  engine.switch_to({0.25, 0.75});
  const auto replica = engine.acquire(engine.preference({{"b", 1.0}}));
  try {
    paretofuse::Engine::open("nowhere");
    return 1;
  } catch (const paretofuse::StoreError&) {
  }
  try {
    paretofuse::MergePlan({}, {}, 0, 0);
    return 1;
  } catch (const std::invalid_argument&) {
  }
  std::printf("%.17g %s %s\\n", static_cast<const float*>(engine.tensor("second.bias").data)[0],
              paretofuse::chosen_isa(), paretofuse_version());
}
"""

C_PROGRAM = """
#include <paretofuse/paretofuse.h>
#include <stdio.h>

int main(int count, char** arguments) {
  paretofuse_engine* engine = NULL;
  const double preference[] = {0.25, 0.75};
  paretofuse_view view;
  if (paretofuse_open(arguments[count - 1], NULL, &engine) != PARETOFUSE_OK ||
      paretofuse_switch(engine, preference, 2) != PARETOFUSE_OK ||
      paretofuse_tensor(engine, "second.bias", &view) != PARETOFUSE_OK) {
    return puts(paretofuse_last_error());
  }
  printf("%.17g\\n", *(const float*)view.data);
  paretofuse_close(engine);
  return 0;
}
"""

CONSUMER = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES C CXX)
{find}
foreach(kind paretofuse static shared)
  add_executable(program_${{kind}} program.cpp)
  target_link_libraries(program_${{kind}} PRIVATE paretofuse::${{kind}})
endforeach()
add_executable(program_c program.c)
target_link_libraries(program_c PRIVATE paretofuse::shared)
"""


def truth(store: Path) -> float:
    return float(pf.load(store).merge_state_dict([0.25, 0.75])["second.bias"][0])


def write_consumer(folder: Path, find: str) -> Path:
    folder.mkdir()
    (folder / "program.cpp").write_text(PROGRAM)
    (folder / "program.c").write_text(C_PROGRAM)
    (folder / "CMakeLists.txt").write_text(CONSUMER.format(find=find))
    return folder


def check_programs(build: Path, store: Path) -> None:
    for kind in ("paretofuse", "static", "shared", "c"):
        printed = run(build / f"program_{kind}", store)
        assert float(printed.split()[0]) == truth(store), kind


def test_a_consumer_by_find_package(prefix: Path, two_experts: Path, tmp_path: Path) -> None:
    source = write_consumer(tmp_path / "consumer", "find_package(paretofuse 0.1 REQUIRED)")
    found = f"-DCMAKE_PREFIX_PATH={prefix}"
    strict = [f"-DCMAKE_{language}_FLAGS=-Wall -Wextra -Wpedantic -Werror" for language in ("C", "CXX")]
    cpplib.configure(source, tmp_path / "build", found, *strict, "-DCMAKE_C_STANDARD=99")
    cpplib.compile_targets(tmp_path / "build")
    check_programs(tmp_path / "build", two_experts)
    newer = tmp_path / "newer"
    source = write_consumer(newer, "find_package(paretofuse 0.2 REQUIRED)")
    assert "version" in run(cpplib.cmake(), "-S", source, "-B", newer / "build", found, code=1)


def test_a_consumer_by_pkg_config(prefix: Path, two_experts: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    (folder,) = {path.parent for path in prefix.rglob("paretofuse.pc")}
    flags = run("pkg-config", "--cflags", "--libs", "paretofuse", PKG_CONFIG_PATH=str(folder)).split()
    (tmp_path / "program.cpp").write_text(PROGRAM)
    run("c++", "-std=c++17", tmp_path / "program.cpp", "-o", tmp_path / "program", *flags)
    printed = run(tmp_path / "program", two_experts, LD_LIBRARY_PATH=str(folder.parent))
    assert float(printed.split()[0]) == truth(two_experts)


def test_a_static_consumer_by_pkg_config(prefix: Path, two_experts: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    (folder,) = {path.parent for path in prefix.rglob("paretofuse.pc")}
    environment = {"PKG_CONFIG_PATH": str(folder)}
    private = run("pkg-config", "--static", "--libs", "paretofuse", **environment).split()
    (archive,) = folder.parent.glob("libparetofuse.a")
    flags = [str(archive) if flag == "-lparetofuse" else flag for flag in private]
    (tmp_path / "program.c").write_text(C_PROGRAM)
    include = run("pkg-config", "--cflags", "paretofuse", **environment).split()
    # The C compiler adds neither the C++ library nor OpenMP's by itself.
    run("cc", tmp_path / "program.c", "-o", tmp_path / "program", *include, *flags)
    assert float(run(tmp_path / "program", two_experts).split()[0]) == truth(two_experts)


@pytest.mark.slow
def test_a_consumer_by_add_subdirectory_of_what_the_wheel_carries(two_experts: Path, tmp_path: Path) -> None:
    _, wheel = distributions()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    folder = run(sys.executable, "-m", "paretofuse", "--cmakedir", PYTHONPATH=str(tmp_path / "site")).strip()
    assert Path(folder) == tmp_path / "site" / "paretofuse" / "csrc"
    for name in listed_files():
        if name.startswith(("csrc/include/", "csrc/src/", "csrc/cmake/")):
            assert (tmp_path / "site" / "paretofuse" / name).read_bytes() == (ROOT / name).read_bytes(), name
    source = write_consumer(tmp_path / "consumer", f'add_subdirectory("{folder}" paretofuse)')
    cpplib.configure(source, tmp_path / "build", "-DCMAKE_BUILD_TYPE=Debug")
    cpplib.compile_targets(tmp_path / "build")
    check_programs(tmp_path / "build", two_experts)


def test_the_checkout_prints_its_own_sources() -> None:
    printed = run(sys.executable, "-m", "paretofuse", "--cmakedir")
    assert Path(printed.strip()) == ROOT / "csrc"


def test_size_soname_and_symbols(prefix: Path, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("looks at ELF files")
    (library,) = (path for path in prefix.rglob("libparetofuse.so") if path.is_symlink())
    version = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", pf.__version__)
    assert version is not None
    assert library.resolve().name == f"libparetofuse.so.{'.'.join(version.groups())}"
    headers = run("readelf", "--dynamic", library)
    assert f"[libparetofuse.so.{version[1]}.{version[2]}]" in headers
    for foreign in ("torch", "python", "nlohmann"):
        assert foreign not in headers
    run("strip", "-o", tmp_path / "stripped.so", library.resolve())
    # Most of it are the kernels: three instruction sets, times the mixes of dtypes and formats of planes.
    assert (tmp_path / "stripped.so").stat().st_size < 1_050_000
    symbols = run("nm", "--dynamic", "--defined-only", "--demangle", library).splitlines()
    names = [line.split(maxsplit=2)[2] for line in symbols]
    assert any(name == "paretofuse_acquire" for name in names)
    assert [name for name in names if "paretofuse" not in name] == []
    assert [name for name in names if "nlohmann" in name or "Kernels*" in name] == []


def test_python_and_cmake_build_the_same_core() -> None:
    """The extension's sources are those of the core library and the store; the library proper adds its own folder."""
    setup, cmake = (ROOT / "setup.py").read_text(), (ROOT / "csrc" / "CMakeLists.txt").read_text()
    assert 'Path("csrc/src", room).glob("*.cpp")' in setup
    assert all(f"/src/{room}/*.cpp" in cmake for room in ("core", "simd", "store"))
    for flag in ("-O3", "-ffp-contract=off", "-Wall", "-Wextra"):
        assert flag in setup
        assert flag in cmake
