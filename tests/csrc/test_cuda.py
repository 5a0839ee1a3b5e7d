"""libparetofuse's GPU path, against a driver library that records every call and merges on the host.

Nothing here runs on a GPU. What is shown: which calls are made, in which order and with which bytes; that a driver
which does what the arguments say ends with the CPU's results; and that every failure is clean.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paretofuse as pf
from tests.support import cpplib
from tests.support.cpplib import Library, LibraryError
from tests.support.cuda import STORES, assert_cpu_results, assert_same_merge, equal, net_store
from tests.support.fake_cuda import STREAM, Driver
from tests.support.kernel_folder import write_kernels
from tests.support.process import run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With static tensors, too."""
    route = lambda name: None if name.startswith("norm") else name  # noqa: E731
    return net_store(tmp_path_factory.mktemp("stores") / "net", route=route)


@pytest.mark.parametrize("kind", STORES)
def test_results_are_the_cpus(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path, kind: str
) -> None:
    engine = library.open(STORES[kind](tmp_path / "store"))
    cuda = engine.cuda(kernels, driver.path)
    addresses = {name: cuda.view(name).data for name in cuda.names}
    assert all(address % 256 == 0 for address in addresses.values() if address)
    random = np.random.default_rng(1)
    count = len(engine.names("objective"))
    for stream in (STREAM, 0):
        preference = [float(share) for share in random.dirichlet(np.ones(count))]
        engine.switch(preference)
        cuda.switch(preference, stream)
        assert_cpu_results(cuda.tensors(stream), engine.tensors())
        shape = len(engine.names("group")), len(engine.names("plane"))
        weights = random.normal(size=shape).astype(np.float32)
        assert_same_merge(engine, cuda, weights, stream)
    assert {name: cuda.view(name).data for name in cuda.names} == addresses
    engine.close()
    cuda.switch(preference)  # it outlives the engine
    cuda.close()
    driver.check()


def test_a_tensor_of_several_tiles(library: Library, driver: Driver, kernels: Path, tmp_path: Path) -> None:
    base = {f"w{i}": torch.randn(size) for i, size in enumerate((1023, 1024, 1025, 1, 0, 5000))}
    models = {f"e{e}": {name: torch.randn(t.shape) for name, t in base.items()} for e in range(5)}
    pf.stack(base, models, route="tensor").save(tmp_path / "store")
    engine = library.open(tmp_path / "store")
    cuda = engine.cuda(kernels, driver.path)
    weights = np.random.default_rng(2).normal(size=(len(base), 5)).astype(np.float32)
    assert_same_merge(engine, cuda, weights, STREAM)
    cuda.close()
    driver.check()


def test_a_switch_is_one_copy_and_one_launch_on_the_callers_stream(
    library: Library, driver: Driver, kernels: Path, store: Path
) -> None:
    engine = library.open(store)
    cuda = engine.cuda(kernels, driver.path)
    opened = driver.log()
    assert "cuLaunchKernel" in "".join(opened)  # the static tensors, once
    cuda.switch([0.2, 0.3, 0.5], STREAM)
    calls = driver.log()[len(opened) :]
    assert [call.split()[0] for call in calls] == [
        "cuCtxPushCurrent", "cuStreamIsCapturing", "cuMemcpyHtoDAsync", "cuEventRecord", "cuLaunchKernel",
        "cuCtxPopCurrent",
    ]  # fmt: skip
    groups = len(engine.names("group"))
    assert calls[2] == f"cuMemcpyHtoDAsync {(groups + 1) * 3 * 4} stream 0x1230"
    found = re.fullmatch(
        r"cuLaunchKernel grid (\d+) 1 1 block 256 1 1 shared 0 stream 0x1230 "
        r"file merge_at_most_4_fp32_fp32_fp32.cubin arguments (.*)", calls[4]
    )  # fmt: skip
    assert found is not None, calls[4]
    tiles = int(found[1])
    fields = [bytes.fromhex(field) for field in found[2].split()]
    assert [len(field) for field in fields] == [8] * 7 + [8, 4, 4, 4, 8, 8, 8, 8]
    base, deltas, tile_group, weights, scales, places, out = struct.unpack("<7Q", b"".join(fields[:7]))
    assert len({base, deltas, tile_group, weights, out}) == 5
    assert (scales, places) == (weights, tile_group)  # never read
    routed = [name for name in cuda.names if cuda.view(name).dtype == b"F32" and not name.startswith("norm")]
    assert out == min(cuda.view(name).data for name in routed if name != "scale")
    n, experts, rows, preferences, *strides = struct.unpack("<q3i2q", b"".join(fields[7:13]))
    assert (experts, rows, preferences) == (3, groups + 1, 1)
    assert n == tiles * 1024
    assert strides == [n, n]
    assert fields[13:] == [bytes(8)] * 2
    cuda.close()
    driver.check()


