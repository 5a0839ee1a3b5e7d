"""Builds libparetofuse for the tests, and calls its C interface by ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.process import ROOT, run

FOLDER = ROOT / "build" / "cpp"
TESTS = "-DPARETOFUSE_TESTS=ON"
# Unoptimized: with its sanitizers, an optimized build takes four times as long to compile, minutes of each test run.
CHECKED = ("-DCMAKE_BUILD_TYPE=Debug",)
BUILDS = {
    "release": ("-DCMAKE_BUILD_TYPE=Release", TESTS),
    "asan": (*CHECKED, TESTS, "-DPARETOFUSE_SANITIZE=address,undefined"),
    # The core alone, with OpenMP, which the fuzzers' build has not.
    "asan-core": (*CHECKED, TESTS, "-DPARETOFUSE_LIBRARY=OFF", "-DPARETOFUSE_SANITIZE=address,undefined"),
    # The thread sanitizer follows std::thread but not libgomp, which synchronizes by means it cannot see.
    "tsan": (*CHECKED, TESTS, "-DPARETOFUSE_STD_THREADS=ON", "-DPARETOFUSE_SANITIZE=thread"),
    "fuzz": (
        *CHECKED,
        TESTS,
        "-DCMAKE_CXX_COMPILER=clang++",
        "-DPARETOFUSE_FUZZERS=ON",
        "-DPARETOFUSE_STD_THREADS=ON",
        "-DPARETOFUSE_SANITIZE=fuzzer-no-link,address,undefined",
    ),
}
"""Every build of csrc that tests share, with its options."""

Array = npt.NDArray[np.generic]

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "BOOL": np.bool_}
"""NumPy types of safetensors dtypes; BF16 as its bits."""


def json_option() -> list[str]:
    """Where the package `nlohmann-json` put its headers; nothing if CMake has to find them itself."""
    spec = find_spec("nlohmann_json")
    if spec is None or spec.origin is None:
        return []
    return [f"-DPARETOFUSE_JSON_INCLUDE={Path(spec.origin).parent / 'include'}"]


def cmake() -> str:
    """CMake, of this environment (the package `cmake`) if it is there, else the system's; skips without any."""
    found = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    if found is None:
        pytest.skip("needs cmake: pip install cmake")
    return found


def configure(source: Path, build: Path, *options: str | Path) -> None:
    """Configure by CMake."""
    run(cmake(), "-S", source, "-B", build, *json_option(), *options)


def compile_targets(build: Path, *targets: str) -> None:
    """Build what was configured, or some of it; a warning fails."""
    text = run(cmake(), "--build", build, "--parallel", "2", *(["--target", *targets] if targets else []))
    assert "warning:" not in text, text


def build(name: str, *targets: str) -> Path:
    """One of `BUILDS`, brought up to date; returns its folder."""
    return build_source(name, ROOT / "csrc", BUILDS[name], *targets)


@cache
def has_fuzzer() -> bool:
    """Whether there is Clang with libFuzzer and the address sanitizer: Linux distributions pack them one by one."""
    empty = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
    command = ["clang++", "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", os.devnull]
    try:
        return (
            subprocess.run(command, input=empty, text=True, capture_output=True, check=False).returncode == 0
        )
    except FileNotFoundError:
        return False


def build_for_leaks(*targets: str) -> Path:
    """A build with the address sanitizer: the fuzzers', which other tests need anyway, or one by the usual compiler."""
    return build("fuzz" if has_fuzzer() else "asan", *targets)


@cache
def build_source(name: str, source: Path, options: tuple[str, ...], *targets: str) -> Path:
    """Build a source incrementally in the folder of that name, which all test processes share; returns the folder.

    Once in a process: to see that all is up to date takes seconds.
    """
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure(source, folder, *options)
        compile_targets(folder, *targets)
    return folder


def shared_library(folder: Path) -> Path:
    """The shared library in a build's folder."""
    return folder / ("libparetofuse.dylib" if sys.platform == "darwin" else "libparetofuse.so")


def install(prefix: Path) -> Path:
    """Install the release build as its users would; returns the prefix."""
    run(cmake(), "--install", build("release"), "--prefix", prefix)
    return prefix


