"""The reduction of a convolution over channels and taps, cut into blocks."""

import triton
import triton.language as tl


@triton.jit
def reduction_tiles(C, R, S, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """How many blocks ``reduction_block`` cuts channels and taps into."""
    if PACKED:
        k_tiles = tl.cdiv(C * R * S, BLOCK)
    else:
        k_tiles = R * S * tl.cdiv(C, BLOCK)
    return k_tiles


@triton.jit
def reduction_block(i, C, R, S, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """(c, r, s, inside) of the i-th block of the reduction over channels and taps.

    Packed, c runs fastest over one long axis, and r and s are vectors like it; otherwise a block
    has channels of one tap, and r and s are scalars.
    """
    if PACKED:
        crs = i * BLOCK + tl.arange(0, BLOCK)
        tap = crs // C
        c = crs - tap * C
        r = tap // S
        inside = r < R
    else:
        blocks = tl.cdiv(C, BLOCK)
        tap = i // blocks
        c = (i - tap * blocks) * BLOCK + tl.arange(0, BLOCK)
        r = tap // S
        inside = c < C
    return c, r, tap - r * S, inside