def test_work_on_another_stream_waits_for_nothing(
    library: Library, driver: Driver, kernels: Path, store: Path
) -> None:
    """The fake runs a stream's work only when it is waited for: this is what tells streams apart."""
    engine = library.open(store)
    cuda = engine.cuda(kernels, driver.path)
    cuda.switch([1, 0, 0], STREAM)
    before = cuda.read("second.weight", STREAM)
    cuda.switch([0, 1, 0], STREAM + 1)
    assert np.array_equal(cuda.read("second.weight", STREAM), before)
    engine.switch([0, 1, 0])
    assert equal(cuda.read("second.weight", STREAM + 1), engine.view("second.weight").array())
    cuda.close()
    driver.check()


def test_switches_wait_only_for_the_copy_before_the_last(
    library: Library, driver: Driver, kernels: Path, store: Path
) -> None:
    """The device reads page-locked memory when the stream comes to it, by when the host has gone on."""
    engine = library.open(store)
    cuda = engine.cuda(kernels, driver.path)
    waits = []
    for preference in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5], [0.5, 0.25, 0.25]):
        before = len(driver.log())
        cuda.switch(preference, STREAM)
        waits.append([call for call in driver.log()[before:] if "Synchronize" in call])
    assert waits == [[], [], ["cuEventSynchronize"], ["cuEventSynchronize"]]
    engine.switch(preference)
    assert_cpu_results(cuda.tensors(STREAM), engine.tensors())
    cuda.close()
    driver.check()


@pytest.mark.parametrize("kind", ["float32", "row coefficients"])
def test_every_failing_call_is_one_clean_error(
    release: Path, driver: Driver, kernels: Path, tmp_path: Path, kind: str
) -> None:
    store = STORES[kind](tmp_path / "store")
    printed = run(release / "cuda_faults", store, kernels, driver.path)
    assert int(printed.split()[0]) > 80


@pytest.mark.slow
def test_failing_calls_leak_no_host_memory(driver: Driver, store: Path, tmp_path: Path) -> None:
    def keep_float32(manifest: dict[str, Any]) -> None:
        """Parsing all entries 148 times, unoptimized and under the sanitizer, takes a minute."""
        manifest["kernels"] = [entry for entry in manifest["kernels"] if "fp32_fp32_fp32" in entry["file"]]

    few = write_kernels(tmp_path / "few", keep_float32)
    folder = cpplib.build_for_leaks("cuda_faults", "fake_cuda")
    (fake,) = folder.glob("libfake_cuda.*")
    printed = run(folder / "cuda_faults", store, few, fake, ASAN_OPTIONS="detect_leaks=1")
    assert int(printed.split()[0]) > 80


def refused(engine: cpplib.Engine, *arguments: Any) -> str:
    with pytest.raises(LibraryError) as caught:
        engine.cuda(*arguments)
    assert caught.value.status == Library.DEVICE
    return str(caught.value)


def test_no_driver(library: Library, release: Path, kernels: Path, store: Path, tmp_path: Path) -> None:
    engine = library.open(store)
    assert "install NVIDIA's driver, or merge on the CPU" in refused(
        engine, kernels, tmp_path / "libcuda.so.1"
    )
    other = cpplib.shared_library(release)
    assert "has no function cuInit; install a newer NVIDIA driver" in refused(engine, kernels, other)


