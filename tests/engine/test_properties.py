"""Properties that hold for every stack, on random tensors of odd shapes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paretofuse as pf

SHAPES = st.lists(
    st.sampled_from([(), (1,), (63,), (7, 9), (1025,), (2, 3, 5), (0,), (4099,)]), min_size=1, max_size=5
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
CASES = settings(max_examples=25, deadline=None)


def model(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}.w": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


def engine_of(
    shapes: list[tuple[int, ...]], seed: int, count: int, dtype: torch.dtype = torch.float32, **arguments: str
) -> tuple[pf.Engine, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base = model(shapes, seed, dtype)
    experts = {f"e{i}": model(shapes, seed + 1 + i, dtype) for i in range(count)}
    engine = pf.stack(base, experts, route="tensor", **arguments)  # type: ignore[arg-type]
    return engine, base, experts


def preferences(count: int, seed: int) -> Tensor:
    r = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    return r / r.sum()


@CASES
@given(shapes=SHAPES, seed=st.integers(0, 10**6), count=st.integers(1, 5), dtype=DTYPES)
def test_zero_weights_are_the_base(
    shapes: list[tuple[int, ...]], seed: int, count: int, dtype: torch.dtype
) -> None:
    engine, base, _ = engine_of(shapes, seed, count, dtype)
    merged = engine.merge_state_dict(weights=torch.zeros(len(engine.groups), count))
    assert all(torch.equal(merged[k], base[k]) for k in base)


@CASES
@given(shapes=SHAPES, seed=st.integers(0, 10**6), count=st.integers(1, 5), dtype=DTYPES)
def test_one_hot_is_that_expert(
    shapes: list[tuple[int, ...]], seed: int, count: int, dtype: torch.dtype
) -> None:
    engine, base, experts = engine_of(shapes, seed, count, dtype)
    for name, expert in experts.items():
        merged = engine.merge_state_dict({name: 1.0})
        for key, tensor in expert.items():
            # One rounding of the delta in its dtype, one of the sum.
            bound = torch.finfo(dtype).eps * (base[key].abs() + tensor.abs()).double() * 1.5
            assert ((merged[key].double() - tensor.double()).abs() <= bound).all()


@CASES
@given(shapes=SHAPES, seed=st.integers(0, 10**6), count=st.integers(2, 5))
def test_permuting_experts_changes_nothing(shapes: list[tuple[int, ...]], seed: int, count: int) -> None:
    engine, base, experts = engine_of(shapes, seed, count)
    turned = pf.stack(base, dict(reversed(experts.items())), route="tensor")
    r = dict(zip(experts, preferences(count, seed).tolist(), strict=True))
    one, two = engine.merge_state_dict(r), turned.merge_state_dict(r)
    for key in base:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-5)


@CASES
@given(shapes=SHAPES, seed=st.integers(0, 10**6), count=st.integers(1, 4), dtype=DTYPES)
def test_save_then_load_gives_the_same_bits(
    shapes: list[tuple[int, ...]], seed: int, count: int, dtype: torch.dtype
) -> None:
    engine, base, _ = engine_of(shapes, seed, count, dtype)
    r = preferences(count, seed)
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder) / "store")
        loaded = pf.load(Path(folder) / "store").merge_state_dict(r)
    ours = engine.merge_state_dict(r)
    assert all(torch.equal(ours[k], loaded[k]) and ours[k].shape == base[k].shape for k in base)


@CASES
@given(shapes=SHAPES, seed=st.integers(0, 10**6), count=st.integers(1, 5), dtype=DTYPES)
def test_native_and_reference_agree(
    shapes: list[tuple[int, ...]], seed: int, count: int, dtype: torch.dtype
) -> None:
    native, base, _ = engine_of(shapes, seed, count, dtype)
    reference = engine_of(shapes, seed, count, dtype, backend="reference")[0]
    r = preferences(count, seed)
    one, two = native.merge_state_dict(r), reference.merge_state_dict(r)
    eps = torch.finfo(dtype).eps
    for key in base:
        torch.testing.assert_close(one[key], two[key], rtol=eps, atol=1e-6 if dtype == torch.float32 else eps)


@pytest.mark.parametrize("numel", [1_000_003])
def test_large_odd_sizes(numel: int) -> None:
    engine, base, experts = engine_of([(numel,)], 3, 3)
    r = preferences(3, 0)
    merged = engine.merge_state_dict(r)["t0.w"].double()
    truth = base["t0.w"].double() + sum(
        w * (e["t0.w"].double() - base["t0.w"].double()) for w, e in zip(r, experts.values(), strict=True)
    )
    assert (merged - truth).abs().max() < 2e-6
