"""Copies of threads: PTX ISA, "cp.async", "cp.async.commit_group", "cp.async.wait_group"."""

from dataclasses import dataclass

import numpy as np

from .batch import Lanes
from .memory import TYPES, GlobalAccess, chosen
from .shared import SharedMemory

i64 = np.int64


@dataclass
class Copy:
    """Copies of one instruction that some threads have not waited for."""

    L: Lanes
    rows: np.ndarray  # which of the lanes
    group: np.ndarray  # of each
    waiting: np.ndarray
    flat: np.ndarray
    source: np.ndarray
    reads: np.ndarray  # which take their bytes from the source; the others are zeros
    size: int
    instruction: int
    landed: bool = False


class Copies(SharedMemory, GlobalAccess):
    def init_copies(self) -> None:
        self._copies: list[Copy] = []
        self._copy_count = np.zeros(self.lanes, i64)  # groups that each thread has committed

    def copy_async(self, L, to, of, size, source_size, mask, i):
        sel = chosen(mask)
        if sel is not None and not len(sel):
            return
        rows = np.arange(L.n) if sel is None else sel
        flat, source = self.places(L, to[rows], size, sel, i, "copy"), of[rows]
        amount = np.full(len(rows), size) if source_size is None else source_size[rows]
        if ((amount != size) & (amount != 0)).any():
            self.stop("cp.async of a part of its bytes", i, L)
        read = np.flatnonzero(amount)
        if self.counters is not None:
            self.counters.global_access(self, L, rows[read], source[read], size, i, "copy")
            self.counters.shared_access(self, L, sel, flat, size, i, "store")
        self.note_copy(L, sel, flat, size, self._copy_count[L.idx[L.first]], i)
        groups, waiting = self._copy_count[L.idx[rows]], np.ones(len(rows), bool)
        copy = Copy(L, rows, groups, waiting, flat, source, read, size, i)
        self._copies.append(copy)
        if not self.lazy:
            self._copy(copy)

    def _copy(self, c: Copy) -> None:
        c.landed = True
        data = np.zeros((len(c.rows), c.size), np.uint8)
        if len(c.reads):
            source = c.source[c.reads]
            data[c.reads] = self.gather(c.L, c.rows[c.reads], source, c.size, c.instruction)
        self.smem[c.size][c.flat // c.size] = data.view(TYPES[c.size]).reshape(-1)

    def copies_commit(self, L, i):
        self._copy_count[L.idx] += 1

    def copies_wait(self, L, n, i):
        """At most the last ``n`` groups of a thread are still under way."""
        if self.order is not None:
            done = self._copy_count[L.idx[L.first]] - n
            self.order.waited(L.warps, self.order.copies + self.order.own[L.warps], done)
        here = np.zeros(self.lanes, bool)
        here[L.idx] = True
        for copy in self._copies:
            lanes = copy.L.idx[copy.rows]
            done = copy.waiting & here[lanes] & (copy.group < self._copy_count[lanes] - n)
            if done.any() and not copy.landed:
                self._copy(copy)
            self.note_copied(lanes[done], copy.flat[done], copy.size)
            copy.waiting &= ~done
        self._copies = [copy for copy in self._copies if copy.waiting.any()]

    def finish_copies(self) -> None:
        if self._copies and self.checked:
            what = "a CTA ended while cp.async may still write its shared memory"
            self.report("copy not waited for", self._copies[0].instruction, detail=what)
