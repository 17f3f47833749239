"""PTX ISA, "Logic and Shift Instructions"."""

from ..codegen import BITS, Emitter
from ..parser import Instr
from . import kind_of, only, op


def _type(ins: Instr) -> str:
    return "pred" if "pred" in ins.parts else kind_of(ins)


@op("and", "or", "xor")
def logic(e: Emitter, ins: Instr) -> None:
    only(ins, "pred")
    symbol = {"and": "&", "or": "|", "xor": "^"}[ins.op]
    d, a, b = ins.operands
    e.dst(d, f"{e.src(a, _type(ins))} {symbol} {e.src(b, _type(ins))}", _type(ins))


@op("not")
def invert(e: Emitter, ins: Instr) -> None:
    only(ins, "pred")
    d, a = ins.operands
    e.dst(d, f"~{e.src(a, _type(ins))}", _type(ins))


@op("shl", "shr")
def shift(e: Emitter, ins: Instr) -> None:
    only(ins)
    kind = kind_of(ins)
    bits = BITS[kind]
    if kind[0] != "s" or ins.op == "shl":
        kind = f"u{bits}"
    d, a, amount = ins.operands
    e.dst(d, f"{ins.op}({e.src(a, kind)}, {e.src(amount, 'u32')}, {bits})", kind)
