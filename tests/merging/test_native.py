"""The native CPU backend against float64, bit for bit across threads and instruction sets, and at its edges."""

from __future__ import annotations

import itertools
import os

import numpy as np
import numpy.typing as npt
import pytest
import torch

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.merging import native
from paretofuse.engine.planes.memory import Memory
from tests.support import cpplib
from tests.support.process import python, run

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BITS = {"F32": torch.int32, "BF16": torch.int16, "F16": torch.int16}
USABLE = [name for name, usable in native.instruction_sets().items() if usable]
GUARD = 33  # elements around every tensor: an odd number, so that tensors start off every vector boundary

isas = pytest.mark.parametrize("isa", USABLE)
mixes = pytest.mark.parametrize(
    ("base_dtype", "delta_dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES, DTYPES))
)


def dense(values: torch.Tensor) -> Memory:
    return Memory("dense", TO_NAME[values.dtype], values.data_ptr())


def guarded(values: torch.Tensor) -> torch.Tensor:
    """The values in memory of their own, with NaN before and after them."""
    buffer = torch.full((len(values) + 2 * GUARD,), torch.nan, dtype=values.dtype)
    buffer[GUARD : GUARD + len(values)] = values
    return buffer[GUARD : GUARD + len(values)]


def poisoned(length: int, dtype: str) -> torch.Tensor:
    return guarded(torch.full((length,), torch.nan, dtype=DTYPES[dtype]))


def guards_intact(values: torch.Tensor) -> bool:
    storage = torch.empty(0, dtype=values.dtype).set_(values.untyped_storage())
    inside = slice(GUARD, GUARD + len(values))
    outside = torch.ones(len(storage), dtype=torch.bool)
    outside[inside] = False
    return bool(storage[outside].isnan().all())


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


class Model:
    """Random tensors of the given lengths, the plan that merges them, and the float64 truth."""

    def __init__(
        self,
        lengths: list[int],
        *,
        experts: int = 3,
        rows: int = 2,
        dtypes: tuple[str, str, str] = ("F32", "F32", "F32"),
        seed: int = 0,
        unchanged: float = 0.0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        base_dtype, delta_dtype, self.out_dtype = dtypes
        self.lengths = lengths
        self.base = [guarded(torch.randn(n, generator=random).to(DTYPES[base_dtype])) for n in lengths]
        self.deltas: list[list[torch.Tensor | None]] = [
            [
                None
                if torch.rand((), generator=random) < unchanged
                else guarded(torch.randn(n, generator=random).to(DTYPES[delta_dtype]))
                for _ in range(experts)
            ]
            for n in lengths
        ]
        self.rows = [s % rows for s in range(len(lengths))]
        count = len(lengths)
        self.plan = native.MergePlan(
            base=[t.data_ptr() for t in self.base],
            planes=[[None if t is None else dense(t) for t in row] for row in self.deltas],
            lengths=lengths,
            rows=self.rows,
            base_dtypes=[base_dtype] * count,
            out_dtypes=[self.out_dtype] * count,
            plane_count=experts,
            row_count=rows,
        )

    def run(
        self, weights: npt.NDArray[np.float32], *, threads: int | None = 2, isa: str | None = None
    ) -> list[list[torch.Tensor]]:
        out = [[poisoned(n, self.out_dtype) for n in self.lengths] for _ in range(len(weights))]
        ran = self.plan.run(weights, [[t.data_ptr() for t in row] for row in out], threads=threads, isa=isa)
        assert isa is None or ran == isa
        assert all(guards_intact(t) for row in out for t in row)
        return out

    def truth(self, weights: npt.NDArray[np.float32], k: int, s: int) -> torch.Tensor:
        total = self.base[s].double()
        for e, delta in enumerate(self.deltas[s]):
            if delta is not None:
                total = total + float(weights[k, self.rows[s], e]) * delta.double()
        return total


def random_weights(preferences: int, rows: int, experts: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(preferences, rows, experts)).astype(np.float32)


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


@isas
def test_the_environment_forces_an_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model([100])
    weights = random_weights(1, 2, 3)
    out = poisoned(100, "F32")
    monkeypatch.setenv("PARETOFUSE_ISA", isa)
    assert native.chosen_isa() == isa
    assert model.plan.run(weights, [[out.data_ptr()]]) == isa
    for other in USABLE:  # the argument wins
        assert model.plan.run(weights, [[out.data_ptr()]], isa=other) == other
    monkeypatch.setenv("PARETOFUSE_ISA", "")
    assert native.chosen_isa() == USABLE[0]


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = next((name for name, usable in native.instruction_sets().items() if not usable), "mmx")
    for name in (missing, "fastest"):
        with pytest.raises(ValueError, match=rf'isa: got "{name}".*{", ".join(USABLE)}'):
            native.chosen_isa(name)
        with pytest.raises(ValueError, match=name):
            Model([4]).run(random_weights(1, 2, 3), isa=name)
        with pytest.raises(ValueError, match=name):
            native.copy(0, 0, 0, isa=name)
    monkeypatch.setenv("PARETOFUSE_ISA", missing)
    with pytest.raises(ValueError, match=rf'PARETOFUSE_ISA: got "{missing}"'):
        native.chosen_isa()
    assert native.chosen_isa("scalar") == "scalar"


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


def make_plan(**changes: object) -> native.MergePlan:
    memory = np.zeros(16, np.float32)
    arguments: dict[str, object] = {
        "base": [memory.ctypes.data],
        "planes": [[None, None]],
        "lengths": [16],
        "rows": [0],
        "base_dtypes": ["F32"],
        "out_dtypes": ["F32"],
        "plane_count": 2,
        "row_count": 3,
    }
    return native.MergePlan(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [16, 16]}, "lengths: got 2 entries, expected 1"),
        ({"planes": []}, "planes: got 0 entries, expected 1"),
        ({"planes": [[None]]}, "planes: got 1 for tensor 0, expected 2"),
        ({"rows": [3]}, "row of segment 0: got 3, expected 0 to 2"),
        ({"rows": [-1]}, "row of segment 0: got -1, expected 0 to 2"),
        ({"lengths": [-1]}, "length of segment 0: got -1"),
        ({"lengths": [2**62]}, "length of segment 0"),
        ({"base": [0]}, "base of segment 0: got a null address"),
        ({"out_dtypes": ["F64"]}, "dtype: got 'F64', expected one of F32, BF16, F16"),
        ({"planes": [[]], "plane_count": 0}, "plane_count: got 0"),
        ({"row_count": 0}, "row_count: got 0"),
    ],
)
def test_plans_refuse_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**changes)


