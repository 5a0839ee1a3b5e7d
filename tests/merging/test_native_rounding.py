"""The native merge's conversions: every 16-bit value, and rounding to nearest even."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from paretofuse.engine.merging import native
from tests.support.native import DTYPES, USABLE, bits, dense, isas


def converted(values: torch.Tensor, source: str, target: str, isa: str) -> torch.Tensor:
    """The values through the kernels' load and store: a merge without deltas."""
    out = torch.empty(len(values), dtype=DTYPES[target])
    plan = native.MergePlan(
        base=[values.data_ptr()],
        planes=[[None]],
        lengths=[len(values)],
        rows=[0],
        base_dtypes=[source],
        out_dtypes=[target],
        plane_count=1,
        row_count=1,
    )
    plan.run(np.ones((1, 1, 1), np.float32), [[out.data_ptr()]], isa=isa)
    return out


def assert_same_numbers(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(bits(got)[known], bits(expected)[known])


@isas
@pytest.mark.parametrize("source", ["BF16", "F16"])
@pytest.mark.parametrize("target", list(DTYPES))
def test_every_16_bit_value_converts_as_torch_does(isa: str, source: str, target: str) -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(DTYPES[source])
    assert_same_numbers(converted(values, source, target, isa), values.to(DTYPES[target]))


@isas
@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_rounding_goes_to_nearest_even(isa: str, target: str) -> None:
    # Every float32 halfway between two neighbours of the 16-bit type, and its own two neighbours.
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(DTYPES[target]).float()
    shift = 16 if target == "BF16" else 13
    middle = halves.view(torch.int32) | (1 << (shift - 1))
    near = torch.cat([middle - 1, middle, middle + 1]).view(torch.float32)
    subnormal = torch.linspace(-(2.0**-13), 2.0**-13, 100001)
    patterns = torch.randint(-(2**31), 2**31, (200001,), generator=torch.Generator().manual_seed(5))
    for values in (near, subnormal, patterns.to(torch.int32).view(torch.float32)):
        assert_same_numbers(converted(values, "F32", target, isa), values.to(DTYPES[target]))
    ties = torch.tensor(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8] if target == "BF16" else [1 + 2.0**-11, 1 + 3 * 2.0**-11]
    )
    even = torch.tensor([1.0, 1 + 2.0**-6] if target == "BF16" else [1.0, 1 + 2.0**-9])
    assert torch.equal(converted(ties, "F32", target, isa).float(), even)


def test_the_caller_flushing_subnormals_changes_nothing() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    try:
        values = torch.arange(1, 5001, dtype=torch.int32).view(torch.float32)  # the smallest subnormals
        for isa, threads in itertools.product(USABLE, (1, 2)):
            out = torch.zeros(len(values))
            plan = native.MergePlan(
                base=[values.data_ptr()],
                planes=[[dense(values)]],
                lengths=[len(values)],
                rows=[0],
                base_dtypes=["F32"],
                out_dtypes=["F32"],
                plane_count=1,
                row_count=1,
            )
            plan.run(np.full((1, 1, 1), 2.0, np.float32), [[out.data_ptr()]], threads=threads, isa=isa)
            assert torch.equal(bits(out), 3 * bits(values))
    finally:
        torch.set_flush_denormal(False)
