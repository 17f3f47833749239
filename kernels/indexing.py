"""What all kernels share: index arithmetic, the product, and conversions between dtypes.

Triton's interpreter is wrong on bfloat16 in three places, each mended here for it alone: dot
multiplies raw bits, a conversion to bfloat16 truncates instead of rounding to nearest even, and
subnormal numbers come out wrong in both directions.
"""

import triton
import triton.language as tl

from .device import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def program(WIDE: tl.constexpr):
    """This program's number, as wide as the offsets that are computed from it."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def pixel(i, P, Q):
    """(n, p, q) of the i-th of N x P x Q pixels."""
    return i // (P * Q), i // Q % P, i % Q


@triton.jit
def reduction_turns(C, R, S, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """How many blocks ``reduction_block`` cuts channels and taps into."""
    if PACKED:
        turns = tl.cdiv(C * R * S, BLOCK)
    else:
        turns = R * S * tl.cdiv(C, BLOCK)
    return turns


@triton.jit
def reduction_block(i, C, R, S, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """(c, r, s, inside) of the i-th block of the reduction over channels and taps.

    Packed, c runs fastest over one long axis, and r and s are vectors like it; otherwise a block
    has channels of one tap, and r and s are scalars.
    """
    if PACKED:
        crs = i * BLOCK + tl.arange(0, BLOCK)
        c = crs % C
        r = crs // C // S
        s = crs // C % S
        inside = r < R
    else:
        blocks = tl.cdiv(C, BLOCK)
        c = i % blocks * BLOCK + tl.arange(0, BLOCK)
        r = i // blocks // S
        s = i // blocks % S
        inside = c < C
    return c, r, s, inside


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if _INTERPRET and a.dtype == tl.bfloat16:
        a = widen(a, tl.float32)
        b = widen(b, tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def widen(tile, DTYPE: tl.constexpr):
    """The tile as float32 or float64, exactly."""
    if _INTERPRET and tile.dtype == tl.bfloat16:
        tile = (tile.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tile.to(DTYPE)


@triton.jit
def narrow(tile, DTYPE: tl.constexpr):
    """The tile of float32 or float64 in a result's dtype, rounded to nearest even."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding must not carry a NaN's bits into infinity.
        bits = tl.where(tile != tile, 0x7FC0, rounded)
        tile = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tile.to(DTYPE)
