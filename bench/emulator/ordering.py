"""The order of accesses to shared memory, by vector clocks.

PTX ISA, "Memory Consistency Model": two accesses of one place, of which one writes, must be ordered
by causality. Those that act are *agents*: each warp of a CTA, and what works beside the warps, for
which the order has to be made by a wait: products of each warpgroup (wgmma), tensor stores and
copies (cp.async) of each warp, and the tensor loads of each mbarrier. An agent counts its *epochs*:
a warp those between its releases, the others their groups or phases. The clock of a warp holds for
each agent the last epoch whose accesses happened before what the warp does next. A release (arrival
at a barrier) gives a clock to the barrier, an acquire (the end of the wait) takes it from there.

Of each word of shared memory the last write and each agent's last read are known, as *stamps*:
epoch, agent and instruction in one integer. The threads of a warp count as ordered.
"""

from dataclasses import dataclass, replace

import numpy as np

from .parser import SIZES

i64 = np.int64
EPOCH_SHIFT, AGENT_SHIFT = 32, 20
"""Bits of a stamp: the instruction below the agent, the agent below the epoch."""
AGENT_MASK, INSTRUCTION_MASK = (1 << EPOCH_SHIFT - AGENT_SHIFT) - 1, (1 << AGENT_SHIFT) - 1
NEVER = (1 << 30) - 2
"""An epoch that nobody reaches."""
MBARRIERS = 64
"""Most mbarriers of a CTA that can be told apart."""


@dataclass(frozen=True)
class Actors:
    """Whose accesses are looked at, and what is known to have happened before them."""

    agents: np.ndarray
    epochs: np.ndarray
    clocks: np.ndarray  # [actors, agents]
    ctas: np.ndarray
    row: np.ndarray | int  # which of these actors touches each word


