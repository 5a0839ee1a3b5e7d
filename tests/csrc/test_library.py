"""libparetofuse by its C interface: the bits of the Python engine, and errors that say what to do."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import paretofuse as pf
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.safetensors_file import SafetensorsFile, SafetensorsWriter
from tests.support import cpplib
from tests.support.cpplib import Array, Library, LibraryError, assert_same_bits, bits
from tests.support.models import net_and_experts, tiny_gpt2
from tests.support.process import run


def trained(engine: pf.Engine, seed: int) -> pf.Engine:
    """Routers as training leaves them: nothing at its start value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return engine


def random_preference(random: np.random.Generator, experts: int) -> list[float]:
    shares = random.dirichlet(np.ones(experts))
    return [float(share) for share in shares]


def net_store(path: Path, count: int = 3, **options: Any) -> Path:
    base, experts = net_and_experts(count=count)
    trained(pf.stack(base, experts, **options), 1).save(path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return net_store(tmp_path_factory.mktemp("stores") / "net")


STORES: dict[str, Callable[[Path], Path]] = {
    "float32": lambda path: net_store(path),
    "one expert": lambda path: net_store(path, count=1),
    "bfloat16, sqrt": lambda path: net_store(path, dtype=torch.bfloat16, init="sqrt"),
    "float16, constant": lambda path: net_store(path, dtype=torch.float16, init="constant"),
    "bfloat16 deltas": lambda path: net_store(path, delta_dtype=torch.bfloat16, route="tensor"),
    "static weights": lambda path: net_store(path, route=lambda n: "one" if "first" in n else None),
}


@pytest.mark.parametrize("kind", STORES)
def test_switches_give_the_bits_of_the_python_engine(library: Library, tmp_path: Path, kind: str) -> None:
    path = STORES[kind](tmp_path / "store")
    python = pf.load(path, backend="native")
    engine = library.open(path, threads=2)
    assert engine.names("objective") == list(python.objectives)
    assert engine.names("group") == list(python.groups)
    assert set(engine.names("tensor")) == {spec.name for spec in python.layout.tensors}
    addresses = {name: engine.view(name).data for name in engine.names("tensor")}
    random = np.random.default_rng(3)
    for _ in range(3):
        preference = random_preference(random, len(python.objectives))
        engine.switch(preference)
        assert_same_bits(engine.tensors(), python.merge_state_dict(preference))
        weights = random.normal(size=(len(python.groups), len(python.objectives))).astype(np.float32)
        engine.switch_weights(weights)
        assert_same_bits(engine.tensors(), python.merge_state_dict(weights=torch.from_numpy(weights)))
    assert {name: engine.view(name).data for name in engine.names("tensor")} == addresses


def test_tied_names_lead_to_one_tensor(library: Library, store: Path) -> None:
    engine = library.open(store)
    assert "head.weight" in engine.names("tensor") or "tied.weight" in engine.names("tensor")
    assert engine.view("head.weight").data == engine.view("tied.weight").data


def test_a_gpt2_store(library: Library, tmp_path: Path) -> None:
    base = tiny_gpt2()
    experts = {name: tiny_gpt2(seed) for seed, name in enumerate(("cola", "sst2"), 1)}
    trained(pf.stack(base, experts, route="mlp"), 2).save(tmp_path / "store")
    engine = library.open(tmp_path / "store")
    engine.switch([0.25, 0.75])
    assert_same_bits(engine.tensors(), pf.load(tmp_path / "store").merge_state_dict([0.25, 0.75]))
    engine.write(tmp_path / "model")
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    truth = pf.load(tmp_path / "store").merge_state_dict([0.25, 0.75])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, truth[name]), name


@pytest.mark.parametrize("init", ["identity", "sqrt", "constant"])
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7, 8, 9, 20, 70])
def test_routers_give_pythons_numbers(library: Library, tmp_path: Path, init: str, experts: int) -> None:
    base = {f"w{i}": torch.randn(3) for i in range(5)}
    models = {f"e{e}": {name: t + 1 for name, t in base.items()} for e in range(experts)}
    python = trained(pf.stack(base, models, route="tensor", init=init), experts)
    python.save(tmp_path / "store")
    opened = Store.open(tmp_path / "store")
    engine = library.open(tmp_path / "store")
    random = np.random.default_rng(experts)
    for _ in range(50):
        preference = random_preference(random, experts)
        truth = python.routers(preference).detach().numpy()
        ours = opened.routing_weights(np.array(preference))
        np.testing.assert_array_max_ulp(ours, truth, maxulp=1)
        assert engine.routing_weights(preference).tobytes() == ours.tobytes()