def test_runs_refuse_what_does_not_fit_and_write_nothing() -> None:
    model = Model([100, 7])
    good = random_weights(1, 2, 3)
    out = [poisoned(100, "F32"), poisoned(7, "F32")]
    table = [[t.data_ptr() for t in out]]
    with pytest.raises(TypeError, match="weights: got float64, expected a float32"):
        model.plan.run(good.astype(np.float64), table)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights: got list"):
        model.plan.run([[0.0]], table)  # type: ignore[arg-type]
    for weights in (
        random_weights(1, 3, 3),
        random_weights(1, 2, 2),
        good[0],
        random_weights(1, 3, 2).swapaxes(1, 2),
    ):
        with pytest.raises(ValueError, match="weights: got shape"):
            model.plan.run(weights, table)
    with pytest.raises(ValueError, match="0 preferences"):
        model.plan.run(good[:0], np.zeros((0, 2), np.uint64))
    with pytest.raises(ValueError, match="out: got shape"):
        model.plan.run(random_weights(2, 2, 3), table)
    with pytest.raises(ValueError, match="out of segment 1, preference 0: got a null address"):
        model.plan.run(good, [[out[0].data_ptr(), 0]])
    with pytest.raises(ValueError, match="overlaps the base or a plane"):
        model.plan.run(good, [[out[0].data_ptr(), model.base[1].data_ptr() + 4]])
    delta = model.deltas[1][2]
    assert delta is not None
    with pytest.raises(ValueError, match="overlaps the base or a plane"):
        model.plan.run(good, [[out[0].data_ptr(), delta.data_ptr()]])
    for threads in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"threads: got {threads}"):
            model.plan.run(good, table, threads=threads)
    assert all(t.isnan().all() for t in out)


def test_inner_and_copy_refuse_what_does_not_fit() -> None:
    grad = torch.zeros(4)
    with pytest.raises(ValueError, match="grad: got a null address"):
        native.inner(0, [None], 4, grad_dtype="F32")
    with pytest.raises(ValueError, match="planes: got 0"):
        native.inner(grad.data_ptr(), [], 4, grad_dtype="F32")
    with pytest.raises(ValueError, match="length: got -1"):
        native.inner(grad.data_ptr(), [None], -1, grad_dtype="F32")
    with pytest.raises(ValueError, match="dtype: got 'I8'"):
        native.inner(grad.data_ptr(), [None], 4, grad_dtype="I8")
    with pytest.raises(ValueError, match="nbytes: got -1"):
        native.copy(0, 0, -1)
    with pytest.raises(ValueError, match="null"):
        native.copy(0, grad.data_ptr(), 4)


def test_importing_needs_no_torch_and_a_missing_extension_tells_the_remedy() -> None:
    python("import sys; from paretofuse.engine.merging import native; sys.exit('torch' in sys.modules)")
    missing = "import sys; sys.modules['paretofuse._C'] = None; from paretofuse.engine.merging import native"
    told = python(missing, code=1)
    assert "ImportError: ParetoFuse's native extension could not be loaded" in told
    assert "pip install" in told


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
@pytest.mark.parametrize("sanitized", ["asan", "tsan"])
def test_the_core_is_clean_under_sanitizers(sanitized: str) -> None:
    run(cpplib.build(sanitized, "test_core") / "test_core")
