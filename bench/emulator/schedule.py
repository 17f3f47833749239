"""Which threads run next, and barriers of a CTA: PTX ISA, "bar", "barrier", "Independent Thread
Scheduling".

Threads at the same place run as one. Of several places the least is chosen, so that those who are
behind catch up; from time to time the one that has not been chosen for the longest.
"""

from dataclasses import dataclass, field

import numpy as np

from .batch import Lanes
from .copies import Copies
from .tma import TensorCopies
from .wgmma import GroupProducts

PATIENCE = 512
"""Blocks after which those whom spinning threads keep waiting have their turn."""
STEPS = 200_000_000
"""Blocks after which a kernel counts as hung."""


@dataclass
class Group:
    """Threads that are about to run a block. The place is odd once they have passed its entry."""

    place: int  # 2 x block, or 2 x block + 1
    lanes: Lanes
    since: int


@dataclass
class CtaBarrier:
    """One of the sixteen barriers, in all CTAs of the batch."""

    count: int | None  # of threads; None if all
    arrived: np.ndarray
    clock: np.ndarray | None
    waiting: list = field(default_factory=list)  # (lanes, place where they go on)


class Scheduler(Copies, TensorCopies, GroupProducts):
    def init_schedule(self) -> None:
        self.exited = np.zeros(self.ctas, np.int64)
        self.bars: dict[int, CtaBarrier] = {}
        self._groups: list[Group] = [Group(0, self.everyone, 0)]
        self._blocked: list[Group] = []  # at an mbarrier
        self._converging: dict = {}  # by block: threads that wait for their warpgroup
        self._steps = self._rotated = 0

    def run(self) -> None:
        with np.errstate(all="ignore"):
            seen = self.version
            while True:
                if self._blocked and self.version != seen:
                    seen = self.version
                    self._groups += self._blocked
                    self._blocked = []
                if self._groups:
                    self._step(self._next())
                elif not self.advance():
                    break
            if self._blocked or self._converging or any(b.waiting for b in self.bars.values()):
                self._deadlock()
        self.finish_stores()
        self.finish_copies()
        self.finish_products()

    def _next(self) -> Group:
        self._steps += 1
        if self._steps > STEPS:
            self.stop("too many steps: a loop without end, or a lock held by a CTA not run")
        groups = self._groups
        if len(groups) == 1:
            return groups.pop()
        groups = self._groups = self._merged(groups)
        order = [g.place for g in groups]
        if self._steps - self._rotated > PATIENCE:
            self._rotated = self._steps
            order = [g.since for g in groups]
        return groups.pop(order.index(min(order)))

    def _merged(self, groups: list[Group]) -> list[Group]:
        by_place: dict = {}
        for g in groups:
            by_place.setdefault(g.place, []).append(g)
        if len(by_place) == len(groups):
            return groups
        return [
            same[0]
            if len(same) == 1
            else Group(place, self._union([g.lanes for g in same]), min(g.since for g in same))
            for place, same in by_place.items()
        ]

    def _union(self, lanes: list):
        return self.lanes_of(np.sort(np.concatenate([L.idx for L in lanes])))

    def _go(self, place: int, lanes) -> None:
        self._groups.append(Group(place, lanes, self._steps))

    def _step(self, group: Group) -> None:
        block, lanes = self.program.blocks[group.place >> 1], group.lanes
        if block.entry is not None and not group.place & 1:
            self._enter(block, lanes)
            return
        taken = block.function(self, lanes, self.R)
        if self.counters is not None:
            self.counters.block(self, block, lanes)
        if block.end in ("cbra", "cret") and not taken.all():
            rest = self.lanes_of(lanes.idx[~taken]) if taken.any() else lanes
            self._go(2 * (block.index + 1), rest)
            if rest is lanes:
                return
            lanes = self.lanes_of(lanes.idx[taken])
        if block.end in ("bra", "cbra"):
            self._go(2 * block.target, lanes)
        elif block.end == "fall" and block.index + 1 < len(self.program.blocks):
            self._go(2 * (block.index + 1), lanes)
        else:
            self.exited += lanes.per_cta
            for number in list(self.bars):
                self._release(number)

    # Where threads may have to wait

    def _enter(self, block, lanes) -> None:
        ins, inside = block.entry, 2 * block.index + 1
        if ins.op == "mbarrier":
            passed, waiting = self.try_wait(ins, lanes)
            if waiting is not None:
                self._blocked.append(Group(2 * block.index, waiting, self._steps))
        elif ins.op == "wgmma" and ins.parts[1] == "fence":
            passed = self._converge(block, lanes)
        else:
            if ins.guard is not None:
                guard = self.register(lanes, ins.guard.name) != ins.guard.negated
                if not guard.all():
                    self.stop("a barrier that some threads skip by a predicate", ins, lanes)
            if ins.op != "wgmma":
                self._sync(ins, lanes, inside)
                return
            self.wgmma_wait(lanes, ins.operands[0].value, ins.index)
            passed = [lanes]
        for group in passed:
            self._go(inside, group)

    def _converge(self, block, lanes) -> list:
        """wgmma.fence: a warpgroup goes on when its four warps are here."""
        waiting = self._converging.pop(block.index, None)
        idx = lanes.idx if waiting is None else np.sort(np.concatenate([waiting, lanes.idx]))
        whole = np.bincount(idx >> 7, minlength=self.lanes >> 7)[idx >> 7] == 128
        if not whole.all():
            self._converging[block.index] = idx[~whole]
        return [self.lanes_of(idx[whole])] if whole.any() else []

    def _sync(self, ins, lanes, place: int) -> None:
        if "sync" not in ins.parts:
            self.stop("a barrier of an unknown kind", ins)
        number = ins.operands[0].value if len(ins.operands) else 0
        count = ins.operands[1].value if len(ins.operands) > 1 else None
        bar = self._arrive(lanes, number, count, ins)
        bar.waiting.append((lanes, place))
        self._release(number)

    def bar_arrive(self, L, number, count, i):
        self._arrive(L, number, count, i)
        self._release(number)

    def _arrive(self, lanes, number, count, ins) -> CtaBarrier:
        bar = self.bars.get(number)
        if bar is None:
            clock = None if self.order is None else self.order.barriers()
            bar = self.bars[number] = CtaBarrier(count, np.zeros(self.ctas, np.int64), clock)
        if bar.count != count:
            self.stop(f"barrier {number} with different numbers of threads", ins, lanes)
        bar.arrived += lanes.per_cta
        if (bar.arrived > self._expected(bar)).any():
            self.stop(f"barrier {number}: more threads than it expects", ins, lanes)
        if self.order is not None and bar.clock is not None:
            self.order.release(bar.clock, lanes.warps)
        return bar

    def _expected(self, bar: CtaBarrier):
        return self.threads - self.exited if bar.count is None else bar.count

    def _learn(self, bar: CtaBarrier, lanes) -> None:
        if self.order is not None and bar.clock is not None:
            self.order.acquire(bar.clock[self.order.cta[lanes.warps]], lanes.warps)

    def _release(self, number: int) -> None:
        """Threads go on whose barrier is complete, each from where it came to it."""
        bar = self.bars[number]
        done = (bar.arrived == self._expected(bar)) & (bar.arrived > 0)
        if not done.any():
            return
        rest = []
        for lanes, place in bar.waiting:
            go = done[lanes.cta]
            if go.any():
                passed = lanes if go.all() else self.lanes_of(lanes.idx[go])
                self._learn(bar, passed)
                self._go(place, passed)
            if not go.all():
                rest.append((self.lanes_of(lanes.idx[~go]), place))
        bar.waiting = rest
        bar.arrived[done] = 0
        if bar.clock is not None:
            bar.clock[done] = 0
        if not bar.arrived.any():
            del self.bars[number]

    def _deadlock(self) -> None:
        blocks = self.program.blocks
        lines = []
        for g in self._blocked:
            ins = blocks[g.place >> 1].entry
            lines.append(f"{g.lanes} wait at {ins}: {self.describe_wait(ins, g.lanes)}")
        for number, bar in self.bars.items():
            for lanes, place in bar.waiting:
                lines.append(f"{lanes} wait at barrier {number}, {blocks[place >> 1].entry}")
        for index, idx in self._converging.items():
            lines.append(f"{self.lanes_of(idx)} wait at {blocks[index].entry}")
        self.stop("\n  ".join(["deadlock", *lines]))
