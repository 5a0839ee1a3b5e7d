"""How each kernel is launched: a short table of configurations, and the size rule that picks one.

No autotuning: a search at run time makes the first call slow and the choice irreproducible, and these kernels
are bound by memory, so few settings matter. Every configuration is compiled for every target by the tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MergeConfig:
    """One compiled form of the merge kernel.

    Attributes:
        k_block: preferences per program, a power of two.
        block: elements per program, a power of two that divides the tile.
        e_chunk: experts whose loads are in flight together; more experts loop.
        warps: warps per program.
    """

    k_block: int
    block: int
    e_chunk: int
    warps: int


MERGE_CONFIGS = {
    "one": MergeConfig(k_block=1, block=1024, e_chunk=8, warps=4),
    "one, few experts": MergeConfig(k_block=1, block=1024, e_chunk=4, warps=4),
    "one, small model": MergeConfig(k_block=1, block=256, e_chunk=8, warps=1),
    "few": MergeConfig(k_block=4, block=1024, e_chunk=4, warps=4),
    "many": MergeConfig(k_block=8, block=1024, e_chunk=4, warps=4),
}
"""Every configuration of the merge kernel, by the preferences and the size it is for."""


@dataclass(frozen=True)
class GradConfig:
    """One compiled form of the gradient's first stage.

    Attributes:
        e_chunk: experts whose loads are in flight together, a power of two; more experts loop.
        warps: warps per program; with one, sums need no shared memory and no barrier.
    """

    e_chunk: int
    warps: int


GRAD_CONFIGS = {
    "wide deltas": GradConfig(e_chunk=2, warps=1),
    "narrow deltas": GradConfig(e_chunk=4, warps=1),
}
"""Every configuration of the gradient, by the size of a delta: each has 16 wide loads in flight per thread."""


def grad_config(itemsize: int) -> GradConfig:
    """The gradient's configuration for deltas of `itemsize` bytes."""
    return GRAD_CONFIGS["wide deltas" if itemsize >= 4 else "narrow deltas"]


SMALL_MODEL = 1 << 20
"""Elements under which blocks of 1024 would leave a large GPU's multiprocessors without work."""


def merge_config(n: int, k: int, experts: int) -> MergeConfig:
    """The merge's configuration for `n` elements, `k` preferences and `experts` experts."""
    if k > 4:
        return MERGE_CONFIGS["many"]
    if k > 1:
        return MERGE_CONFIGS["few"]
    if n < SMALL_MODEL:
        return MERGE_CONFIGS["one, small model"]
    return MERGE_CONFIGS["one, few experts" if experts <= 4 else "one"]
