"""Integers in kernels: programs, pixels, strides, divisions, and how sizes are sent to them.

Sizes and strides that follow the batch and the image go to a kernel *encoded*. Triton makes
one binary for an integer that is 1, one for multiples of 16, one for the rest, and inside a tuple
``do_not_specialize`` does not keep it from doing so: each new size might compile a kernel again.
So a launcher sends such integers as odd ones that are never 1, and the kernel takes them back.
A record of integers goes as a plain tuple, which Triton binds in a third of the time, and a kernel
unpacks it: Triton's cache looks at a kernel's text alone, not at the order of a record's fields.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..device import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)
_ODD = tl.constexpr(2**20 + 1)
_CENTRE = tl.constexpr(3 * 2**30)
_ALIGNED = 16  # what Triton tells apart; in elements, so that a row of them takes whole vectors


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size. Triton's own takes 2 us, a tenth of a launch."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that holds ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def encode_ints(values: Iterable[int]) -> tuple[int, ...]:
    """Each value, above -2**19, as an odd integer that is never 1, so that Triton does not
    specialize on it. The kernel reads them by ``decode_ints``.
    """
    return tuple([2 * value + _ODD.value for value in values])


def encode_strides(t: Tensor) -> tuple[int, int, int, int, int]:
    """Strides of t[N, C, H, W] for a kernel, which reads them by ``decode_strides``.

    What a binary may know of them follows from the layout alone: strides of 1, and whether the
    channels lie side by side in aligned rows, which makes loads of 16 bytes. The last integer is
    the unit of the strides of n, h and w.
    """
    N, _, H, _ = t.shape
    n, c, h, w = t.stride()
    # The stride of an axis of one element may be anything.
    if N == 1:
        n = 0
    if H == 1:
        h = 0
    rows = n | h | w
    unit = _ALIGNED if c == 1 and rows % _ALIGNED == 0 and rows < 2**31 else 1
    return 2 * (n // unit) - 1, 2 * c - 1, 2 * (h // unit) - 1, 2 * (w // unit) - 1, unit


def pointers(**tensors: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments for some tensors, by name: for x, ``x_ptr``."""
    return {f"{name}_ptr": t for name, t in tensors.items()}


def operands(**tensors: Tensor) -> dict[str, Any]:
    """The same with their strides: for x, ``x_ptr`` and ``x_strides``."""
    strides = {f"{name}_strides": encode_strides(t) for name, t in tensors.items()}
    return pointers(**tensors) | strides


def divisors(*sizes: int) -> tuple[int, ...]:
    """For each size a multiplier and a shift, for a kernel's tuple: ``quotient`` reads them.

    With l = ceil(log2(size)), i // size is 2 * i * ceil(2**(31 + l) / size) >> (32 + l) for every
    i below 2**31 (Granlund and Montgomery, 1994). The multiplier is centred, to be sent in 32 bits.
    """
    numbers = []
    for size in sizes:
        shift = max(size - 1, 0).bit_length()
        multiplier = cdiv(2 ** (31 + shift), max(size, 1)) - _CENTRE.value
        odd = 2 * multiplier + _ODD.value
        numbers += [(odd + 2**31) % 2**32 - 2**31, *encode_ints((shift,))]
    return tuple(numbers)


class Strides(NamedTuple):
    """Strides of a tensor [N, C, H, W], or [N, K, P, Q]."""

    n: int
    c: int
    h: int
    w: int


@triton.jit
def _compiled_decode_ints(values):
    return tl.tuple([(value - _ODD) >> 1 for value in values])


@triton.jit
def _compiled_decode_strides(strides):
    n, c, h, w, unit = strides
    # Halved before anything is added: these may be the largest integers of 32 bits.
    n, h, w = ((n >> 1) + 1) * unit, ((h >> 1) + 1) * unit, ((w >> 1) + 1) * unit
    return Strides(n, (c >> 1) + 1, h, w)


def _interpreted_decode_ints(values: Any) -> list[int]:
    return [(_integer(value) - _ODD.value) >> 1 for value in values]


def _interpreted_decode_strides(strides: Any) -> Strides:
    n, c, h, w, unit = map(_integer, strides)
    return Strides((n + 1) // 2 * unit, (c + 1) // 2, (h + 1) // 2 * unit, (w + 1) // 2 * unit)


def _integer(scalar: Any) -> int:
    return scalar.handle.data.item()


@triton.jit
def _compiled_within(i, size):
    UNSIGNED: tl.constexpr = tl.uint64 if i.dtype == tl.int64 else tl.uint32
    return i.to(UNSIGNED, bitcast=True) < size.to(UNSIGNED)


def _interpreted_within(i: Any, size: int) -> Any:
    return (i >= 0) & (i < size)


@triton.jit
def _compiled_quotient(i, size, multiplier, shift):
    if i.dtype == tl.int64:
        result = i // size
    else:
        multiplier = multiplier.to(tl.uint32, bitcast=True) + _CENTRE
        high = tl.umulhi(2 * i.to(tl.uint32, bitcast=True), multiplier)
        result = (high >> shift.to(tl.uint32)).to(tl.int32, bitcast=True)
    return result


def _interpreted_quotient(i: Any, size: int, multiplier: int, shift: int) -> Any:
    return i // size


# The interpreter spends a millisecond on a jitted function, nothing on Python's integers.
decode_ints = _interpreted_decode_ints if INTERPRET else _compiled_decode_ints
"""The integers of a tuple that ``encode_ints`` made."""
decode_strides = _interpreted_decode_strides if INTERPRET else _compiled_decode_strides
"""The Strides that ``encode_strides`` was given; a unit of 16 shows in them."""
within = _interpreted_within if INTERPRET else _compiled_within
"""Whether 0 <= i < size, in one comparison: as an unsigned number a negative one is large."""

quotient = _interpreted_quotient if INTERPRET else _compiled_quotient
"""i // size, for i >= 0, by what ``divisors`` made of the size: a shift, a product, a shift."""


@triton.jit
def program(INT64_INDEX: tl.constexpr):
    """This program's number, as wide as the offsets that are computed from it."""
    pid = tl.program_id(0)
    if INT64_INDEX:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def pixel(i, P, Q):
    """(n, p, q) of the i-th of N x P x Q pixels; a remainder would cost one more division."""
    row = i // Q
    n = row // P
    return n, row - n * P, i - row * Q