class Ordering:
    """Clocks of a batch of CTAs and what they say of words of ``grain`` bytes."""

    def __init__(self, ctas: int, warps: int, stride: int, grain: int, mbarriers: bool):
        self.warps, self.grain, self.words = warps, grain, stride // grain
        self.products = warps  # the first agent of each sort
        self.stores = self.products + -(-warps // 4)
        self.copies = self.stores + warps  # from here on they only write
        self.loads = self.copies + warps
        agents = self.loads + MBARRIERS * mbarriers
        self.clock = np.zeros((ctas * warps, agents), i64)
        self.cta = np.repeat(np.arange(ctas), warps)
        self.own = np.tile(np.arange(warps), ctas)
        self.clock[np.arange(ctas * warps), self.own] = 1
        self.writes = np.zeros(ctas * self.words, i64)
        self.reads = np.zeros((self.copies, ctas * self.words), i64)
        self.last_write = np.zeros((ctas, agents), i64)  # the epoch of each agent's last
        self.last_read = np.zeros((ctas, self.copies), i64)
        self.mbarriers: dict[int, int] = {}  # by their address within the CTA

    # Who acts

    def threads(self, count: int, L, sel: np.ndarray | None) -> Actors:
        """Threads, each of which touches ``count`` words."""
        row = L.row if sel is None else L.row[sel]
        if count > 1:
            row = np.repeat(row, count)
        own, clocks = self.own[L.warps], self.clock[L.warps]
        return Actors(own, self.clock[L.warps, own], clocks, self.cta[L.warps], row)

    def copying(self, count: int, L, sel: np.ndarray | None, groups: np.ndarray) -> Actors:
        """cp.async of threads; ``groups`` of their warps are committed already."""
        by = self.threads(count, L, sel)
        return replace(by, agents=by.agents + self.copies, epochs=groups + 1)

    def loading(self, count: int, agent: int, epoch: int, warp: int) -> Actors:
        """A tensor load that a warp issues."""
        one = slice(warp, warp + 1)
        return Actors(np.array([agent]), np.array([epoch]), self.clock[one], self.cta[one], 0)

    def storing(self, count: int, groups: int, warp: int) -> Actors:
        """A tensor store of a thread that has committed so many groups of them already."""
        return self.loading(count, self.stores + self.own[warp], groups + 1, warp)

    def multiplying(self, count: int, chunks: int, groups: np.ndarray, committed) -> Actors:
        """wgmma of warpgroups, each of which touches so many chunks, ordered after what all its
        warps know.
        """
        warps = groups[:, None] * 4 + np.arange(4)
        first = warps[:, 0]
        row = np.repeat(np.arange(len(groups)), chunks * count)
        agents = self.products + self.own[first] // 4
        return Actors(agents, committed + 1, self.clock[warps].min(1), self.cta[first], row)

    def mbarrier(self, address: int) -> int | None:
        """The agent that stands for the tensor loads of an mbarrier; None if there are too many."""
        number = self.mbarriers.setdefault(address, len(self.mbarriers))
        return self.loads + number if number < MBARRIERS else None

    # Accesses

    def read(self, by: Actors, words: np.ndarray, i: int) -> "Conflict | None":
        """Notes a read. Returns the earlier access that it is not ordered after."""
        found = self._after_write(by, words)
        size = len(self.writes)
        self.reads.reshape(-1)[(by.agents * size)[by.row] + words] = (by.epochs << EPOCH_SHIFT | i)[
            by.row
        ]
        self.last_read[by.ctas, by.agents] = by.epochs
        return found

    def write(self, by: Actors, words: np.ndarray, i: int) -> "Conflict | None":
        """Notes a write. Returns the earlier access that it is not ordered after."""
        found = self._after_write(by, words) or self._after_reads(by, words)
        stamps = by.epochs << EPOCH_SHIFT | by.agents << AGENT_SHIFT | i
        self.writes[words] = stamps[by.row]
        self.last_write[by.ctas, by.agents] = by.epochs
        return found

    def _after_write(self, by: Actors, words: np.ndarray):
        unknown = self.last_write[by.ctas] > by.clocks
        if not unknown.any():
            return None
        stamp = self.writes.take(words)
        known = np.where(unknown, by.clocks, NEVER).min(1) + 1 << EPOCH_SHIFT
        if not (stamp >= known[by.row]).any():  # all happened before anything that is not known
            return None
        agent = stamp >> AGENT_SHIFT & AGENT_MASK
        late = stamp >> EPOCH_SHIFT > by.clocks[by.row, agent]
        return self._conflict("wrote", late, agent, stamp) if late.any() else None

    def _after_reads(self, by: Actors, words: np.ndarray):
        known = by.clocks[:, : self.copies]
        for agent in np.flatnonzero((self.last_read[by.ctas] > known).any(0)):
            stamp = self.reads[agent].take(words)
            late = stamp >= (known[:, agent] + 1 << EPOCH_SHIFT)[by.row]
            if late.any():
                return self._conflict("read", late, np.full(len(words), agent), stamp)
        return None

    def _conflict(self, what: str, late: np.ndarray, agent: np.ndarray, stamp: np.ndarray):
        first = int(np.argmax(late))
        return Conflict(what, late, int(agent[first]), int(stamp[first]) & INSTRUCTION_MASK)

    def describe(self, agent: int) -> str:
        if agent < self.products:
            return f"warp {agent}"
        if agent < self.stores:
            return f"wgmma of warpgroup {agent - self.products}"
        if agent < self.copies:
            return f"a tensor store of warp {agent - self.stores}"
        if agent < self.loads:
            return f"cp.async of warp {agent - self.copies}"
        address = next(a for a, n in self.mbarriers.items() if n == agent - self.loads)
        return f"a tensor load for the mbarrier at {address}"

    # Releases, acquires and waits

    def release(self, into: np.ndarray, warps: np.ndarray) -> None:
        """Warps, in ascending order, give their clocks to those of their CTAs' barriers."""
        cta = self.cta[warps]
        starts = np.flatnonzero(np.r_[True, cta[1:] != cta[:-1]])
        here = cta[starts]
        into[here] = np.maximum(into[here], np.maximum.reduceat(self.clock[warps], starts))
        self.clock[warps, self.own[warps]] += 1

    def arrive(self, into: np.ndarray, warp: int) -> None:
        """A warp gives its clock to an mbarrier."""
        np.maximum(into, self.clock[warp], out=into)
        self.clock[warp, self.own[warp]] += 1

    def acquire(self, clocks: np.ndarray, warps: np.ndarray) -> None:
        """Warps learn what these clocks, one for all or one for each of them, know."""
        self.clock[warps] = np.maximum(self.clock[warps], clocks)

    def waited(self, warps: np.ndarray, agents: np.ndarray, epochs: np.ndarray) -> None:
        """Warps know what agents, one of each, have done until these epochs."""
        self.clock[warps, agents] = np.maximum(self.clock[warps, agents], epochs)

    def barriers(self) -> np.ndarray:
        """Clocks of a barrier that nobody has come to, one for each CTA."""
        return np.zeros((len(self.last_write), self.clock.shape[1]), i64)


@dataclass(frozen=True)
class Conflict:
    """An access that is not ordered after an earlier one."""

    what: str  # the earlier one did
    late: np.ndarray  # which words of the later access
    agent: int
    instruction: int


def grain(instructions: list) -> int:
    """The finest access of a thread to shared memory, in bytes: what races must tell apart."""
    return min((_bytes(ins) for ins in instructions), default=16)


def _bytes(ins) -> int:
    if ins.op == "cp" and ins.parts[2] in ("ca", "cg"):
        return ins.operands[2].value
    elsewhere = {"global", "param", "const"} & set(ins.parts)
    if ins.op not in ("ld", "st", "atom", "red") or elsewhere:
        return 16
    size = next((SIZES[p] for p in reversed(ins.parts) if p in SIZES), 4)
    count = next((int(p[1:]) for p in ins.parts if p in ("v2", "v4", "v8")), 1)
    return min(16, size * count)
