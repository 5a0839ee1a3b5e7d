"""Conversions that kernels share, each correct in compiled code and in Triton's interpreter."""

from __future__ import annotations

from paretofuse.kernels.triton_or_none import jit, tl


@jit
def unpack(x: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:
    """Stored deltas [..., S] to float32, exactly; packed ones, two numbers of four bits in a byte, to [..., 2 S].

    The first number is the low half, each 8 more than its value.
    """
    if PACKED:
        x = tl.interleave(x & 15, x >> 4)
        return x.to(tl.float32) - 8.0
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
def dot(
    a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """total + a @ b with float32 sums; float32 inputs are multiplied as PRECISION says: "ieee" is exactly.

    The interpreter's own product misreads bfloat16, so there both sides are widened first, which is exact. Of TF32 it
    knows nothing: the bits that TF32 has no room for are cut off there, which is the worst that a device does.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
        if PRECISION == "tf32":
            a, b = cut_to_tf32(a), cut_to_tf32(b)
        return tl.dot(a, b, total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def cut_to_tf32(x: tl.tensor) -> tl.tensor:
    """Float32 without the last 13 bits of its fraction."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits >> 13) << 13).to(tl.float32, bitcast=True)