def test_every_instruction_set_and_thread_count_gives_the_same_bits(library: Library, store: Path) -> None:
    from paretofuse.engine.merging import native

    truth = pf.load(store).merge_state_dict([0.2, 0.3, 0.5])
    for isa in (name for name, usable in native.instruction_sets().items() if usable):
        for threads in (1, 3):
            engine = library.open(store, threads=threads, isa=isa)
            engine.switch([0.2, 0.3, 0.5])
            assert_same_bits(engine.tensors(), truth)


def test_merge_into_writes_the_given_tensors_only(library: Library, store: Path) -> None:
    engine = library.open(store)
    truth = pf.load(store).merge_state_dict([0.5, 0.5, 0.0])
    chosen = ["second.weight", "head.weight", "steps", "scale", "norm.running_var", "token"]
    targets: dict[str, Array] = {}
    rooms = []
    for name in chosen:
        shape = truth[name].shape
        room = np.full(truth[name].numel() + 2, 7, bits(truth[name]).dtype)
        rooms.append(room)
        targets[name] = room[1:-1].reshape(shape)
        if targets[name].dtype.kind == "f":
            targets[name].fill(np.nan)
    engine.merge_into([0.5, 0.5, 0.0], targets)
    assert_same_bits({name: array.copy() for name, array in targets.items()}, truth)
    assert all(room[0] == 7 and room[-1] == 7 for room in rooms)
    small = np.zeros(3, np.float32)
    with pytest.raises(LibraryError, match=r'"second.bias": got 12 bytes at an address, expected 32'):
        engine.merge_into([1, 0, 0], {"second.bias": small})
    with pytest.raises(LibraryError, match="which the store does not have"):
        engine.merge_into([1, 0, 0], {"third": small})


@pytest.fixture(scope="module")
def head_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "heads"
    base, experts = net_and_experts(count=2)
    pf.stack(base, experts, heads=["second"]).save(path)
    return path


@pytest.mark.parametrize("head", [None, "b"])
def test_written_files_hold_what_python_writes(
    library: Library, head_store: Path, tmp_path: Path, head: str | None
) -> None:
    engine = library.open(head_store)
    with pytest.raises(LibraryError, match="before a switch"):
        engine.write(tmp_path / "early.safetensors")
    engine.switch([0.25, 0.75])
    out = tmp_path / "deep" / "model.safetensors"
    engine.write(out, head)
    merge_store(head_store, [0.25, 0.75], tmp_path / "truth.safetensors", head=head)
    ours, theirs = SafetensorsFile(out), SafetensorsFile(tmp_path / "truth.safetensors")
    assert [*ours.tensors] == [*theirs.tensors]
    for name, view in ours.tensors.items():
        other = theirs.tensors[name]
        assert (view.dtype, view.shape) == (other.dtype, other.shape)
        assert view.data.tobytes() == other.data.tobytes()
        assert view.offset % view.data.itemsize == 0
    assert safetensors.torch.load_file(out).keys() == theirs.tensors.keys()
    engine.switch([1.0, 0.0])
    engine.write(out, head)  # replaces the file in one step
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]
    with pytest.raises(LibraryError, match="got head 'c', expected one that the store has: 'a', 'b'"):
        engine.write(out, "c")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(LibraryError, match=r"holds another file \(notes.txt\)"):
        engine.write(tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "mine.safetensors")
    with pytest.raises(LibraryError, match="was not written by a merge"):
        engine.write(tmp_path / "mine.safetensors")
    assert set(safetensors.torch.load_file(tmp_path / "mine.safetensors")) == {"w"}
    with pytest.raises(LibraryError, match="expected the name of a file or directory") as error:
        engine.write("")
    assert error.value.status == Library.INVALID
    with pytest.raises(LibraryError) as error:
        engine.write(tmp_path / "full" / "notes.txt" / "model.safetensors")  # below a file
    assert error.value.status == Library.SYSTEM


def test_replicas_are_pinned_and_the_least_recently_used_goes_first(library: Library, store: Path) -> None:
    engine = library.open(store, replicas=2)
    python = pf.load(store)
    first, second, third = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]

    def check(replica: cpplib.Replica, preference: list[float]) -> int:
        truth = python.merge_state_dict(preference)
        assert_same_bits({n: replica.view(n).array() for n in engine.names("tensor")}, truth)
        return int(replica.view("second.weight").data)

    a, b = engine.acquire(first), engine.acquire(second)
    place_a, place_b = check(a, first), check(b, second)
    assert place_a != place_b
    again = engine.acquire(first)
    assert check(again, first) == place_a
    a.release()
    b.release()  # `again` still pins the first one, so the third preference takes the second's place
    c = engine.acquire(third)
    assert check(c, third) == place_b
    check(again, first)
    again.release()
    c.release()
    assert check(engine.acquire(first), first) == place_a
    c = engine.acquire(third)
    engine.close()
    check(c, third) if engine.handle else None  # names come from the engine; the replica itself lives on
    assert (
        c.view("second.weight").array().tobytes()
        == bits(python.merge_state_dict(third)["second.weight"]).tobytes()
    )
    c.release()


