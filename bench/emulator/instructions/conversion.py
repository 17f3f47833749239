"""Moves and conversions (PTX ISA, "mov", "prmt", "cvta", "cvt")."""

from ..codegen import BITS, Emitter
from ..parser import Instr, PTXError, Vector
from . import FLOATS, kind_of, only, op
from .floating_point import result, source

_PAIRS = (("f32", "f16x2"), ("f32", "bf16x2"), ("e4m3x2", "f16x2"))
_TO_INTEGRAL = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


@op("mov")
def mov(e: Emitter, ins: Instr) -> None:
    only(ins, "pred")
    d, a = ins.operands
    bits = 1 if "pred" in ins.parts else BITS[kind_of(ins)]
    kind = "pred" if bits == 1 else f"u{bits}"
    if isinstance(d, Vector):
        part = bits // len(d.items)
        whole = e.let(e.src(a, kind))
        for n, item in enumerate(d.items):
            e.dst(item, f"({whole} >> {kind}({n * part})).astype(u{part})", f"u{part}")
    elif isinstance(a, Vector):
        part = bits // len(a.items)
        parts = (f"{e.src(o, f'u{part}')}.astype({kind})" for o in a.items)
        e.dst(d, " | ".join(f"({p} << {kind}({n * part}))" for n, p in enumerate(parts)), kind)
    else:
        e.dst(d, e.src(a, kind), kind)


@op("prmt")
def prmt(e: Emitter, ins: Instr) -> None:
    only(ins)
    d, *operands = ins.operands
    e.dst(d, f"prmt({', '.join(e.src(o, 'u32') for o in operands)})", "u32")


@op("cvta")
def cvta(e: Emitter, ins: Instr) -> None:
    """Addresses of global memory and of parameters are generic ones themselves."""
    only(ins, "to", "global", "param", "const")
    d, a = ins.operands
    e.dst(d, e.src(a, "u64"), "u64")


@op("cvt", "float cvt")
def cvt(e: Emitter, ins: Instr) -> None:
    only(ins, "rn", "rz", *_TO_INTEGRAL, "ftz", "relu", "rna", "tf32", "e4m3x2")
    to, of = (p for p in ins.parts[1:] if p in BITS or p in ("tf32", "e4m3x2"))
    rounding = next((p for p in ins.parts if p in ("rn", "rz", "rna", *_TO_INTEGRAL)), None)
    if to in ("f16x2", "bf16x2"):
        _pair(e, ins, to, of, rounding)
    elif to == "tf32" and (of, rounding) == ("f32", "rna"):
        e.dst(ins.operands[0], f"to_tf32({e.src(ins.operands[1], 'b32')})", "b32")
    elif to == "tf32" or to.endswith("x2") or of.endswith("x2"):
        raise PTXError(f"conversion of .{of} to .{to}")
    elif to in FLOATS and of in FLOATS:
        _float_to_float(e, ins, to, of, rounding)
    elif to in FLOATS:
        if rounding != "rn":
            raise PTXError(f"rounding .{rounding}")
        result(e, ins.operands[0], f"{e.src(ins.operands[1], of)}.astype({_native(to)})", to)
    elif of in FLOATS:
        x = source(e, ins.operands[1], of)
        x = f"flush({x})" if "ftz" in ins.parts else x
        e.dst(ins.operands[0], f"to_integer({x}, {to}, {rounding!r})", to)
    else:
        _integer(e, ins, to, of)


def _native(kind: str) -> str:
    return kind if kind in ("f32", "f64") else "f64"


def _pair(e: Emitter, ins: Instr, to: str, of: str, rounding: str | None) -> None:
    """To two numbers in one register: the first operand is the upper half."""
    d, *operands = ins.operands
    if rounding != "rn" or (of, to) not in _PAIRS:
        raise PTXError(f"conversion of .{of} to .{to}, rounding .{rounding}")
    if of == "f32":
        high, low = (e.src(o, of) for o in operands)
    else:
        codes = e.let(e.src(operands[0], "u16"))
        low, high = f"E4M3[{codes} & u16(255)]", f"E4M3[{codes} >> u16(8)]"
    if "relu" in ins.parts:
        low, high = f"relu({low})", f"relu({high})"
    e.dst(d, f"packed({low}, {high}, {to!r})", "b32")


def _float_to_float(e: Emitter, ins: Instr, to: str, of: str, rounding: str | None) -> None:
    ftz = "ftz" in ins.parts
    x = e.src(ins.operands[1], of)
    if of == "f32" and ftz:
        x = f"flush({x})"
    if rounding in _TO_INTEGRAL:
        x = f"np.{_TO_INTEGRAL[rounding]}({x})"
    elif rounding not in (None, "rn"):
        raise PTXError(f"rounding .{rounding}")
    if "relu" in ins.parts:
        x = f"relu({x})"
    x = f"{x}.astype({to})" if to in ("f32", "f64") else x
    result(e, ins.operands[0], x, to, ftz and to == "f32")


def _integer(e: Emitter, ins: Instr, to: str, of: str) -> None:
    """The source is cut to its type, then sign- or zero-extended."""
    d, a = ins.operands
    e.dst(d, f"{e.src(a, of)}.astype({to.replace('b', 'u')})", to.replace("b", "u"))
