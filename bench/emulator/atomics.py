"""Atomic operations on memory: PTX ISA, "atom" and "red"."""

import numpy as np

from . import arithmetic
from .memory import TYPES, GlobalAccess
from .parser import SIZES
from .shared import SharedMemory

_LETTERS = str.maketrans("fsub", "fiuu")  # kinds as numpy calls them
_OPERATIONS = {"add": np.add, "min": np.fmin, "max": np.fmax}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class Atomics(SharedMemory, GlobalAccess):
    def atomic(self, L, space, how, kind, address, values, mask, i):
        """One thread after the other; returns the old values."""
        size = SIZES[kind]
        count = len(values[0])
        sel = np.arange(L.n) if mask is None else np.flatnonzero(mask)
        old = [np.zeros(L.n, TYPES[size]) for _ in range(count)]
        if not len(sel):
            return old
        if space == "shared":
            memory, index = self.shared_index(L, address[sel], size, sel, i)
            targets = ((memory, at) for at in index)
        else:
            if self.counters is not None:
                self.counters.global_access(self, L, sel, address[sel], size * count, i, "atomic")
            targets = (self._atomic_target(L, n, address, size, size * count, i) for n in sel)
        for lane, (memory, at) in zip(sel, targets, strict=True):
            for c in range(count):
                old[c][lane] = memory[at + c]
                memory[at + c] = updated(how, kind, memory[at + c], [v[c][lane] for v in values])
        return old

    def _atomic_target(self, L, lane, address, size, total, i):
        """(memory as words, the word's place); beyond all allocations a word of nobody's."""
        at, bad = int(address[lane]), np.array([lane])
        a = self.memory.find(at, at + total)
        if a is None:
            self.bad_access("global atomic out of bounds", L, None, address, bad, total, i)
            return np.zeros(total // size, TYPES[size]), 0
        if at % total:
            self.bad_access("misaligned global atomic", L, None, address, bad, total, i, stop=True)
        return a.views[size], (at - a.origin) // size


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
    return _OPERATIONS[how](a, b).astype(dtype).view(before.dtype)


def _updated_small(how, kind, before, value):
    """Of 16-bit floats, or pairs of them: a sum is rounded once."""
    if kind[-2:] == "x2":
        a, b = (arithmetic.halves(np.array([v], np.uint32), kind) for v in (before, value))
        parts = [_OPERATIONS[how](x.astype(np.float64), y) for x, y in zip(a, b, strict=True)]
        return arithmetic.packed(parts[0], parts[1], kind)[0]
    bits = np.array([before, value], np.uint16)
    brain = kind == "bf16"
    a, b = (arithmetic.from_bf16(bits) if brain else bits.view(np.float16)).astype(np.float64)
    rounded = arithmetic.to_bf16_from_double if brain else arithmetic.to_f16
    return rounded(np.array([_OPERATIONS[how](a, b)]))[0]
