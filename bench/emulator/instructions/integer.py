"""PTX ISA, "Integer Arithmetic Instructions". Sums and low products are the same of either sign."""

from ..codegen import BITS, Emitter
from ..parser import Instr, Operand, PTXError
from . import PACKED_INTEGERS, compute_packed, kind_of, only, op


def _doubled(kind: str) -> str:
    return kind[0] + str(2 * BITS[kind])


@op("add", "sub")
def add(e: Emitter, ins: Instr) -> None:
    only(ins)
    kind = kind_of(ins)
    formula = "{} + {}" if ins.op == "add" else "{} - {}"
    if kind in PACKED_INTEGERS:
        compute_packed(e, ins, formula)
    else:
        d, a, b = ins.operands
        unsigned = f"u{BITS[kind]}"
        e.dst(d, formula.format(e.src(a, unsigned), e.src(b, unsigned)), unsigned)


@op("mul")
def mul(e: Emitter, ins: Instr) -> None:
    only(ins, "lo", "hi", "wide")
    d, a, b = ins.operands
    e.dst(d, *_product(e, ins, a, b))


@op("mad")
def mad(e: Emitter, ins: Instr) -> None:
    only(ins, "lo", "hi", "wide")
    d, a, b, c = ins.operands
    product, kind = _product(e, ins, a, b)
    e.dst(d, f"{product} + {e.src(c, kind)}", kind)


def _product(e: Emitter, ins: Instr, a: Operand, b: Operand) -> tuple[str, str]:
    """The expression of a product, and its type."""
    kind = kind_of(ins)
    if "wide" in ins.parts:
        wide = _doubled(kind)
        return f"{e.src(a, kind)}.astype({wide}) * {e.src(b, kind)}.astype({wide})", wide
    if "hi" in ins.parts and BITS[kind] <= 32:
        return f"mulhi({e.src(a, kind)}, {e.src(b, kind)}, {BITS[kind]})", kind
    if "lo" not in ins.parts:
        raise PTXError(f"a part of the product of .{kind}")
    unsigned = f"u{BITS[kind]}"
    return f"{e.src(a, unsigned)} * {e.src(b, unsigned)}", unsigned


@op("div", "rem")
def div(e: Emitter, ins: Instr) -> None:
    only(ins)
    kind = kind_of(ins)
    d, a, b = ins.operands
    e.dst(d, f"{ins.op}_int({e.src(a, kind)}, {e.src(b, kind)})", kind)


@op("abs", "neg")
def sign(e: Emitter, ins: Instr) -> None:
    only(ins)
    kind = kind_of(ins)
    d, a = ins.operands
    e.dst(d, f"np.{'abs' if ins.op == 'abs' else 'negative'}({e.src(a, kind)})", kind)


@op("min", "max")
def extreme(e: Emitter, ins: Instr) -> None:
    only(ins, "relu")
    kind = kind_of(ins)
    formula = f"np.{ins.op}imum({{}}, {{}})"
    if "relu" in ins.parts:
        formula = f"np.maximum({formula}, 0)"
    if kind in PACKED_INTEGERS:
        compute_packed(e, ins, formula)
    else:
        d, a, b = ins.operands
        e.dst(d, formula.format(e.src(a, kind), e.src(b, kind)), kind)


@op("bfe")
def bfe(e: Emitter, ins: Instr) -> None:
    only(ins)
    kind = kind_of(ins)
    d, a, start, length = ins.operands
    field = f"{e.src(start, 'u32')}, {e.src(length, 'u32')}"
    e.dst(d, f"bfe({e.src(a, kind)}, {field}, {BITS[kind]})", kind)