def test_no_such_device_and_another_architecture(
    library: Library, driver: Driver, kernels: Path, store: Path
) -> None:
    engine = library.open(store)
    assert "cuDeviceGet failed: CUDA_ERROR_OTHER (101)" in refused(engine, kernels, driver.path, 3)
    for architecture, fits in ((80, False), (89, False), (90, True), (100, False)):
        driver.c.fake_set_architecture(ctypes.c_int(architecture))
        if fits:
            engine.cuda(kernels, driver.path).close()
        else:
            message = refused(engine, kernels, driver.path)
            assert f"kernels for sm_90, the device has sm_{architecture}; write them with --arch" in message
    driver.check()


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [(80, 86, True), (86, 80, False), (90, 90, True), (100, 103, False), (100, 100, True), (120, 121, False)],
)
def test_only_code_of_the_older_generations_runs_on_later_devices_of_its_own(
    library: Library,
    driver: Driver,
    kernels: Path,
    store: Path,
    tmp_path: Path,
    ours: int,
    theirs: int,
    fits: bool,
) -> None:
    """From sm_90 on Triton writes sm_90a and the like, which no other device runs."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernels, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"architecture": f"sm_{ours}"}))
    driver.c.fake_set_architecture(ctypes.c_int(theirs))
    engine = library.open(store)
    if fits:
        engine.cuda(folder, driver.path).close()
    else:
        message = refused(engine, folder, driver.path)
        assert (
            f"kernels for sm_{ours}, the device has sm_{theirs}; write them with --arch sm_{theirs}"
            in message
        )
    driver.check()


def test_a_stream_that_is_being_captured_is_refused(
    library: Library, driver: Driver, kernels: Path, store: Path
) -> None:
    """The captured copy would read the weights from memory that is gone when the graph runs."""
    engine = library.open(store)
    cuda = engine.cuda(kernels, driver.path)
    cuda.switch([1.0, 0.0, 0.0], STREAM)
    before = cuda.tensors(STREAM)
    driver.c.fake_set_capturing(ctypes.c_void_p(STREAM))
    with pytest.raises(LibraryError, match="a stream that is being captured") as refusal:
        cuda.switch([0.0, 1.0, 0.0], STREAM)
    assert refusal.value.status == Library.INVALID
    driver.c.fake_set_capturing(None)
    assert {name: array.tobytes() for name, array in cuda.tensors(STREAM).items()} == {
        name: array.tobytes() for name, array in before.items()
    }
    cuda.close()
    driver.check()


@pytest.mark.parametrize(
    ("count", "name"), [(1, "at_most_1"), (5, "at_most_8"), (16, "at_most_16"), (17, "any")]
)
def test_the_smallest_kernel_that_holds_all_experts_merges(
    library: Library, driver: Driver, kernels: Path, tmp_path: Path, count: int, name: str
) -> None:
    engine = library.open(net_store(tmp_path / "net.pareto", count))
    cuda = engine.cuda(kernels, driver.path)
    preference = [1 / count] * count
    engine.switch(preference)
    cuda.switch(preference, STREAM)
    assert set(driver.launched()) == {f"merge_{name}_fp32_fp32_fp32.cubin"}
    assert_cpu_results(cuda.tensors(STREAM), engine.tensors())
    cuda.close()
    driver.check()


def entry(manifest: dict[str, Any]) -> dict[str, Any]:
    """The kernel that the test's store needs."""
    return next(k for k in manifest["kernels"] if k["name"] == "merge_at_most_4_fp32_fp32_fp32")  # type: ignore[no-any-return]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda m: m.update(format=3), "got format 3, expected 4"),
    "architecture": (lambda m: m.update(architecture="gfx942"), "expected an NVIDIA architecture"),
    "no kernels": (lambda m: m.update(kernels=[]), "has no merge of base fp32 and deltas fp32"),
    "kernels": (lambda m: m.update(kernels=3), "no list of kernels"),
    "a list": (lambda m: m["kernels"].append([]), "in the list of kernels"),
    "path": (lambda m: entry(m).update(file="../x.cubin"), "no file name"),
    "threads": (lambda m: entry(m).update(threads=2048), '"threads", expected 0 to 1024'),
    "no threads": (lambda m: entry(m).update(threads=0), "no threads"),
    "shared": (lambda m: entry(m).update(shared_bytes=-1), '"shared_bytes"'),
    "grid": (lambda m: entry(m).update(grid="1, 1, 1"), "another launch grid"),
    "arguments": (lambda m: entry(m)["arguments"].pop(), "another list of arguments"),
    "order": (lambda m: entry(m)["arguments"].reverse(), "expected base"),
    "type": (lambda m: entry(m)["arguments"][8].update(type="i64"), "got argument experts of type i64"),
    "block": (lambda m: entry(m)["constants"].update(BLOCK=384), "do not divide a tile"),
    "chunk": (lambda m: entry(m)["constants"].update(ONE_CHUNK=1), "for ONE_CHUNK, expected true or false"),
    "missing file": (lambda m: entry(m).update(file="none.cubin"), "cuModuleLoad of"),
    "symbol": (lambda m: [k.update(symbol="other") for k in m["kernels"]], "has no merge"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_kernels(library: Library, driver: Driver, store: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    kernels = write_kernels(tmp_path / "kernels", change)
    assert message in refused(library.open(store), kernels, driver.path)
    driver.check()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1, "format": 1}'])
def test_manifests_that_are_none(
    library: Library, driver: Driver, store: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert "write the kernels by `python -m paretofuse.kernels.aot`" in refused(
        library.open(store), tmp_path, driver.path
    )


def test_wrong_arguments_reach_no_driver(
    library: Library, driver: Driver, kernels: Path, store: Path
) -> None:
    engine = library.open(store)
    cuda = engine.cuda(kernels, driver.path)
    calls = len(driver.log())
    for preference in ([0.5, 0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(LibraryError, match="got"):
            cuda.switch(preference)
    with pytest.raises(LibraryError, match="routing weights"):
        cuda.switch_weights(np.zeros(2, np.float32))
    with pytest.raises(LibraryError, match="which the store does not have"):
        cuda.view("nothing")
    with pytest.raises(LibraryError, match="got 3 bytes at null"):
        library.call("cuda_read", cuda.handle, b"token", None, ctypes.c_uint64(3), None)
    for name in ("cuda_open", "cuda_switch", "cuda_tensor", "cuda_read"):
        with pytest.raises(LibraryError, match="got null"):
            library.call(name, *[None] * 5)
    library.c.paretofuse_cuda_close(None)
    assert len(driver.log()) == calls
    cuda.close()
    driver.check()
