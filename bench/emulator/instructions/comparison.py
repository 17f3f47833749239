"""Comparisons and selections (PTX ISA, "Comparison and Selection Instructions")."""

from ..codegen import BITS, Emitter
from ..parser import Instr, Pair, PTXError
from . import FLOATS, PACKED_FLOATS, kind_of, only, op
from .floating_point import source

_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_SYMBOLS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_COMBINED = {"and": "&", "or": "|", "xor": "^"}


def _compared(x: str, y: str, how: str, is_float: bool) -> str:
    """Of a NaN the ordered comparisons are false, the unordered ones (.equ ...) true."""
    if is_float and how in ("nan", "num"):
        return f"{'~' * (how == 'num')}(np.isnan({x}) | np.isnan({y}))"
    if is_float and how == "ne":
        return f"(({x} < {y}) | ({x} > {y}))"
    if how in _SYMBOLS:
        return f"({x} {_SYMBOLS[how]} {y})"
    if is_float and how == "neu":
        return f"({x} != {y})"
    if is_float and how[:-1] in _SYMBOLS and how[-1] == "u":
        return f"(({x} {_SYMBOLS[how[:-1]]} {y}) | np.isnan({x}) | np.isnan({y}))"
    raise PTXError(f"comparison .{how}")


@op("setp")
def setp(e: Emitter, ins: Instr) -> None:
    kind = kind_of(ins)
    how, *combine = [p for p in ins.parts[1:] if p not in BITS and p != "ftz"]
    d, a, b, *c = ins.operands
    if kind in PACKED_FLOATS and isinstance(d, Pair) and not combine:
        pairs = [e.let(f"halves({e.src(o, 'b32')}, {kind!r})") for o in (a, b)]
        for half, p in enumerate((d.first, d.second)):
            x, y = (f"{pair}[{half}]" for pair in pairs)
            e.dst(p, _compared(x, y, how, is_float=True), "pred")
        return
    is_float = kind in FLOATS
    if kind.endswith("x2") or (kind[0] == "b" and not is_float and how not in ("eq", "ne")):
        raise PTXError(f"comparison .{how} of .{kind}")
    x, y = (source(e, o, kind) if is_float else e.src(o, kind) for o in (a, b))
    text = e.let(_compared(x, y, how, is_float))
    other = f"~{text}"
    if combine:
        third = f" {_COMBINED[combine[0]]} {e.src(c[0], 'pred')}"
        text, other = text + third, other + third
    if isinstance(d, Pair):
        e.dst(d.first, text, "pred")
        e.dst(d.second, other, "pred")
    else:
        e.dst(d, text, "pred")


@op("selp")
def selp(e: Emitter, ins: Instr) -> None:
    only(ins)
    bits = f"b{BITS[kind_of(ins)]}"
    d, a, b, p = ins.operands
    e.dst(d, f"np.where({e.src(p, 'pred')}, {e.src(a, bits)}, {e.src(b, bits)})", bits)
