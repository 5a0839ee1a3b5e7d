"""The C++ passes against each method's plain NumPy: the same masks, the same numbers within rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paretofuse.engine.methods import native
from paretofuse.engine.methods.breadcrumbs import Breadcrumbs
from paretofuse.engine.methods.dare import DareLinear
from paretofuse.engine.methods.della import Della
from paretofuse.engine.methods.deltas import DeltaMethod
from paretofuse.engine.methods.method import Group, Method
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.random import key_of
from paretofuse.engine.methods.registry import METHODS, by_name
from paretofuse.engine.methods.ties import Ties

OPTIONS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3, "weight": 0.7},
    "dare_ties": {"density": 0.4},
    "breadcrumbs": {"density": 0.5, "gamma": 0.2, "rescale": True},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.9},
    "della": {"density": 0.5, "epsilon": 0.2, "lambda": 0.8},
    "slerp": {"t": 0.3},
    "model_stock": {"filter_wise": False},
}
SHAPES = [(1,), (7,), (5, 3), (131, 1003), (3, 5, 7), (2, 70001)]


def group_of(
    method: Method, shape: tuple[int, ...], dtype: str = "F32", models: int = 3, **options: Any
) -> Group:
    """Random tensors; of bfloat16 differences are small, so that many have the same magnitude."""
    random = np.random.default_rng(sum(shape) + len(dtype))
    base = random.standard_normal(shape, np.float32)
    count = min(models, method.models[1] or models)
    others = [base + 0.01 * random.standard_normal(shape, np.float32) for _ in range(count)]
    given = {"weight": 0.6, **OPTIONS.get(method.name, {}), **options}
    parameters = {p.name: given.get(p.name, p.default) for p in method.parameters}
    each = tuple({**parameters, "weight": 0.3 - 0.2 * k} for k in range(count))
    return Group(
        "w",
        None if method.base == "none" else Numbers.of(base, dtype),
        tuple(Numbers.of(own, dtype) for own in others),
        each,
        parameters,
        seed=5,
    )


def poisoned(dtype: str, shape: tuple[int, ...]) -> Numbers:
    out = Numbers.empty(dtype, shape)
    out.data[:] = 0xFF  # NaN in every dtype
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_gives_its_references_numbers(method: Method, shape: tuple[int, ...]) -> None:
    group = group_of(method, shape)
    out = poisoned("F32", shape)
    method.merge(group, out)
    np.testing.assert_allclose(out.floats(), method.reference(group), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_other_dtypes_round_the_references_numbers_once(method: Method, dtype: str) -> None:
    group = group_of(method, (37, 129), dtype)
    out = poisoned(dtype, (37, 129))
    method.merge(group, out)
    truth = Numbers.of(method.reference(group), dtype).floats()
    # Sums in another order may fall to the other side of a boundary between two numbers.
    step = {"BF16": 2**-7, "F16": 2**-10, "F64": 1e-12}[dtype]
    np.testing.assert_allclose(out.floats(), truth, rtol=step, atol=2e-6)
    assert (out.floats() != truth).mean() < 0.005


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
        ("linear", {"normalize": False}),
        ("ties", {"normalize": False}),
        ("task_arithmetic", {"normalize": True}),
        ("passthrough", {"scale": 0.5}),
    ],
)
@pytest.mark.parametrize("shape", [(7,), (131, 103), (2, 70001)], ids=str)
def test_options(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    method = by_name()[name]
    group = group_of(method, shape, **options)
    out = poisoned("F32", shape)
    method.merge(group, out)
    np.testing.assert_allclose(out.floats(), method.reference(group), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Ties(), {"density": 0.3}),
        (Ties(), {"density": 1e-9}),
        (Ties(), {"density": 0.0}),
        (Ties(), {"density": 1.0}),
        (Breadcrumbs(), {"density": 0.5, "gamma": 0.2}),
        (Breadcrumbs(), {"density": 0.9, "gamma": 0.5}),
        (DareLinear(), {"density": 0.37}),
        (Della(), {"density": 0.5, "epsilon": 0.3}),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_same_elements_stay_whatever_the_threads(
    method: DeltaMethod, options: dict[str, float], dtype: str
) -> None:
    group = group_of(method, (67, 1999), dtype, models=1)
    assert group.base is not None
    base, model = group.base, group.models[0]
    key = key_of(0, "w", 0)
    delta = model.floats() - base.floats()
    kept = method.keep(delta, {**group.each[0], **options}, key)
    for threads in (1, 3):
        found = method.select(model, base, {**group.each[0], **options}, key, threads)
        if kept is None:
            assert found is native.ALL
            continue
        assert found.mask is not None
        bits = np.unpackbits(found.mask, count=delta.size, bitorder="little")
        np.testing.assert_array_equal(bits.reshape(delta.shape).astype(bool), kept)
        np.testing.assert_allclose(
            (found.before, found.after),
            (np.abs(delta).sum(dtype=np.float64), np.abs(delta[kept]).sum(dtype=np.float64)),
            rtol=1e-6,
        )


@pytest.mark.parametrize("name", [m.name for m in METHODS])
def test_the_same_bits_for_all_threads_and_instruction_sets(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paretofuse.engine.merging.native import instruction_sets

    method = by_name()[name]
    group = group_of(method, (131, 1003), "BF16")
    found = set()
    for isa in (name for name, usable in instruction_sets().items() if usable):
        monkeypatch.setenv("PARETOFUSE_ISA", isa)
        for threads in (1, 2):
            out = poisoned("BF16", (131, 1003))
            method.merge(Group(**{**vars(group), "threads": threads}), out)
            found.add(out.data.tobytes())
    assert len(found) == 1


def test_what_the_extension_refuses() -> None:
    one = Numbers.of(np.ones(6, np.float32), "F32")
    with pytest.raises(ValueError, match="count: got 4 and 3 of 6 elements"):
        native.keep_largest(one, one, 4, 3, 1)
    with pytest.raises(ValueError, match="columns: got 4, expected a divisor of 6"):
        native.keep_ranked(one, one, 4, (0, 0), 0.1, 0.2, 1)
    with pytest.raises(ValueError, match="columns: got 4, expected a divisor of 6"):
        native.products(None, [one, one], 4, 1)
    with pytest.raises(ValueError, match="threads: got 0, expected 1 to 1024"):
        native.keep_drawn(one, one, (0, 0), 3, 0)
