"""Barriers, fences, mbarriers, and what threads of a warp tell each other: PTX ISA, "Parallel
Synchronization and Communication Instructions" and "shfl.sync".

Waits are the machine's: threads come to these functions when they may go on.
"""

from ..codegen import Emitter
from ..parser import Address, Instr, Pair, PTXError
from . import kind_of, only, op


@op("bar", "barrier")
def bar(e: Emitter, ins: Instr) -> None:
    if "warp" in ins.parts:
        e.line("m.warp_barrier(L, i)")
    elif "arrive" in ins.parts:
        number, count = (e.value(o) for o in ins.operands)
        e.line(f"m.bar_arrive(L, {number}, {count}, i)")
    else:
        raise PTXError("a barrier of an unknown kind")


@op("fence", "membar")
def fence(e: Emitter, ins: Instr) -> None:
    """Of proxies alone: memory is sequentially consistent here."""
    kinds = ("async", "async::generic", "tensormap::generic", "mbarrier_init")
    scopes = ("cta", "cluster", "gpu", "gl", "sys", "sc", "acq_rel", "acquire", "release")
    spaces = ("global", "shared::cta", "shared::cluster", "sync_restrict::shared::cta")
    only(ins, "proxy", *kinds, *scopes, *spaces, *(f"async.{space}" for space in spaces))
    if "proxy" in ins.parts and any(p.startswith("async") for p in ins.parts):
        e.line(f"m.fence_proxy(L, {e.mask()}, i)")


@op("mbarrier")
def mbarrier(e: Emitter, ins: Instr) -> None:
    """Of an arrival the state is not kept: waits are by parity."""
    how = ins.parts[1]
    known = ("expect_tx", "parity", "shared", "shared::cta", "acquire", "release", "relaxed", "cta")
    only(ins, how, *known)
    where = next(n for n, o in enumerate(ins.operands) if isinstance(o, Address))
    amounts = [e.full(o, "u32") for o in ins.operands[where + 1 : where + 2]]
    if how in ("try_wait", "test_wait"):
        if "parity" not in ins.parts:
            raise PTXError("a wait by state")
        method = "wait_succeeded"
    elif how == "arrive":
        method = "barrier_arrive"
        amounts = [*(amounts or ["None"]), str("expect_tx" in ins.parts)]
    else:
        method = {"init": "barrier_init", "inval": "barrier_invalidate"}[how]
    arguments = ", ".join([e.address(ins.operands[where]), *amounts, e.mask()])
    e.line(f"m.{method}(L, {arguments}, i)")
    if method == "wait_succeeded":
        e.dst(ins.operands[0], "np.full(L.n, True)", "pred")


@op("shfl")
def shfl(e: Emitter, ins: Instr) -> None:
    only(ins, "sync", "idx", "bfly", "up", "down")
    d, a, b, c, _ = ins.operands
    d, predicate = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    lanes = f"{e.src(b, 'u32')}, {e.src(c, 'u32')}"
    value, mode = e.src(a, "b32"), ins.parts[2]
    t = e.machine(f"shuffle(L, {value}, {mode!r}, {lanes}, i, {e.mask()})")
    e.dst(d, f"{t}[0]", "b32")
    if predicate is not None:
        e.dst(predicate, f"{t}[1]", "pred")


@op("redux")
def redux(e: Emitter, ins: Instr) -> None:
    only(ins, "sync", "add", "min", "max", "and", "or", "xor")
    kind = kind_of(ins)
    d, a, _ = ins.operands
    e.dst(d, e.machine(f"redux(L, {ins.parts[2]!r}, {e.src(a, kind)}, i)"), kind)


@op("elect")
def elect(e: Emitter, ins: Instr) -> None:
    only(ins, "sync")
    d, _ = ins.operands
    if not isinstance(d, Pair):
        raise PTXError("elect without a predicate")
    t = e.machine("elect(L, i)")
    e.dst(d.first, f"{t}[0]", "u32")
    e.dst(d.second, f"{t}[1]", "pred")
