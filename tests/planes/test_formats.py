"""Formats of planes: what encoding promises, and which format a tensor takes."""

from __future__ import annotations

import math

import pytest
import torch

from paretofuse.engine.planes.choose import Wanted, encode, may_be_small, parse
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.parts import part_of, parts_of, plane_from
from paretofuse.engine.planes.plane import Plane, merged_tensor, nbytes

SHAPES = [(1,), (63,), (3, 50), (64, 96), (5, 7, 11)]


def random_delta(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_format(delta: torch.Tensor) -> list[Plane]:
    planes: list[Plane] = [Dense.encode(delta, d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    planes += [Int8.encode(delta, 1024), Int8.encode(delta, 32), Int4.encode(delta)]
    if delta.dim() > 1:
        planes.append(LowRank.encode(delta, 3))
    return planes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 128, 1024])
def test_quantized_numbers_are_the_nearest_multiples_of_their_scale(
    shape: tuple[int, ...], group: int
) -> None:
    delta = random_delta(shape)
    for plane, limit in ((Int8.encode(delta, group), 127), (Int4.encode(delta, group), 7)):
        flat, decoded = delta.flatten(), plane.decode().flatten()
        for start in range(0, len(flat), group):
            scale = float(flat[start : start + group].abs().max()) / limit
            wrong = (decoded - flat)[start : start + group].abs().max()
            assert wrong <= scale * 0.5001
        assert plane.decode().shape == shape
        assert len(plane.scales) == math.ceil(len(flat) / group)


def test_int4_packs_as_compressed_tensors_does() -> None:
    delta = torch.tensor([[7.0, -7.0, 0.0, 3.0, -1.0]])
    plane = Int4.encode(delta)
    assert plane.packed.tolist() == [15 | 1 << 4, 8 | 11 << 4, 7 | 8 << 4]
    torch.testing.assert_close(plane.decode(), delta)


def test_a_group_of_zeros_stays_zero() -> None:
    delta = torch.zeros(2, 64)
    delta[1, 40] = 1.0
    for plane in (Int8.encode(delta, 32), Int4.encode(delta, 32)):
        assert torch.equal(plane.decode(), delta)
        assert not plane.scales.isnan().any()


@pytest.mark.parametrize("group", [0, 16, 48, 2048])
def test_groups_that_do_not_divide_the_tile_are_refused(group: int) -> None:
    for kind in (Int8, Int4):
        with pytest.raises(ValueError, match=f"got groups of {group} elements, expected a power of two"):
            kind.encode(torch.zeros(64, 64), group)


def test_low_rank_is_the_best_of_its_rank_and_energy_decides_it() -> None:
    left, right = torch.randn(40, 4), torch.randn(4, 60)
    delta = left @ right
    torch.testing.assert_close(LowRank.encode(delta, 4).decode(), delta, atol=1e-4, rtol=1e-4)
    sizes = torch.linalg.svdvals(delta).double()
    for rank in (1, 2, 3):
        wrong = (LowRank.encode(delta, rank).decode() - delta).double().norm()
        torch.testing.assert_close(wrong, sizes[rank:].norm(), rtol=1e-3, atol=1e-4)
    shares = torch.cumsum(sizes.square(), 0) / sizes.square().sum()
    assert LowRank.encode(delta, None, float(shares[1]) - 1e-6).rank == 2
    assert LowRank.encode(delta, None, 1.0).rank <= 40
    assert LowRank.encode(torch.zeros(4, 4), None, 0.9).rank == 1


def test_factors_keep_the_shortest_dtype_that_is_exact() -> None:
    b, a = torch.randn(6, 2).bfloat16(), torch.randn(2, 9).bfloat16()
    kept = LowRank.of_factors(2.0 * b.float(), a.float(), (6, 9))
    assert kept.b.dtype == kept.a.dtype == torch.bfloat16
    widened = LowRank.of_factors(1 / 3 * b.float(), a.float(), (6, 9))
    assert widened.b.dtype == widened.a.dtype == torch.float32
    for plane, scale in ((kept, 2.0), (widened, 1 / 3)):
        torch.testing.assert_close(plane.decode(), scale * (b.float() @ a.float()))


@pytest.mark.parametrize("shape", SHAPES)
def test_references_agree_with_decoded_numbers(shape: tuple[int, ...]) -> None:
    base, gradient = random_delta(shape, 1), random_delta(shape, 2)
    for plane in every_format(random_delta(shape)):
        decoded = plane.decode().double()
        for weight in (torch.tensor(0.7), torch.randn(shape[0]) if len(shape) > 1 else torch.tensor(-2.0)):
            wide = weight.double().view(-1, *[1] * (len(shape) - 1)) if weight.dim() else weight.double()
            merged = merged_tensor(base, [None, plane], torch.stack([weight, weight]), torch.float32)
            torch.testing.assert_close(merged.double(), base.double() + wide * decoded, rtol=1e-5, atol=1e-7)
        products = gradient.double() * decoded
        torch.testing.assert_close(plane.inner(gradient), products.sum())
        by_row = products.flatten(1).sum(1) if len(shape) > 1 else products.sum().view(1)
        torch.testing.assert_close(plane.inner_rows(gradient), by_row)
        if len(shape) == 2:
            torch.testing.assert_close(plane.inner_columns(gradient), products.sum(0))
            rows, columns = torch.randn(shape[0]), torch.randn(shape[1])
            weights = torch.cat([rows, columns]).expand(2, -1)
            merged = merged_tensor(base, [plane, None], weights, torch.float32)
            wide = rows.double().unsqueeze(1) + columns.double()
            torch.testing.assert_close(merged.double(), base.double() + wide * decoded, rtol=1e-5, atol=1e-7)


def test_planes_come_apart_and_together_again() -> None:
    for plane in every_format(random_delta((64, 96))):
        values, factors, size = parts_of(plane)
        again = plane_from(values, factors, size, plane.shape)
        assert type(again) is type(plane)
        assert torch.equal(again.decode(), plane.decode())
        copied = plane.like({name: tensor.clone() for name, tensor in plane.tensors().items()})
        assert torch.equal(copied.decode(), plane.decode())
        assert copied.memory()[:2] == plane.memory()[:2]
        for first, last in ((0, 64), (32, 64), (1, 3), (5, 6)):
            torch.testing.assert_close(part_of(plane, first, last).decode(), plane.decode()[first:last])


def test_sizes_in_bytes() -> None:
    delta = random_delta((64, 128))
    assert nbytes(Dense.encode(delta, torch.bfloat16)) == 2 * 8192
    assert nbytes(Int8.encode(delta, 1024)) == 8192 + 4 * 8
    assert nbytes(Int4.encode(delta, 32)) == 4096 + 4 * 256
    assert nbytes(LowRank.encode(delta, 3)) == 4 * 3 * (64 + 128)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("auto", Wanted("auto")),
        ("dense", Wanted("dense")),
        ("bf16", Wanted("dense", "BF16")),
        ("int8", Wanted("int8")),
        ("lowrank:32", Wanted("lowrank", rank=32)),
        ("lowrank:99.5%", Wanted("lowrank", energy=0.995)),
    ],
)
def test_words(word: str, expected: Wanted) -> None:
    assert parse(word) == expected


