"""Floating-point arithmetic of single numbers and of packed pairs: PTX ISA, "Floating Point
Instructions" and "Half Precision Floating Point Instructions".

What is of 16 bits is computed in float64 and rounded once.
"""

from ..codegen import BITS, Emitter
from ..parser import Instr, Operand, PTXError
from . import FLOATS, PACKED_FLOATS, compute_packed, kind_of, only, op


def source(e: Emitter, operand: Operand, kind: str) -> str:
    """An operand as a number: of 16-bit kinds as float64."""
    text = e.src(operand, kind)
    return f"{text}.astype(f64)" if kind in ("f16", "bf16") else text


def result(e: Emitter, d: Operand, text: str, kind: str, ftz: bool = False) -> None:
    """Assign numbers, rounded to their kind."""
    if kind in ("f16", "bf16"):
        rounded = "to_f16" if kind == "f16" else "to_bf16_from_double"
        e.dst(d, f"{rounded}({text})", "b16")
    else:
        e.dst(d, f"flush({text})" if ftz else text, kind)


def compute(e: Emitter, ins: Instr, formula: str) -> None:
    """Assign a formula of the operands, whose places in it are ``{}``."""
    kind = kind_of(ins)
    if "relu" in ins.parts:
        formula = f"relu({formula})"
    if kind in PACKED_FLOATS:
        compute_packed(e, ins, formula)
        return
    d, *operands = ins.operands
    text = formula.format(*(source(e, o, kind) for o in operands))
    result(e, d, f"({text})", kind, "ftz" in ins.parts)


@op("float add", "float sub", "float mul")
def binary(e: Emitter, ins: Instr) -> None:
    only(ins, "rn", "ftz")
    compute(e, ins, {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}"}[ins.op])


@op("float fma", "float mad")
def fma(e: Emitter, ins: Instr) -> None:
    only(ins, "rn", "ftz", "relu")
    formula = {"f32": "fma({}, {}, {})", "f64": "fma_double({}, {}, {})"}
    compute(e, ins, formula.get(kind_of(ins), "({} * {} + {})"))


@op("float min", "float max")
def extreme(e: Emitter, ins: Instr) -> None:
    only(ins, "NaN", "ftz", "relu")
    compute(e, ins, f"f{ins.op}{'_nan' * ('NaN' in ins.parts)}({{}}, {{}})")


@op("float div")
def div(e: Emitter, ins: Instr) -> None:
    only(ins, "rn", "full", "approx", "ftz")
    compute(e, ins, "{} / {}")


@op("float abs", "float neg")
def sign(e: Emitter, ins: Instr) -> None:
    only(ins, "ftz")
    kind = kind_of(ins)
    bits = BITS[kind]
    mask = 0x80008000 if kind in PACKED_FLOATS else 1 << (bits - 1)
    d, a = ins.operands
    symbol, other = ("&", ~mask & (2**bits - 1)) if ins.op == "abs" else ("^", mask)
    e.dst(d, f"{e.src(a, f'b{bits}')} {symbol} u{bits}({other})", f"b{bits}")


_FUNCTIONS = {"rcp": "1.0 / {}", "sqrt": "np.sqrt({})", "rsqrt": "1.0 / np.sqrt({})"}
_FUNCTIONS |= {"ex2": "np.exp2({})", "lg2": "np.log2({})", "tanh": "np.tanh({})"}


@op(*(f"float {name}" for name in _FUNCTIONS))
def function(e: Emitter, ins: Instr) -> None:
    """Rounded once, where hardware's approximations are off by an ulp or two."""
    only(ins, "approx", "rn", "ftz")
    kind, ftz = kind_of(ins), "ftz" in ins.parts
    if kind not in FLOATS:
        raise PTXError(f"{ins.op} of .{kind}")
    d, a = ins.operands
    x = source(e, a, kind)
    text = _FUNCTIONS[ins.op].format(f"flush({x}).astype(f64)" if ftz else f"{x}.astype(f64)")
    result(e, d, f"({text}).astype({kind})" if kind[-2:] != "16" else text, kind, ftz)
