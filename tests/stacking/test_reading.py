"""Checkpoint files are read ahead, so that many small tensors cost few reads; what comes out is what lies there."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking import sources
from paretofuse.engine.stacking.sources import from_safetensors

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}


def write(path: Path, seed: int, count: int, header_pad: int = 0) -> dict[str, torch.Tensor]:
    """A file of tensors of mixed dtypes, none of them aligned but by chance."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    header, data, tensors = {}, b"", {}
    for number in range(count):
        name, (word, dtype) = f"t{number}", pick.choice(list(DTYPES.items()))
        raw = torch.randint(0, 120, (pick.randint(0, 9),), generator=generator)
        tensors[name] = raw.to(dtype)
        content = bytes(tensors[name].view(torch.uint8).numpy()) if len(raw) else b""
        header[name] = {
            "dtype": word,
            "shape": [len(raw)],
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * header_pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return tensors


@pytest.mark.parametrize("ahead", [0, 7, 64, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_any_alignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, seed: int
) -> None:
    monkeypatch.setattr(sources, "_AHEAD", ahead)
    first = write(tmp_path / "a.safetensors", seed, 40, header_pad=seed)
    second = {f"{name}!": t for name, t in write(tmp_path / "b.safetensors", seed + 9, 40).items()}
    content = (tmp_path / "b.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = {f"{name}!": entry for name, entry in json.loads(content[8 : 8 + size]).items()}
    text = json.dumps(header).encode()
    (tmp_path / "b.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    source = from_safetensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "it")
    tensors = {**first, **second}
    order = list(tensors)
    for shuffled in (False, True):
        if shuffled:
            random.Random(seed).shuffle(order)
        read = {name: source.read(name, 0, tensors[name].numel()) for name in order}  # all held at once
        for name, tensor in read.items():
            assert torch.equal(tensor, tensors[name]), name
            assert tensor.data_ptr() % tensor.element_size() == 0 or not tensor.numel()
    for name, tensor in tensors.items():
        assert torch.equal(
            source.read(name, tensor.numel() // 2, tensor.numel()), tensor[tensor.numel() // 2 :]
        )


def test_many_small_tensors_cost_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    tensors = {f"t{number:04}": torch.full((3,), float(number)) for number in range(1000)}
    for name, scale in (("base", 1), ("a", 2), ("b", 3)):
        save_file({n: scale * t for n, t in tensors.items()}, tmp_path / f"{name}.safetensors")
    reads: list[int] = []
    readv = os.readv

    def counted(descriptor: int, buffers: list[memoryview]) -> int:
        reads.append(descriptor)
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", counted)
    experts = {name: tmp_path / f"{name}.safetensors" for name in "ab"}
    pf.stack(tmp_path / "base.safetensors", experts, route="tensor").save(tmp_path / "s")
    assert 5 <= len(reads) <= 40
    merged = pf.load(tmp_path / "s").merge_state_dict([0.5, 0.5])
    assert all(torch.equal(merged[name], 2.5 * tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_file_that_ends_early_is_told(tmp_path: Path, cut: int) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({f"t{number:03}": torch.ones(5) for number in range(500)}, path)
    source = from_safetensors([path], "it")
    os.truncate(path, path.stat().st_size - cut)
    words = r"a\.safetensors ended while reading tensor 't\d+'; is it truncated"
    with pytest.raises(CheckpointError, match=words):
        [source.read(name, 0, 5) for name in source.infos]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deltas_whose_squares_vanish_or_overflow_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {"w": torch.zeros(5), "v": torch.zeros(5)}
    expert = {"w": torch.full((5,), 1e-30), "v": torch.full((5,), 1e30)}
    if dtype == torch.float16:
        with pytest.raises(CheckpointError, match="'v' overflows"):
            pf.stack(base, {"a": expert}, route="tensor", delta_dtype=dtype)
        expert = {"w": torch.full((5,), 1e-7), "v": torch.full((5,), 6e4)}
    engine = pf.stack(base, {"a": expert}, route="tensor", delta_dtype=dtype)
    merged = engine.merge_state_dict([1.0])
    for name, tensor in expert.items():
        assert torch.equal(merged[name], tensor.to(dtype).float())


def test_blocks_are_made_by_one_thread_and_planes_by_all(tmp_path: Path) -> None:
    """Beside another busy process, two threads that wait for each other took ten times as long as one."""
    from safetensors.torch import save_file

    for size, name in enumerate(("base", "a")):
        save_file({"w": torch.full((64, 64), float(size))}, tmp_path / f"{name}.safetensors")
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for planes, expected in (("dense", 1), ("int8", 3)):
            threads: set[int] = set()
            stack_to_store(
                tmp_path / "base.safetensors",
                {"a": tmp_path / "a.safetensors"},
                tmp_path / "store",
                planes=planes,
                progress=lambda _, threads=threads: threads.add(torch.get_num_threads()),
            )
            assert threads == {expected}
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)
