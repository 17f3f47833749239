"""Asynchronous copies of boxes of tensors, in bulk (TMA): PTX ISA, "cp.async.bulk.tensor"."""

from ..codegen import Emitter
from ..parser import Address, Instr, PTXError
from . import op
from .memory import cp_async, known


@op("cp")
def cp(e: Emitter, ins: Instr) -> None:
    if ins.parts[1] != "async":
        raise PTXError(f"cp.{ins.parts[1]}")
    (_bulk if ins.parts[2] == "bulk" else cp_async)(e, ins)


def _bulk(e: Emitter, ins: Instr) -> None:
    how = ins.parts[3]
    if how == "commit_group":
        e.line(f"m.bulk_commit(L, {e.mask()}, i)")
    elif how == "wait_group":
        pending = e.value(ins.operands[0])
        e.line(f"m.bulk_wait(L, {pending}, {'read' in ins.parts}, {e.mask()}, i)")
    elif how == "tensor":
        _tensor(e, ins)
    else:
        raise PTXError(f"cp.async.bulk.{how}")


def _tensor(e: Emitter, ins: Instr) -> None:
    rank = int(ins.parts[4].removesuffix("d"))
    to, of, *rest = ins.operands
    spaces = ("shared::cluster", "shared::cta", "global")
    known(ins.parts[5:], *spaces, "tile", "bulk_group", "mbarrier::complete_tx::bytes")
    loads = ins.parts[5].startswith("shared")
    tensor = of if loads else to
    if not isinstance(tensor, Address):
        raise PTXError(f"{tensor} is not a tensor's place")
    coordinates = ", ".join(e.full(c, "u32") for c in tensor.coordinates or ())
    shared = e.address(to if loads else of)
    where = f"L, {shared}, {e.address(tensor)}, [{coordinates}]"
    if loads:
        e.line(f"m.tensor_load({where}, {e.address(rest[0])}, {rank}, {e.mask()}, i)")
    else:
        e.line(f"m.tensor_store({where}, {rank}, {e.mask()}, i)")