def test_of_several_that_nobody_holds_the_least_recently_used_goes_first(
    library: Library, store: Path
) -> None:
    engine = library.open(store, replicas=3)

    def place(preference: list[float]) -> int:
        replica = engine.acquire(preference)
        found = int(replica.view("second.weight").data)
        replica.release()
        return found

    kinds = {"a": [0.6, 0.4, 0.0], "b": [0.0, 0.6, 0.4], "c": [0.4, 0.0, 0.6]}
    places = {name: place(kinds[name]) for name in "abca"}  # b is now the least recently used, then c
    assert len(set(places.values())) == 3  # empty ones go before all
    new = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert [place(preference) for preference in new] == [places[name] for name in "bca"]


def test_acquire_waits_for_a_release_and_for_nothing_else(library: Library, store: Path) -> None:
    engine = library.open(store, replicas=1)
    held = engine.acquire([1.0, 0.0, 0.0])
    shared = engine.acquire([1.0, 0.0, 0.0])  # the same preference: no waiting
    done = threading.Event()

    def other() -> None:
        engine.acquire([0.0, 1.0, 0.0]).release()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    held.release()
    assert not done.wait(0.2)
    shared.release()
    assert done.wait(20)
    thread.join()


def test_wrong_arguments_say_what_is_wrong_and_change_nothing(library: Library, store: Path) -> None:
    engine = library.open(store)
    engine.switch([0.2, 0.3, 0.5])
    before = engine.tensors()
    wrong: list[tuple[list[float], str]] = [
        ([0.5, 0.5], "got a preference of 2 numbers, expected 3"),
        ([0.5, 0.5, 0.5], "sum 1.5, expected a sum of 1; divide by the sum"),
        ([0.0, 0.0, 0.0], "sum 0, expected a sum of 1$"),
        ([1.5, -0.5, 0.0], 'got -0.5 for objective "b"'),
        ([float("nan"), 0.5, 0.5], "got nan"),
        ([float("inf"), 0.0, 0.0], "got inf"),
    ]
    for preference, message in wrong:
        for call in (engine.switch, engine.routing_weights, engine.acquire):
            with pytest.raises(LibraryError, match=message) as error:
                call(preference)
            assert error.value.status == Library.INVALID
    groups = len(engine.names("group"))
    for weights in (np.zeros((groups, 2), np.float32), np.full((groups, 3), np.nan, np.float32)):
        with pytest.raises(LibraryError, match="routing weights"):
            engine.switch_weights(weights)
    with pytest.raises(LibraryError, match='"nothing", which the store does not have'):
        engine.view("nothing")
    assert {n: a.tobytes() for n, a in engine.tensors().items()} == {
        n: a.tobytes() for n, a in before.items()
    }
    for options, message in (
        ({"threads": -1}, "threads: got -1"),
        ({"replicas": -1}, "replicas: got -1"),
        ({"isa": "mmx"}, "mmx"),
    ):
        with pytest.raises(LibraryError, match=message):
            library.open(store, **options)  # type: ignore[arg-type]


def test_null_arguments_are_refused(library: Library, store: Path) -> None:
    engine = library.open(store)
    null = ctypes.c_void_p()
    for name, arguments in {
        "open": (None, None, ctypes.byref(null)),
        "switch": (null, *cpplib.doubles([1, 0, 0])),
        "tensor": (engine.handle, None, ctypes.byref(cpplib.View())),
        "write": (engine.handle, None, None),
        "merge_into": (engine.handle, *cpplib.doubles([1, 0, 0]), None, ctypes.c_uint64(1)),
        "routing_weights": (engine.handle, None, ctypes.c_uint64(3), None, ctypes.c_uint64(0)),
        "acquire": (engine.handle, *cpplib.doubles([1, 0, 0]), None),
        "replica_tensor": (null, b"x", ctypes.byref(cpplib.View())),
    }.items():
        with pytest.raises(LibraryError, match="got null") as error:
            library.call(name, *arguments)
        assert error.value.status == Library.INVALID
    for count in (2**61, 2**64 - 1):
        with pytest.raises(LibraryError, match="out of range") as error:
            library.call("switch", engine.handle, cpplib.doubles([1, 0, 0])[0], ctypes.c_uint64(count))
        assert error.value.status == Library.INVALID
    library.c.paretofuse_close(None)
    library.c.paretofuse_release(None)
    assert library.c.paretofuse_tensor_count(None) == 0


