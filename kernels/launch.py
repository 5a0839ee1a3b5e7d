"""How each kernel is launched: a short table of configurations, and the size rule that picks one.

No autotuning: a search at run time makes the first call slow and the choice irreproducible, and these kernels
are bound by memory, so few settings matter. Every configuration is compiled for every target by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """All that a launch hands to Triton; ahead-of-time compilation reads it where no GPU is.

    Attributes:
        kernel: the Triton function.
        grid: programs in each dimension; where one is 0 there is nothing to do, and no driver takes it.
        arguments: its run-time arguments in order.
        constants: its compile-time arguments, and `num_warps` and `num_stages`, by name.
        threads: per program, for kernels whose warps depend on a warp's size; else 0.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    threads: int = 0

    def run(self) -> Any:
        """Launch on the device of the first argument: Triton takes the current one, wherever its pointers lie.

        Returns:
            what Triton compiled; None where the interpreter ran, or there was nothing to do.
        """
        if 0 in self.grid:
            return None
        own = {"num_warps": warps(self.threads)} if self.threads else {}
        with self._device():
            return self.kernel[self.grid](*self.arguments, **self.constants, **own)

    def repeated(self) -> Callable[[], None]:
        """The same launch as often as one likes. From the second time on Triton looks at no argument any more."""
        if 0 in self.grid:
            return lambda: None
        again: Callable[[], None] | None = None

        def launch() -> None:
            nonlocal again
            if again is not None:
                with self._device():
                    again()
            elif (compiled := self.run()) is not None:
                names = self.kernel.arg_names[len(self.arguments) :]
                arguments = (*self.arguments, *(self.constants[name] for name in names))
                with self._device():  # whose driver loads the binary
                    again = partial(compiled[(*self.grid, 1, 1)[:3]], *arguments)

        return launch

    def _device(self) -> AbstractContextManager[Any]:
        near = self.arguments[0]
        return torch.cuda.device_of(near) if near.is_cuda else nullcontext()


def filled(output: tuple[Tensor, Launch]) -> Tensor:
    """The output of a launch, once it has run."""
    tensor, launch = output
    launch.run()
    return tensor


