"""Conversions that kernels share, each correct in compiled code and in Triton's interpreter."""

from __future__ import annotations

from paretofuse.kernels.triton_or_none import jit, tl


@jit
def widen(x: tl.tensor) -> tl.tensor:
    """Any storage dtype to float32, exactly; uint8 stands for the bits of a float8 e4m3.

    Not every GPU converts float8 itself. By hand: one shift and one mask put sign, exponent and fraction in their
    places in a float32, which is then 2^120 too small, also where the float8 is subnormal. The code for NaN, which
    quantized deltas never hold, reads as 480.
    """
    if x.dtype == tl.uint8:
        bits = (x.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000  # 0x87F00000
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return x.to(tl.float32)


@jit
def round_to(x: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Float32 to a storage dtype, to nearest even.

    The hardware's own conversion does so; Triton's interpreter does not for bfloat16, hence the integer form.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return tl.where(x == x, rounded, quiet).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """total + a @ b with float32 sums; float32 inputs are multiplied exactly, not as TF32.

    The interpreter's own product misreads bfloat16, so there both sides are widened first, which is exact.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")