def bits(tensor: torch.Tensor) -> Array:
    """A tensor as NumPy; bfloat16 as its bits."""
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def assert_same_bits(got: dict[str, Array], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() <= expected.keys()
    for name, array in got.items():
        truth = bits(expected[name])
        assert (array.dtype, array.shape) == (truth.dtype, truth.shape), name
        assert array.tobytes() == truth.tobytes(), name


class View(ctypes.Structure):
    """paretofuse_view."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("nbytes", ctypes.c_uint64),
        ("dtype", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("dimensions", ctypes.c_uint64),
    )

    def array(self) -> npt.NDArray[np.generic]:
        """A copy of the tensor."""
        shape = [self.shape[d] for d in range(self.dimensions)]
        raw = (ctypes.c_ubyte * self.nbytes).from_address(self.data) if self.nbytes else b""
        return np.frombuffer(raw, DTYPES[self.dtype.decode()]).reshape(shape).copy()


class Options(ctypes.Structure):
    """paretofuse_options."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("replicas", ctypes.c_int32),
        ("isa", ctypes.c_char_p),
        ("verify", ctypes.c_int32),
    )


class Target(ctypes.Structure):
    """paretofuse_target."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("nbytes", ctypes.c_uint64))


class LibraryError(Exception):
    """A call failed: its status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Library:
    """The shared library's C functions; statuses become exceptions."""

    INVALID, STORE, SYSTEM, DEVICE, TIMEOUT = 1, 2, 3, 6, 7

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name in ("last_error", "version", "objective", "plane", "group", "tensor_name"):
            getattr(self.c, f"paretofuse_{name}").restype = ctypes.c_char_p
        for name in ("objective_count", "plane_count", "group_count", "tensor_count"):
            getattr(self.c, f"paretofuse_{name}").restype = ctypes.c_uint64

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that returns a status."""
        status = getattr(self.c, f"paretofuse_{name}")(*arguments)
        if status != 0:
            raise LibraryError(status, self.c.paretofuse_last_error().decode())

    def open(
        self, store: Path, threads: int = 0, replicas: int = 0, isa: str | None = None, verify: bool = False
    ) -> Engine:
        """Open a store."""
        options = Options(threads, replicas, isa.encode() if isa else None, verify)
        handle = ctypes.c_void_p()
        self.call("open", str(store).encode(), ctypes.byref(options), ctypes.byref(handle))
        return Engine(self, handle)


def doubles(values: Sequence[float]) -> tuple[object, ctypes.c_uint64]:
    """A preference as the C interface takes it."""
    return (ctypes.c_double * len(values))(*values), ctypes.c_uint64(len(values))


class Engine:
    """paretofuse_engine, closed with this object."""

    def __init__(self, library: Library, handle: ctypes.c_void_p) -> None:
        self.library = library
        self.handle = handle

    def close(self) -> None:
        """Close it; the handle becomes null."""
        self.library.c.paretofuse_close(self.handle)
        self.handle = ctypes.c_void_p()

    def __del__(self) -> None:
        self.close()

    def names(self, what: str) -> list[str]:
        """What: "objective", "plane", "group" or "tensor"."""
        c = self.library.c
        name = getattr(c, f"paretofuse_{'tensor_name' if what == 'tensor' else what}")
        count = getattr(c, f"paretofuse_{what}_count")(self.handle)
        assert name(self.handle, ctypes.c_uint64(count)) is None
        return [name(self.handle, ctypes.c_uint64(i)).decode() for i in range(count)]

    def routing_weights(self, preference: Sequence[float], rows: int = 0) -> npt.NDArray[np.float32]:
        """[G, P], or [G + R, P] where R rows have coefficients."""
        shape = (len(self.names("group")) + rows, len(self.names("plane")))
        out = np.full(shape, np.nan, np.float32)
        self.library.call(
            "routing_weights", self.handle, *doubles(preference), ctypes.c_void_p(out.ctypes.data),
            ctypes.c_uint64(out.size),
        )  # fmt: skip
        return out

    def switch(self, preference: Sequence[float]) -> None:
        """Merge in place."""
        self.library.call("switch", self.handle, *doubles(preference))

    def switch_weights(self, weights: npt.NDArray[np.float32]) -> None:
        """Merge in place at routing weights."""
        data = ctypes.c_void_p(weights.ctypes.data)
        self.library.call("switch_weights", self.handle, data, ctypes.c_uint64(weights.size))

    def view(self, name: str) -> View:
        """A tensor of the engine's own weights."""
        view = View()
        self.library.call("tensor", self.handle, name.encode(), ctypes.byref(view))
        return view

    def tensors(self) -> dict[str, npt.NDArray[np.generic]]:
        """All of them, copied."""
        return {name: self.view(name).array() for name in self.names("tensor")}

    def merge_into(self, preference: Sequence[float], targets: dict[str, npt.NDArray[np.generic]]) -> None:
        """Merge into arrays."""
        table = (Target * len(targets))(
            *(Target(name.encode(), array.ctypes.data, array.nbytes) for name, array in targets.items())
        )
        self.library.call(
            "merge_into", self.handle, *doubles(preference), table, ctypes.c_uint64(len(targets))
        )

    def write(self, path: Path | str, head: str | None = None) -> None:
        """Write a model."""
        self.library.call("write", self.handle, str(path).encode(), head.encode() if head else None)

    def acquire(self, preference: Sequence[float], timeout: float | None = None) -> Replica:
        """Pin a replica, waiting `timeout` seconds at most."""
        handle = ctypes.c_void_p()
        name, seconds = (
            ("acquire", ()) if timeout is None else ("acquire_within", (ctypes.c_double(timeout),))
        )
        self.library.call(name, self.handle, *doubles(preference), *seconds, ctypes.byref(handle))
        return Replica(self.library, handle)

    def cuda(self, kernels: Path, driver: str | Path, device: int = 0) -> Cuda:
        """Open merged weights on a CUDA device."""
        options = CudaOptions(str(kernels).encode(), device, str(driver).encode())
        handle = ctypes.c_void_p()
        self.library.call("cuda_open", self.handle, ctypes.byref(options), ctypes.byref(handle))
        return Cuda(self, handle)