def test_a_file_that_changes_after_it_was_mapped_is_noticed(
    library: Library, store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    for victim in ("experts/b.safetensors", "base.safetensors"):
        shutil.copytree(store, path)
        engine = library.open(path)
        engine.switch([1.0, 0.0, 0.0])
        with open(path / victim, "r+b") as file:
            file.truncate((path / victim).stat().st_size - 4096 if victim != "base.safetensors" else 100)
        for call in (engine.switch, engine.acquire):
            with pytest.raises(LibraryError, match="was changed after it was opened; open the store again"):
                call([0.0, 1.0, 0.0])
        shutil.rmtree(path)


def test_a_file_that_was_merely_touched_is_as_good_as_before(
    library: Library, store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    shutil.copytree(store, path)
    engine = library.open(path)
    engine.switch([1.0, 0.0, 0.0])
    before = engine.tensors()
    victim = path / "experts" / "b.safetensors"
    os.utime(victim, (1, 1))
    engine.switch([1.0, 0.0, 0.0])
    assert_same_bits(engine.tensors(), {name: torch.from_numpy(a) for name, a in before.items()})
    with open(victim, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    os.utime(victim, (2, 2))
    with pytest.raises(LibraryError, match="was changed after it was opened"):
        engine.switch([1.0, 0.0, 0.0])


def test_a_store_that_is_replaced_goes_on_as_it_was(library: Library, tmp_path: Path) -> None:
    path = net_store(tmp_path / "store")
    engine = library.open(path)
    truth = pf.load(path).merge_state_dict([0.2, 0.3, 0.5])
    truth = {name: tensor.clone() for name, tensor in truth.items()}
    base, experts = net_and_experts(seed=9)
    pf.stack(base, experts).save(path, force=True)
    engine.switch([0.2, 0.3, 0.5])
    assert_same_bits(engine.tensors(), truth)
    assert library.open(path).routing_weights([0.2, 0.3, 0.5])[0] == pytest.approx([0.2, 0.3, 0.5])


def test_the_version_is_the_packages(library: Library) -> None:
    assert library.c.paretofuse_version().decode() == pf.__version__


def test_misaligned_constants_are_copied(library: Library, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(store, path)
    old = SafetensorsFile(path / "base.safetensors")
    with SafetensorsWriter(tmp_path / "base", metadata={"format": "pt"}) as writer:
        # Names of odd lengths and one odd tensor first: everything after it lies off its boundary.
        views = sorted(old.tensors.values(), key=lambda view: view.name != "scale")
        writer.add("odd", "U8", (3,), [b"abc"])
        for view in views:
            writer.add(view.name, view.dtype, view.shape, [view.data])
    shutil.copy(tmp_path / "base", path / "base.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["base.safetensors"]["bytes"] = (path / "base.safetensors").stat().st_size
    odd = {"name": "odd", "shape": [3], "dtype": "U8", "role": "constant", "group": None, "delta_dtype": "U8"}
    manifest["tensors"].append(odd | {"aliases": []})
    (path / "manifest.json").write_text(json.dumps(manifest))
    engine = library.open(path)
    engine.switch([0.2, 0.3, 0.5])
    truth = pf.load(store).merge_state_dict([0.2, 0.3, 0.5])
    for name, tensor in truth.items():
        view = engine.view(name)
        assert view.data % tensor.element_size() == 0, name
        assert view.array().tobytes() == bits(tensor).tobytes(), name


def test_structures_have_the_fields_of_the_header() -> None:
    """A structure that is shorter here than there would be read beyond its end."""
    header = (cpplib.ROOT / "csrc" / "include" / "paretofuse" / "paretofuse.h").read_text()
    told = {}
    for body, name in re.findall(r"typedef struct {(.*?)} (\w+);", header, re.DOTALL):
        told[name] = re.findall(r"(\w+);", re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL))
    here = (cpplib.View, cpplib.Options, cpplib.Target, cpplib.CudaOptions)
    assert told == {s.__doc__.rstrip("."): [field[0] for field in s._fields_] for s in here if s.__doc__}


def test_verify_reads_every_file(library: Library, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(store, path)
    library.open(path, verify=True)
    content = bytearray((path / "base.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "base.safetensors").write_bytes(content)
    library.open(path)
    with pytest.raises(LibraryError, match=r"base.safetensors: its checksum is not the manifest's"):
        library.open(path, verify=True)


def test_the_core_tests_pass_in_this_build(release: Path) -> None:
    run(release / "test_core")


def test_engines_are_independent(library: Library, store: Path) -> None:
    first, second = library.open(store), library.open(store)
    first.switch([1.0, 0.0, 0.0])
    second.switch([0.0, 1.0, 0.0])
    assert first.view("second.weight").array().tobytes() != second.view("second.weight").array().tobytes()
