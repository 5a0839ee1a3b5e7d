"""The native CPU backend against float64, bit for bit across threads and instruction sets, and at its edges."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from paretofuse.engine.merging import native
from paretofuse.engine.planes.memory import Memory
from tests.support import cpplib
from tests.support.native import (
    BITS,
    DTYPES,
    USABLE,
    Model,
    bits,
    dense,
    guarded,
    isas,
    mixes,
    poisoned,
    random_weights,
)
from tests.support.process import run


def test_some_instruction_set_is_usable_and_the_best_is_chosen() -> None:
    assert set(native.instruction_sets()) == {"avx512", "avx2", "neon", "scalar"}
    assert "scalar" in USABLE
    if not os.environ.get("PARETOFUSE_ISA"):
        assert native.chosen_isa() == USABLE[0]


@isas
@mixes
@pytest.mark.parametrize("preferences", [1, 3])
def test_merge_matches_float64(
    isa: str, base_dtype: str, delta_dtype: str, out_dtype: str, preferences: int
) -> None:
    lengths = [0, 1, 31, 32, 63, 1000, 70001]
    model = Model(lengths, dtypes=(base_dtype, delta_dtype, out_dtype), unchanged=0.2)
    weights = random_weights(preferences, 2, 3)
    out = model.run(weights, isa=isa)
    step = {"F32": 2.0**-22, "BF16": 2.0**-8, "F16": 2.0**-11}[out_dtype]
    for k, s in itertools.product(range(preferences), range(len(lengths))):
        truth = model.truth(weights, k, s)
        # half a unit of the output's last place, and float32's own error in sums of terms below 32
        assert ((out[k][s].double() - truth).abs() <= truth.abs() * step + 2.0**-17).all()


@isas
def test_a_million_elements(isa: str) -> None:
    model = Model([1000003, 17, 65536, 65537], experts=8, rows=3, seed=1)
    weights = random_weights(2, 3, 8, seed=1)
    out = model.run(weights, isa=isa)
    for k, s in itertools.product(range(2), range(4)):
        assert (out[k][s].double() - model.truth(weights, k, s)).abs().max() < 2e-5


@pytest.mark.parametrize("dtypes", [("F32", "F32", "F32"), ("BF16", "BF16", "BF16"), ("F32", "BF16", "F16")])
def test_same_bits_for_every_thread_count_and_instruction_set(dtypes: tuple[str, str, str]) -> None:
    model = Model([200003, 768, 5, 131072, 999], experts=5, dtypes=dtypes, seed=2, unchanged=0.1)
    weights = random_weights(3, 2, 5, seed=2)
    first = model.run(weights, threads=1, isa="scalar")
    for isa, threads in itertools.product(USABLE, (1, 2, 5, None)):
        again = model.run(weights, threads=threads, isa=isa)
        for got, expected in zip(itertools.chain(*again), itertools.chain(*first), strict=True):
            assert torch.equal(bits(got), bits(expected)), (isa, threads)


def test_preferences_together_give_the_bits_that_each_gives_alone() -> None:
    model = Model([70001, 768], dtypes=("BF16", "BF16", "BF16"), seed=3)
    weights = random_weights(4, 2, 3, seed=3)
    together = model.run(weights)
    for k in range(4):
        for got, expected in zip(model.run(weights[k : k + 1])[0], together[k], strict=True):
            assert torch.equal(bits(got), bits(expected))


@isas
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_types_are_as_exact_as_torch(isa: str, dtype: str) -> None:
    model = Model([100003], experts=8, rows=1, dtypes=(dtype, dtype, dtype), seed=4)
    weights = random_weights(1, 1, 8, seed=4)
    deltas = torch.stack([d for d in model.deltas[0] if d is not None])
    theirs = torch.addmv(model.base[0], deltas.T, torch.from_numpy(weights[0, 0]).to(DTYPES[dtype]))
    truth = model.truth(weights, 0, 0)
    ours = model.run(weights, isa=isa)[0][0]
    assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max()


@isas
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_zero_weights_give_back_the_base_bit_for_bit(isa: str, dtype: str) -> None:
    patterns = torch.randint(-(2**31), 2**31, (20001,), generator=torch.Generator().manual_seed(6))
    base = guarded(patterns.to(BITS[dtype]).view(DTYPES[dtype]))  # NaN of both kinds and -0 among them
    delta = torch.full((len(base),), torch.inf, dtype=DTYPES[dtype])
    plan = native.MergePlan(
        base=[base.data_ptr()],
        planes=[[dense(delta), None]],
        lengths=[len(base)],
        rows=[0],
        base_dtypes=[dtype],
        out_dtypes=[dtype],
        plane_count=2,
        row_count=1,
    )
    out = poisoned(len(base), dtype)
    plan.run(np.array([[[0.0, 1.0]]], np.float32), [[out.data_ptr()]], isa=isa)
    assert torch.equal(bits(out), bits(base))
    plan.run(np.array([[[-0.0, 0.0]]], np.float32), [[out.data_ptr()]], isa=isa)
    assert torch.equal(bits(out), bits(base))


@isas
def test_addresses_off_the_element_boundary(isa: str) -> None:
    # Files may place their tensors at any byte.
    n = 5003
    raw = [np.full(4 * n + 8, 0xFF, np.uint8) for _ in range(3)]
    random = np.random.default_rng(7)
    views = [r[3 : 3 + 4 * n] for r in raw]
    base, delta = (random.normal(size=n).astype(np.float32) for _ in range(2))
    views[0][:], views[1][:] = base.view(np.uint8), delta.view(np.uint8)
    plan = native.MergePlan(
        base=[views[0].ctypes.data],
        planes=[[Memory("dense", "F32", views[1].ctypes.data)]],
        lengths=[n],
        rows=[0],
        base_dtypes=["F32"],
        out_dtypes=["F32"],
        plane_count=1,
        row_count=1,
    )
    plan.run(np.full((1, 1, 1), 0.5, np.float32), [[views[2].ctypes.data]], isa=isa)
    np.testing.assert_array_equal(views[2].copy().view(np.float32), base + np.float32(0.5) * delta)
    assert (raw[2][:3] == 0xFF).all()
    assert (raw[2][-5:] == 0xFF).all()


@isas
@pytest.mark.parametrize(("grad_dtype", "delta_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("length", [0, 1, 63, 4097, 200003])
def test_inner_matches_float64(isa: str, grad_dtype: str, delta_dtype: str, length: int) -> None:
    random = torch.Generator().manual_seed(8)
    grad = guarded(torch.randn(length, generator=random).to(DTYPES[grad_dtype]))
    deltas = [guarded(torch.randn(length, generator=random).to(DTYPES[delta_dtype])) for _ in range(3)]
    planes = [dense(deltas[0]), None, dense(deltas[1]), dense(deltas[2])]
    truth = [float((grad.double() * d.double()).sum()) for d in deltas]
    scale = max([1.0, *(float((grad.double() * d.double()).abs().sum()) for d in deltas)])
    results = []
    for threads in (1, 2, 5):
        results.append(
            native.inner(
                grad.data_ptr() if length else 0,
                planes,
                length,
                grad_dtype=grad_dtype,
                threads=threads,
                isa=isa,
            )
        )
    assert results[0].dtype == np.float64
    np.testing.assert_allclose(results[0], [truth[0], 0.0, truth[1], truth[2]], atol=2e-6 * scale, rtol=0)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    if isa == USABLE[0]:
        for other in USABLE:
            again = native.inner(grad.data_ptr(), planes, length, grad_dtype=grad_dtype, isa=other)
            np.testing.assert_array_equal(again, results[0])


@isas
@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 1000003])
def test_copy(isa: str, nbytes: int) -> None:
    source = np.random.default_rng(9).integers(0, 256, nbytes + 10, dtype=np.uint8)
    target = np.full(nbytes + 10, 0xAB, np.uint8)
    native.copy(target.ctypes.data + 5, source.ctypes.data + 3, nbytes, isa=isa)
    np.testing.assert_array_equal(target[5 : 5 + nbytes], source[3 : 3 + nbytes])
    assert (target[:5] == 0xAB).all()
    assert (target[5 + nbytes :] == 0xAB).all()


def test_an_address_table_can_be_kept() -> None:
    model = Model([1000, 10])
    weights = random_weights(1, 2, 3)
    out = [poisoned(1000, "F32"), poisoned(10, "F32")]
    table = np.array([[t.data_ptr() for t in out]], np.uint64)
    model.plan.run(weights, table)
    for got, expected in zip(out, model.run(weights)[0], strict=True):
        assert torch.equal(got, expected)


def test_a_plan_of_nothing_runs() -> None:
    plan = native.MergePlan(
        base=[],
        planes=[],
        lengths=[],
        rows=[],
        base_dtypes=[],
        out_dtypes=[],
        plane_count=2,
        row_count=1,
    )
    plan.run(np.zeros((1, 1, 2), np.float32), [[]])


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    length = 2**31 + 70001
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 3 * length:
        pytest.skip(f"needs {3 * length >> 30} GiB of free memory, there are {free >> 30}")
    base, delta, out = (np.zeros(length, np.uint16) for _ in range(3))  # inputs stay unbacked: pages of zeros
    base[-3:], delta[-3:] = 0x3F80, 0x4000  # 1 and 2
    plane = Memory("dense", "BF16", delta.ctypes.data)
    plan = native.MergePlan(
        base=[base.ctypes.data],
        planes=[[plane]],
        lengths=[length],
        rows=[0],
        base_dtypes=["BF16"],
        out_dtypes=["BF16"],
        plane_count=1,
        row_count=1,
    )
    plan.run(np.full((1, 1, 1), 0.5, np.float32), [[out.ctypes.data]])
    assert out[-3:].tolist() == [0x4000] * 3
    assert np.flatnonzero(out[2**31 - 10 : -3]).size == 0
    result = native.inner(base.ctypes.data, [plane], length, grad_dtype="BF16")
    assert result.tolist() == [6.0]


# Only the team's start and end differ between OpenMP, which the first build has, and std::thread, which the second has.
@pytest.mark.slow
@pytest.mark.parametrize("sanitized", ["asan-core", "tsan"])
def test_the_core_is_clean_under_sanitizers(sanitized: str) -> None:
    run(cpplib.build(sanitized, "test_core") / "test_core")