@pytest.mark.parametrize("word", ["", "int5", "lowrank", "lowrank:0", "lowrank:-3", "lowrank:100%", 8, None])
def test_other_words_are_refused(word: object) -> None:
    with pytest.raises(
        ValueError, match="expected one of auto, dense, fp32, bf16, fp16, int8, int4, lowrank"
    ):
        parse(word)  # type: ignore[arg-type]


@pytest.mark.parametrize("heavy", [False, True])
def test_auto_takes_int8_only_where_the_merged_tensor_does_not_show_it(heavy: bool) -> None:
    # The table of DESIGN.md: deltas of a tenth of the weights; heavy tails need groups of 32.
    random = torch.Generator().manual_seed(1)
    base = 0.02 * torch.randn(256, 256, generator=random)
    delta = 0.002 * torch.randn(256, 256, generator=random)
    if heavy:
        delta *= torch.randn(256, 256, generator=random).exp() / 5
    for dtype, formats in ((torch.bfloat16, {"int8"}), (torch.float32, {"dense"})):
        stored = base.to(dtype)
        dense = encode(parse("dense"), delta, stored, dtype, 8)
        plane = encode(parse("auto"), delta, stored, dtype, 8)
        assert plane.format in formats
        assert plane.error is not None
        assert dense.error is not None
        assert plane.error <= 1.02 * dense.error
        if isinstance(plane, Int8):
            assert plane.group == (32 if heavy else 1024)
    asked = encode(parse("int8"), delta, base, torch.float32, 8)
    assert isinstance(asked, Int8)
    assert asked.group == 32  # float32 shows the rounding, so the finer groups


def test_vectors_and_small_or_odd_tensors_stay_exact() -> None:
    assert not any(map(may_be_small, [(4096,), (), (8, 8), (33, 33)]))
    assert may_be_small((64, 64))
    assert may_be_small((64, 3, 4, 4))
    for word in ("int8", "int4", "lowrank:1", "auto"):
        plane = encode(parse(word), torch.randn(768), torch.randn(768), torch.float32, 8)
        assert plane.format == "dense"
        assert plane.error == pytest.approx(0, abs=1e-6)


def test_low_rank_planes_that_save_nothing_stay_dense() -> None:
    delta, base = torch.randn(64, 64), torch.randn(64, 64)
    assert encode(parse("lowrank:32"), delta, base, torch.float32, 8).format == "dense"
    assert encode(parse("lowrank:31"), delta, base, torch.float32, 8).format == "lowrank"
