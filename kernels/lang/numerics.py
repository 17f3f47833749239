"""The product of two tiles, and conversions between dtypes.

Triton's interpreter is wrong on bfloat16 in three ways, each mended here, and only for it: dot
multiplies raw bits, a conversion to bfloat16 truncates instead of rounding to nearest even, and
subnormal numbers come out wrong in both directions.
"""

import triton
import triton.language as tl

from .._private import cuda_capability_geq
from ..device import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)
# From 3.7 on Triton fences copies itself (triton-lang/triton#9610).
_FENCES = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b.

    The interpreter is wrong on bfloat16, and sums float32 in an order that depends on the tile's
    shape and on the processor: there it is given float64, of which the sum is rounded once.
    """
    if _INTERPRET:
        wide = tl.dot(upcast(a, tl.float64), upcast(b, tl.float64), out_dtype=tl.float64)
        return (acc + wide).to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def fence_copies():
    """Let asynchronous products see what cp.async has copied to shared memory.

    From Hopper on they read by another proxy than copies write, and PTX asks for a fence between.
    It belongs between the loads of a turn and its dot, where Triton waits for the copies first.
    Triton 3.6 takes no such instruction in a loop for Blackwell.
    """
    if _FENCES and not _INTERPRET:
        if cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0):
            tl.inline_asm_elementwise(
                "fence.proxy.async.shared::cta; mov.b32 $0, 0;",
                "=r,r",
                [0],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def upcast(tile, DTYPE: tl.constexpr):
    """The tile as float32 or float64, exactly."""
    if _INTERPRET and tile.dtype == tl.bfloat16:
        tile = (tile.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif _INTERPRET and tile.dtype.is_fp8():  # which it cannot make float64
        tile = tile.to(tl.float32)
    return tile.to(DTYPE)


@triton.jit
def downcast(tile, DTYPE: tl.constexpr):
    """The tile of float32 or float64 in a result's dtype, rounded to nearest even."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding must not carry a NaN's bits into infinity.
        bits = tl.where(tile != tile, 0x7FC0, rounded)
        tile = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tile.to(DTYPE)
