"""libparetofuse's merges of planes that are not dense, and with row coefficients: the bits of the Python engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import paretofuse as pf
from paretofuse.engine.store.reader import Store
from tests.store.test_planes import mixed_store
from tests.store.test_row_coefficients import rows_store
from tests.support import cpplib
from tests.support.cpplib import Library, LibraryError, assert_same_bits, bits


def check_merges(
    engine: cpplib.Engine, preference: list[float], truth: dict[str, torch.Tensor], folder: Path
) -> None:
    """The engine's own memory, a file that it writes and a replica all hold the truth's bits."""
    engine.switch(preference)
    assert_same_bits(engine.tensors(), truth)
    engine.write(folder / "merged.safetensors")
    written = safetensors.torch.load_file(folder / "merged.safetensors")
    assert_same_bits({name: bits(tensor) for name, tensor in written.items()}, truth)
    replica = engine.acquire(preference)
    assert_same_bits({name: replica.view(name).array() for name in engine.names("tensor")}, truth)
    replica.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_of_every_format_give_the_bits_of_the_python_engine(
    library: Library, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = mixed_store(tmp_path / "store", dtype)
    python = pf.load(path, backend="native")
    for threads in (1, 3):
        engine = library.open(path, threads=threads)
        for preference in ([0.2, 0.8], [1.0, 0.0]):
            check_merges(engine, preference, python.merge_state_dict(preference), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_coefficients_give_the_bits_of_the_python_engine(
    library: Library, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = rows_store(tmp_path / "store", dtype)
    python, opened = pf.load(path, backend="native"), Store.open(path)
    engine = library.open(path, threads=2)
    rows, groups = python.layout.row_count, len(python.groups)
    for preference in ([0.2, 0.8], [1.0, 0.0]):
        weights = engine.routing_weights(preference, rows)
        assert weights.tobytes() == opened.routing_weights(np.array(preference)).tobytes()
        truth = python.merge_state_dict(weights=torch.from_numpy(weights))
        check_merges(engine, preference, truth, tmp_path)
        one = {"odd.weight": np.full_like(bits(truth["odd.weight"]), 7)}
        engine.merge_into(preference, one)
        assert_same_bits(one, truth)
        engine.switch_weights(weights[:groups])
        scalar = python.merge_state_dict(weights=torch.from_numpy(weights[:groups]))
        assert_same_bits(engine.tensors(), scalar)
        with pytest.raises(LibraryError, match=f"{groups} \\+ {rows} rows"):
            engine.switch_weights(weights[: groups + 1])
        with pytest.raises(LibraryError, match=f"expected {weights.size}"):
            engine.routing_weights(preference)  # room for those of the groups alone
