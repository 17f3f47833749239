"""A batch of CTAs of one launch: its threads, its registers and what is found."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .checks import Fault, Options, Report, note

if TYPE_CHECKING:
    from .launch import Grid, Launch

u32 = np.uint32
BASE = 1024
"""The address of the first byte of shared memory, as on hardware with 1 KiB reserved."""


class Lanes:
    """A set of threads that run together. Lane = CTA of the batch x threads + thread."""

    def __init__(self, m: "Batch", idx: np.ndarray):
        self.idx, self.n = idx, len(idx)
        self.full = self.n == m.lanes
        self.cta = idx // m.threads
        tid = idx - self.cta * m.threads
        self.tid = tid.astype(u32)
        self.warp = (tid >> 5).astype(u32)
        self.lane = (tid & 31).astype(u32)
        self.ctaid = [m.ctaid[axis][self.cta] for axis in range(3)]
        self.sbase = self.cta * m.stride - m.shared_base
        self.per_cta = np.bincount(self.cta, minlength=m.ctas)
        warps = idx >> 5
        starts = np.r_[True, warps[1:] != warps[:-1]]
        self.first = np.flatnonzero(starts)  # lane of each warp
        self.warps = warps[self.first]  # of the whole batch
        self.row = np.cumsum(starts) - 1  # which of these each lane is in

    def __str__(self) -> str:
        tids = self.tid[self.cta == self.cta[0]]
        where = f"CTA {self.cta[0]} of the batch"
        return f"threads {tids[0]}..{tids[-1]} ({len(tids)}) of {where}"

    @cached_property
    def whole_warps(self) -> bool:
        return bool(self.n == 32 * len(self.warps))

    @cached_property
    def whole_groups(self) -> bool:
        """Whether these are whole warpgroups, of four warps."""
        return self.n == 128 * len(np.unique(self.warps // 4))


class Batch:
    """What all parts of the machine share: each is a class derived from this one."""

    def __init__(self, launch: "Launch", ctas: list["Grid"], options: Options):
        """``ctas``: their coordinates."""
        grid, threads, dynamic = launch.grid, launch.threads, launch.function.shared
        self.program, self.kernel, self.options = launch.function.program, launch.kernel, options
        self.memory, self.params, self.counters = launch.memory, launch.params, launch.counters
        self.grid, self.threads, self.warps = grid, threads, threads // 32
        self.ctas, self.lanes = len(ctas), len(ctas) * threads
        self.numbers = ctas
        self.ctaid = [np.array([c[axis] for c in ctas], u32) for axis in range(3)]
        self.names = np.array([1 + x + grid[0] * (y + grid[1] * z) for x, y, z in ctas], np.int32)
        self.lazy = options.mode == "lazy"
        self.shared_base, self.shared_end = BASE, BASE + dynamic
        self.stride = -(-max(dynamic, 16) // 1024) * 1024
        self.symbols = launch.symbols | dict.fromkeys(self.kernel.extern_shared, BASE)
        self.R: list[Any] = [None] * len(self.program.bits)
        self._sets: dict[bytes, Lanes] = {}
        self.everyone = self.lanes_of(np.arange(self.lanes))

    def lanes_of(self, idx: np.ndarray) -> Lanes:
        key = idx.tobytes()
        found = self._sets.get(key)
        if found is None:
            found = self._sets[key] = Lanes(self, idx)
        return found

    def register(self, L: Lanes, name: str) -> np.ndarray:
        number = self.program.number[name]
        value = self.R[number]
        if value is None:
            return self.undefined(number, L)
        return value if L.full else value[L.idx]

    def undefined(self, number: int, L: Lanes) -> np.ndarray:
        bits = self.program.bits[number]
        return np.zeros(L.n, bool if bits == 1 else f"u{bits // 8}")

    def replaced(self, old, idx: np.ndarray, value: np.ndarray) -> np.ndarray:
        new = np.zeros(self.lanes, value.dtype) if old is None else old.copy()
        new[idx] = value
        return new

    # Findings

    def report(
        self, kind: str, i, L: Lanes | None = None, sel=None, detail="", address=None, stop=False
    ) -> Report:
        """``sel``: which of the lanes, one or several; ``address``: theirs."""
        ins = self.kernel.instrs[i] if isinstance(i, (int, np.integer)) else i
        cta, thread, where = (), -1, -1
        if L is not None and L.n:
            chosen = np.arange(L.n)[slice(None) if sel is None else sel].reshape(-1)
            first = int(chosen[0])
            if sel is not None and len(chosen) > 1:
                detail += f" (and {len(chosen) - 1} more threads)"
            cta, thread = self.numbers[int(L.cta[first])], int(L.tid[first])
            if address is not None:
                where = int(address[first])
        r = Report(kind, self.kernel.name, ins, detail, cta, thread, where)
        note(r)
        if stop:
            raise Fault(r)
        return r

    def report_lanes(self, kind, L, sel, address, bad, i, detail, stop=False) -> None:
        """Of the lanes selected, whose addresses are given, those that are bad."""
        which = np.arange(len(address))[bad]
        lanes = which if sel is None else sel[which]
        whole = np.zeros(L.n, np.int64)
        whole[lanes] = address[which]
        self.report(kind, i, L, lanes, detail, whole, stop)

    def stop(self, message: str, i=None, L=None, sel=None) -> NoReturn:
        raise Fault(self.report("stopped", i, L, sel, message))
