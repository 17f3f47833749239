"""What is done to an operand as it is loaded: bytes become values.

The other thing that some engines fuse on the way in, a pooled result's gradient that becomes its
map's, is ``pool_gradient.load_gradient``.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .numerics import downcast


class Normalization(NamedTuple):
    """scale[C] and shift[C], float32, that make of a byte x the value x * scale[c] + shift[c]."""

    scale: Tensor
    shift: Tensor


@triton.jit
def load_normalization(normalize, c, mask):
    """(scale, shift) of channels c; of no normalization, anything."""
    if normalize is None:
        scale = c
        shift = c
    else:
        scale_ptr, shift_ptr = normalize
        scale = tl.load(scale_ptr + c, mask=mask, other=0.0)
        shift = tl.load(shift_ptr + c, mask=mask, other=0.0)
    return scale, shift


@triton.jit
def load_normalized(x_ptr, offsets, mask, normalize, scale, shift, DTYPE: tl.constexpr):
    """x, or of bytes x * scale + shift in DTYPE; zero where masked, as padding comes after it.

    scale and shift are those of the offsets' last axis, in float32.
    """
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    if normalize is not None:
        x = downcast(x.to(tl.float32) * scale[None, :] + shift[None, :], DTYPE)
        x = tl.where(mask, x, 0.0)
    return x
