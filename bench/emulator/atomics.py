"""Atomic operations on memory: PTX ISA, "atom" and "red"."""

import numpy as np

from . import arithmetic
from .memory import TYPES

SIZES = {"16": 2, "32": 4, "64": 8}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class Atomics:
    def atomic(self, L, space, how, kind, address, values, mask, i):
        """One thread after the other; returns the old values."""
        size = 4 if kind[-2:] == "x2" else SIZES["".join(c for c in kind if c.isdigit())]
        count = len(values[0])
        sel = np.arange(L.n) if mask is None else np.flatnonzero(mask)
        old = [np.zeros(L.n, TYPES[size]) for _ in range(count)]
        if not len(sel):
            return old
        if space == "generic":
            space, address = self._space(L, address, mask, i)
        if space == "shared":
            memory, index = self.shared_index(L, address, size, sel, i)
        elif self.counters is not None:
            self.counters.global_access(self, L, sel, address[sel], size * count, i, "atomic")
        for n, lane in enumerate(sel):
            for c in range(count):
                if space == "shared":
                    target, position = memory, index[n] + c
                else:
                    at = int(address[lane]) + c * size
                    a = self._atomic_target(L, lane, address, at, size, size * count, i)
                    if a is None:
                        continue
                    target, position = a.views[size], (at - a.origin) // size
                before = target[position]
                old[c][lane] = before
                target[position] = updated(how, kind, before, [v[c][lane] for v in values])
        return old

    def _atomic_target(self, L, lane, address, at, size, total, i):
        a = self.memory.find(at, at + size)
        bad = np.array([lane])
        if a is None:
            self.bad_access("global atomic out of bounds", L, None, address, bad, size, i)
        elif int(address[lane]) % total:
            self.bad_access("misaligned global atomic", L, None, address, bad, size, i, stop=True)
        return a


def updated(how, kind, before, operands):
    """The new value, as unsigned bits."""
    value = operands[0]
    if how == "cas":
        return operands[1] if before == value else before
    if how == "exch":
        return value
    if how in _BITWISE:
        return _BITWISE[how](before, value)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return _updated_small(how, kind, before, value)
    dtype = np.dtype(f"{kind[0].translate(_LETTERS)}{before.dtype.itemsize}")
    a, b = before.view(dtype), value.view(dtype)
    one = dtype.type(1)
    if how == "inc":
        r = dtype.type(0) if a >= b else a + one
    elif how == "dec":
        r = b if a == 0 or a > b else a - one
    else:
        r = _combined(how, a, b)
    return r.astype(dtype).view(before.dtype)


_LETTERS = str.maketrans("fsub", "fiuu")


def _combined(how, a, b):
    operations = {"add": np.add, "min": np.fmin, "max": np.fmax}
    if how not in operations:
        raise NotImplementedError(f"atomic {how}")
    return operations[how](a, b)


def _updated_small(how, kind, before, value):
    """Of 16-bit floats, or pairs of them: a sum is rounded once."""
    if kind[-2:] == "x2":
        a, b = (arithmetic.halves(np.array([v], np.uint32), kind) for v in (before, value))
        parts = [_combined(how, x.astype(np.float64), y) for x, y in zip(a, b, strict=True)]
        return arithmetic.packed(parts[0], parts[1], kind)[0]
    bits = np.array([before, value], np.uint16)
    brain = kind == "bf16"
    a, b = (arithmetic.from_bf16(bits) if brain else bits.view(np.float16)).astype(np.float64)
    rounded = arithmetic.to_bf16_from_double if brain else arithmetic.to_f16
    return rounded(np.array([_combined(how, a, b)]))[0]
