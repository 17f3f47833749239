"""Barriers in shared memory: PTX ISA, "Parallel Synchronization and Communication: mbarrier".

A phase is complete when neither arrivals nor bytes of asynchronous copies are to come.
"""

from dataclasses import dataclass, field

import numpy as np

from .parser import Imm
from .shared import SharedMemory

i64 = np.int64


@dataclass
class Barrier:
    count: int
    pending: int
    transactions: int = 0  # bytes to come
    phase: int = 0
    epoch: int = 1  # of its tensor loads: goes on when the barrier is initialised again
    agent: int | None = None  # that these loads are in the order of accesses
    arriving: np.ndarray = field(init=False, repr=False)  # the clock of what arrives in this phase
    done: np.ndarray = field(init=False, repr=False)  # and that of what arrived in earlier ones


class MBarriers(SharedMemory):
    def init_barriers(self) -> None:
        self.barriers: dict[int, Barrier] = {}  # by flat address
        self._epochs: dict[int, int] = {}  # those that barriers of the past have reached
        self.version = 0  # those who wait look again when it changes

    def _flat(self, L, address, mask, i) -> list[tuple]:
        """(lane, flat address) of those that a mask selects."""
        sel = np.arange(L.n) if mask is None else np.flatnonzero(mask)
        flat = self.places(L, address[sel], 8, sel, i, "barrier")
        return list(zip(sel.tolist(), flat.tolist(), strict=True))

    def barrier_init(self, L, address, count, mask, i):
        for lane, at in self._flat(L, address, mask, i):
            if at in self.barriers:
                self.report("barrier", i, L, lane, "an mbarrier is initialised twice")
            b = self.barriers[at] = Barrier(int(count[lane]), int(count[lane]))
            b.epoch = self._epochs.get(at, 1)
            if self.order is not None:
                b.agent = self.order.mbarrier(at % self.stride + self.shared_base)
                if b.agent is None:
                    self.stop("more mbarriers than the order of accesses can tell apart", i, L)
                b.arriving, b.done = (np.zeros_like(self.order.clock[0]) for _ in range(2))
            if self.checked:
                self.state[1][at : at + 8] |= np.uint8(1)
        self.version += 1

    def barrier_invalidate(self, L, address, mask, i):
        for lane, at in self._flat(L, address, mask, i):
            b = self._barrier(at, L, lane, i)
            if b.transactions:
                what = "an mbarrier is invalidated while copies are to complete it"
                self.report("barrier", i, L, lane, what)
            self._epochs[at] = b.epoch + 1
            del self.barriers[at]

    def _barrier(self, at: int, L, lane, i) -> Barrier:
        b = self.barriers.get(at)
        if b is None:
            self.stop(f"an mbarrier that is not initialised: {self.where(at)}", i, L, lane)
        return b

    def _settle(self, b: Barrier) -> None:
        if b.pending or b.transactions:
            return
        if b.agent is not None:
            b.done = np.maximum(b.done, b.arriving)
            b.done[b.agent] = b.epoch
        b.phase, b.epoch, b.pending = b.phase + 1, b.epoch + 1, b.count
        self.version += 1

    def barrier_arrive(self, L, address, amount, expects, mask, i):
        """An arrival releases what its warp has done before."""
        amounts = np.ones(L.n, i64) if amount is None else amount
        for lane, at in self._flat(L, address, mask, i):
            b = self._barrier(at, L, lane, i)
            count = int(amounts[lane])
            if expects:
                b.transactions, count = b.transactions + count, 1
            if count > b.pending:
                what = f"{count} arrivals at an mbarrier that waits for {b.pending}"
                self.stop(what, i, L, lane)
            b.pending -= count
            if self.order is not None:
                self.order.arrive(b.arriving, int(L.idx[lane]) >> 5)
            self._settle(b)

    def complete(self, at: int, count: int, L, lane, i) -> None:
        b = self._barrier(at, L, lane, i)
        b.transactions -= count
        self._settle(b)

    def _wait_operands(self, ins, lanes):
        a, parity = ins.operands[1:3]
        address = self.register(lanes, a.base.name).astype(i64) + a.offset
        if isinstance(parity, Imm):
            return address, np.full(lanes.n, parity.value & 1)
        return address, self.register(lanes, parity.name) & 1

    def try_wait(self, ins, lanes):
        """(those whose phase is complete, those who wait)."""
        address, parity = self._wait_operands(ins, lanes)
        key = self.places(lanes, address, 8, None, ins, "wait") * 2 + parity
        go = np.zeros(lanes.n, bool)
        for k in np.unique(key).tolist():
            here = key == k
            b = self._barrier(k >> 1, lanes, np.flatnonzero(here), ins)
            if b.phase % 2 != k & 1:
                go |= here
        if go.all():
            return [lanes], None
        if not go.any():
            return [], lanes
        return [self.lanes_of(lanes.idx[go])], self.lanes_of(lanes.idx[~go])

    def wait_succeeded(self, L, address, parity, mask, i):
        """Who has waited acquires what arrived in the phase, and its copies."""
        if self.order is None:
            return
        flat = self.places(L, address, 8, None, i, "wait")
        for at in np.unique(flat).tolist():
            self.order.acquire(self.barriers[at].done, np.unique(L.idx[flat == at] >> 5))

    def describe_wait(self, ins, lanes) -> str:
        address, parity = self._wait_operands(ins, lanes)
        b = self.barriers[int(lanes.sbase[0] + address[0])]
        return (
            f"mbarrier at {int(address[0])} for parity {int(parity[0])}: phase {b.phase}, "
            f"{b.pending} of {b.count} arrivals and {b.transactions} bytes to come"
        )