def warps(threads: int) -> int:
    """The warps that hold so many threads on this machine: 64 threads each on ROCm, else 32."""
    return max(1, threads // (64 if torch.version.hip else 32))


@dataclass(frozen=True)
class MergeConfig:
    """One compiled form of the merge kernel.

    Attributes:
        e_chunk: experts whose deltas are in registers together, a power of two; four registers each.
        one_chunk: whether that is all of them; else they loop.
        block: elements per program, a power of two that divides the tile.
    """

    e_chunk: int
    one_chunk: bool
    block: int = 1024


MERGE_CONFIGS = {
    **{f"at most {e}": MergeConfig(e_chunk=e, one_chunk=True) for e in (1, 2, 4, 8, 16)},
    "any": MergeConfig(e_chunk=4, one_chunk=False),
    "small groups": MergeConfig(e_chunk=2, one_chunk=False),
    "any row": MergeConfig(e_chunk=1, one_chunk=False, block=512),
}
"""Every configuration of the merge kernel, by the experts that it takes. More than 16 chunks of 16 bytes spill."""

MANY_SHARE = 128
"""Elements from which a scale's group is large."""

ROWS_HELD = 8
"""Experts that are held at most together with their row coefficients."""


def merge_config(experts: int, itemsize: int, *, group: int = 0, shared: int = 0) -> MergeConfig:
    """The configuration for so many experts with deltas of `itemsize` bytes, whatever the number of preferences.

    The smallest that holds them all. 16 bytes of int8 deltas are 16 sums, too many registers to keep chunks besides; of
    int4 they are 32, and groups of few elements have many scales: two experts then. Where they loop, four at a time, in
    more programs, have about three quarters of what eight would have in flight, and spill with no Triton from 3.6 on.
    With row coefficients those of more than 8 experts spill; with one for each element, registers hold those of one.

    Args:
        experts: E.
        itemsize: bytes of what a delta is stored in.
        group: elements that share a scale; 0 where deltas are floats.
        shared: elements that share a row coefficient at least; 0 where rows have none.
    """
    held = ROWS_HELD if shared else max(config.e_chunk for config in MERGE_CONFIGS.values())
    fitting = (c for c in MERGE_CONFIGS.values() if c.one_chunk and experts <= c.e_chunk <= held)
    if shared == 1:
        return MERGE_CONFIGS["any row"]
    if 0 < group < MANY_SHARE:
        return MERGE_CONFIGS["small groups"]
    return MERGE_CONFIGS["any"] if itemsize == 1 else next(fitting, MERGE_CONFIGS["any"])


def merge_threads(block: int, bits: int) -> int:
    """Threads of a program of the merge: each loads 128 bits of an expert's block, at once."""
    return max(32, block * bits // 128)


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
    "wide deltas": GradConfig(e_chunk=1, threads=32),
    "narrow deltas": GradConfig(e_chunk=4, threads=32),
}
"""Every configuration of the gradient, by the size of a delta: what a warp's registers hold at once without a spill."""


def grad_use(itemsize: int) -> str:
    """The use of the gradient that deltas of `itemsize` bytes are, by its name in `GRAD_CONFIGS`."""
    return "wide deltas" if itemsize >= 4 else "narrow deltas"


def grad_config(itemsize: int) -> GradConfig:
    """The gradient's configuration for deltas of `itemsize` bytes."""
    return GRAD_CONFIGS[grad_use(itemsize)]


def dot_precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies inputs of a dtype, "ieee" or "tf32": as torch's own products on the GPU would now.

    That is what `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul` was told: "high" and "medium" are
    both TF32 there. ROCm has matrix instructions for float32 as it is, and torch uses those whatever it was told.
    """
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    # Since torch 2.9, whose older question raises where the newer interface was used.
    told = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if told is None:
        told = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if told == "tf32" else "ieee"


PROGRAMS = 264
"""Programs that keep a GPU busy: two for each of an H100's 132 multiprocessors. A constant, so that devices agree."""


def piece_of(tiles: int, ins: int, step: int) -> int:
    """Inputs of one piece, where the inner dimension of a product is cut so that few tiles fill the GPU.

    Args:
        tiles: programs without pieces.
        ins: the inner dimension.
        step: inputs that a program takes at a time; a piece is at least two, so that the loads of one are under way
            while the other is multiplied.
    """
    steps = -(-ins // step)
    pieces = max(1, min(PROGRAMS // max(1, tiles), steps // 2))
    return max(1, -(-steps // pieces)) * step


FUSED_ROWS = 32
"""Rows of x up to which the routed linear layer mixes its weight on the way into the product: one tile of them.

By bytes, for a weight of O I numbers of s bytes: mixed on the way each tile of rows moves (E + 1) O I s, and a write
and a read of 4 bytes for each of its sums in each piece; merged first, all rows together move (E + 2) O I s, and read
the result again from L2. From 768 inputs in bfloat16, in 4 pieces, to 3072 outputs, or from 3072 in 16 pieces to 768,
the two are equal at 48 rows; and from a second tile of rows on the first mixes everything twice.
"""


@dataclass(frozen=True)
class LinearConfig:
    """One compiled form of the routed linear kernel.

    Attributes:
        outs, ins: the tile of outputs, and the step through the inputs; powers of two from 16.
        e_chunk: the most experts whose loads are pipelined together.
        loop_chunk: with more experts they loop, this many at a time, whose loads registers must hold.
        warps: warps per program.
        stages: depth of the load pipeline.
        rows: the tile of x's rows.
    """

    outs: int
    ins: int
    e_chunk: int
    loop_chunk: int
    warps: int
    stages: int
    rows: int = FUSED_ROWS


LINEAR_CONFIGS = {
    "few experts": LinearConfig(outs=64, ins=64, e_chunk=2, loop_chunk=2, warps=4, stages=3),
    "half": LinearConfig(outs=64, ins=64, e_chunk=8, loop_chunk=1, warps=4, stages=2),
    "wide planes": LinearConfig(outs=64, ins=32, e_chunk=4, loop_chunk=2, warps=4, stages=2),
    "float32": LinearConfig(outs=64, ins=32, e_chunk=4, loop_chunk=2, warps=8, stages=2),
}
"""Every configuration of the routed linear kernel, by what it is for; wide planes are float32 beneath half x.

Each fits the 99 KB of shared memory that the smallest devices (sm_86, sm_89, sm_120) give a program.
"""


def linear_config(experts: int, itemsize: int, plane_itemsize: int) -> LinearConfig:
    """The routed linear's configuration.

    Args:
        experts: E.
        itemsize: bytes of an element of x.
        plane_itemsize: bytes of an element of base or deltas, whichever is wider.
    """
    if itemsize == 4:
        return LINEAR_CONFIGS["float32"]
    if plane_itemsize == 4:
        return LINEAR_CONFIGS["wide planes"]
    return LINEAR_CONFIGS["few experts" if experts <= 2 else "half"]


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


def weights_grad_use(itemsize: int) -> str:
    """The use of the weights' gradient that x in elements of `itemsize` bytes is, in `WEIGHTS_GRAD_CONFIGS`."""
    return "float32" if itemsize == 4 else "half"


def weights_grad_config(itemsize: int) -> WeightsGradConfig:
    """The weights' gradient's configuration for x in elements of `itemsize` bytes."""
    return WEIGHTS_GRAD_CONFIGS[weights_grad_use(itemsize)]


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
    "few rows": RowsConfig(rows=16, outs=64, ins=128, warps=4, stages=2),
    "many rows": RowsConfig(rows=64, outs=128, ins=64, warps=8, stages=3),
    "few rows, wide planes": RowsConfig(rows=16, outs=64, ins=64, warps=4, stages=3),
    "many rows, wide planes": RowsConfig(rows=64, outs=128, ins=32, warps=8, stages=3),
    "float32": RowsConfig(rows=32, outs=32, ins=16, warps=4, stages=2),
    "tf32": RowsConfig(rows=32, outs=64, ins=32, warps=4, stages=3),
}
"""Every configuration of the kernels with a preference for each row, by the shape it is for; wide planes as above.

Twice as many bytes of wide planes at each step would not fit the 64 KB that MI300X gives a program. A third stage of
few rows spills on sm_100.
"""


def rows_config(rows: int, itemsize: int, plane_itemsize: int, precision: str = "ieee") -> RowsConfig:
    """The configuration for `rows` rows of x; sizes of elements as `linear_config` takes them."""
    if itemsize == 4:
        return ROWS_CONFIGS["tf32" if precision == "tf32" else "float32"]
    size = "few rows" if rows <= 32 else "many rows"
    return ROWS_CONFIGS[size + (", wide planes" if plane_itemsize == 4 else "")]


MERGED_WORK = {"half": 400, "tf32": 400, "ieee": 32}
"""Rows of one preference times experts from which its weight is merged first, by how products are multiplied.

By counting for an H100, for each of a weight's numbers and P rows: E + 1 products are 2 (E + 1) P operations, at about
500 T a second (20 T of float32 that is multiplied exactly); merged first they are 2 P by cuBLAS, 2 E of mixing at about
30 T, and a write and a read of 2 to 4 bytes at 3.0 TB/s. With 8 experts the two are equal at 57 rows (at 4 in float32),
with 4 at 96, with 2 at 170.
"""

MERGED_AT_ONCE = 8
"""Preferences whose merged weights are held at once: the planes are read once for so many."""


def rows_merge_first(per: int, experts: int, dtype: torch.dtype) -> bool:
    """Whether `per` rows of each preference, of x's dtype, are multiplied by merged weights: see `MERGED_WORK`."""
    kind = dot_precision(dtype) if dtype == torch.float32 else "half"
    return per * experts >= MERGED_WORK[kind]