class CudaOptions(ctypes.Structure):
    """paretofuse_cuda_options."""

    _fields_ = (("kernels", ctypes.c_char_p), ("device", ctypes.c_int32), ("driver", ctypes.c_char_p))


class Cuda:
    """paretofuse_cuda; streams are any numbers."""

    def __init__(self, engine: Engine, handle: ctypes.c_void_p) -> None:
        self.library = engine.library
        self.names = engine.names("tensor")
        self.handle = handle

    def close(self) -> None:
        """Close it; the handle becomes null."""
        self.library.c.paretofuse_cuda_close(self.handle)
        self.handle = ctypes.c_void_p()

    def switch(self, preference: Sequence[float], stream: int = 0) -> None:
        """Queue a merge."""
        self.library.call("cuda_switch", self.handle, *doubles(preference), ctypes.c_void_p(stream))

    def switch_weights(self, weights: npt.NDArray[np.float32], stream: int = 0) -> None:
        """Queue a merge at routing weights."""
        data, count = ctypes.c_void_p(weights.ctypes.data), ctypes.c_uint64(weights.size)
        self.library.call("cuda_switch_weights", self.handle, data, count, ctypes.c_void_p(stream))

    def view(self, name: str) -> View:
        """A tensor; its data is a device address."""
        view = View()
        self.library.call("cuda_tensor", self.handle, name.encode(), ctypes.byref(view))
        return view

    def read(self, name: str, stream: int = 0) -> npt.NDArray[np.generic]:
        """A tensor, copied to the host."""
        view = self.view(name)
        out = np.full([view.shape[d] for d in range(view.dimensions)], 1, DTYPES[view.dtype.decode()])
        place, nbytes = ctypes.c_void_p(out.ctypes.data), ctypes.c_uint64(out.nbytes)
        self.library.call("cuda_read", self.handle, name.encode(), place, nbytes, ctypes.c_void_p(stream))
        return out

    def tensors(self, stream: int = 0) -> dict[str, npt.NDArray[np.generic]]:
        """All of them, copied to the host."""
        return {name: self.read(name, stream) for name in self.names}


class Replica:
    """paretofuse_replica."""

    def __init__(self, library: Library, handle: ctypes.c_void_p) -> None:
        self.library = library
        self.handle = handle

    def view(self, name: str) -> View:
        """One of its tensors."""
        view = View()
        self.library.call("replica_tensor", self.handle, name.encode(), ctypes.byref(view))
        return view

    def release(self) -> None:
        """Release it; the handle becomes null."""
        self.library.c.paretofuse_release(self.handle)
        self.handle = ctypes.c_void_p()
