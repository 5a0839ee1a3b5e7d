"""How each kernel is launched: a short table of configurations, and the size rule that picks one.

No autotuning: a search at run time makes the first call slow and the choice irreproducible, and these kernels
are bound by memory, so few settings matter. Every configuration is compiled for every target by the tests.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], near: Tensor, /, *arguments: object, **constants: object
) -> None:
    """Launch a kernel on the device of a tensor: Triton takes the current device, wherever its pointers lie.

    Args:
        kernel: the Triton function.
        grid: programs in each dimension; where one is 0 there is nothing to do, and no driver takes it.
        near: any of the kernel's tensors.
        arguments: the kernel's run-time arguments in order.
        constants: its compile-time constants, `num_warps` and `num_stages`, by name.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(near) if near.is_cuda else nullcontext():
        kernel[grid](*arguments, **constants)


def warps(threads: int) -> int:
    """The warps that hold so many threads on this machine: 64 threads each on ROCm, else 32."""
    return max(1, threads // (64 if torch.version.hip else 32))


@dataclass(frozen=True)
class MergeConfig:
    """One compiled form of the merge kernel.

    Attributes:
        k_block: preferences per program, a power of two.
        block: elements per program, a power of two that divides the tile.
        e_chunk: experts whose loads are in flight together; more experts loop.
        threads: per program, such that each has 16 bytes of deltas or more: a full 128-bit load.
    """

    k_block: int
    block: int
    e_chunk: int
    threads: int


MERGE_CONFIGS = {
    "one": MergeConfig(k_block=1, block=1024, e_chunk=8, threads=128),
    "one, few experts": MergeConfig(k_block=1, block=1024, e_chunk=4, threads=128),
    "one, byte deltas": MergeConfig(k_block=1, block=1024, e_chunk=8, threads=64),
    "few": MergeConfig(k_block=4, block=1024, e_chunk=4, threads=128),
    "few, byte deltas": MergeConfig(k_block=4, block=1024, e_chunk=4, threads=64),
    "many": MergeConfig(k_block=8, block=1024, e_chunk=2, threads=128),
}
"""Every configuration of the merge kernel, by the preferences and deltas it is for."""


def merge_config(k: int, experts: int, itemsize: int) -> MergeConfig:
    """The merge's configuration for `k` preferences and `experts` experts with deltas of `itemsize` bytes."""
    if itemsize == 1:
        return MERGE_CONFIGS["one, byte deltas" if k == 1 else "few, byte deltas"]
    if k > 1:
        return MERGE_CONFIGS["few" if k <= 4 else "many"]
    return MERGE_CONFIGS["one, few experts" if experts <= 4 else "one"]


@dataclass(frozen=True)
class GradConfig:
    """One compiled form of the gradient's first stage.

    Attributes:
        e_chunk: experts whose loads are in flight together, a power of two; more experts loop.
        threads: per program; within one warp, sums need no shared memory and no barrier.
    """

    e_chunk: int
    threads: int


GRAD_CONFIGS = {
    "wide deltas": GradConfig(e_chunk=2, threads=32),
    "narrow deltas": GradConfig(e_chunk=4, threads=32),
}
"""Every configuration of the gradient, by the size of a delta: each has 16 wide loads in flight per thread."""


def grad_config(itemsize: int) -> GradConfig:
    """The gradient's configuration for deltas of `itemsize` bytes."""
    return GRAD_CONFIGS["wide deltas" if itemsize >= 4 else "narrow deltas"]


@dataclass(frozen=True)
class LinearConfig:
    """One compiled form of the routed linear kernel.

    Attributes:
        rows, outs, ins: the tile of x's rows, of outputs, and the step through the inputs; powers of two from 16.
        e_chunk: the most experts whose loads are pipelined together.
        loop_chunk: with more experts they loop, this many at a time, whose loads registers must hold.
        warps: warps per program.
        stages: depth of the load pipeline.
    """

    rows: int
    outs: int
    ins: int
    e_chunk: int
    loop_chunk: int
    warps: int
    stages: int


LINEAR_CONFIGS = {
    "few rows, few experts": LinearConfig(
        rows=16, outs=64, ins=64, e_chunk=2, loop_chunk=2, warps=4, stages=3
    ),
    "few rows": LinearConfig(rows=16, outs=64, ins=64, e_chunk=8, loop_chunk=4, warps=4, stages=2),
    "many rows, few experts": LinearConfig(
        rows=128, outs=64, ins=64, e_chunk=2, loop_chunk=2, warps=4, stages=3
    ),
    "many rows": LinearConfig(rows=128, outs=64, ins=64, e_chunk=8, loop_chunk=2, warps=4, stages=2),
    "float32": LinearConfig(rows=32, outs=64, ins=32, e_chunk=4, loop_chunk=4, warps=8, stages=2),
}
"""Every configuration of the routed linear kernel, by the shape it is for."""


def linear_config(rows: int, experts: int, itemsize: int) -> LinearConfig:
    """The routed linear's configuration for `rows` rows of x in elements of `itemsize` bytes."""
    if itemsize == 4:
        return LINEAR_CONFIGS["float32"]
    few = ", few experts" if experts <= 2 else ""
    return LINEAR_CONFIGS[("few rows" if rows <= 32 else "many rows") + few]


@dataclass(frozen=True)
class WeightsGradConfig:
    """One compiled form of the routed linear's gradient of the weights.

    Attributes:
        rows, outs, ins: the step through x's rows and the tile of the weight; powers of two from 16.
        warps: warps per program.
        stages: depth of the load pipeline.
    """

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int


WEIGHTS_GRAD_CONFIGS = {
    "half": WeightsGradConfig(rows=64, outs=128, ins=64, warps=4, stages=3),
    "float32": WeightsGradConfig(rows=32, outs=64, ins=32, warps=4, stages=2),
}
"""Every configuration of the weights' gradient, by the dtype of x."""


def weights_grad_config(itemsize: int) -> WeightsGradConfig:
    """The weights' gradient's configuration for x in elements of `itemsize` bytes."""
    return WEIGHTS_GRAD_CONFIGS["float32" if itemsize == 4 else "half"]


@dataclass(frozen=True)
class RowsConfig:
    """One compiled form of the kernels with a preference for each row.

    Attributes:
        rows, outs, ins: the tile of x's rows, of outputs, and the step through the inputs; powers of two from 16.
        warps: warps per program.
        stages: depth of the load pipeline.
    """

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int


ROWS_CONFIGS = {
    "few rows": RowsConfig(rows=16, outs=64, ins=128, warps=4, stages=3),
    "many rows": RowsConfig(rows=64, outs=128, ins=64, warps=8, stages=3),
    "float32": RowsConfig(rows=32, outs=32, ins=32, warps=4, stages=2),
}
"""Every configuration of the kernels with a preference for each row, by the shape it is for."""


def rows_config(rows: int, itemsize: int) -> RowsConfig:
    """The configuration for `rows` rows of x in elements of `itemsize` bytes."""
    if itemsize == 4:
        return ROWS_CONFIGS["float32"]
    return ROWS_CONFIGS["few rows" if rows <= 32 else "many rows"]
