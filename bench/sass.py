"""The registers that an instruction of Hopper's machine code reads, writes and waits for:
``effects``.

NVIDIA does not document them. Widths follow from the names (LDS.128 writes four registers), shapes
of products from the PTX ISA, the fields of an instruction's control code from the literature on
Volta and its successors and from ptxas' output. Registers have the disassembler's names: "R12",
"UR4", "P0", "UP1"; those that always hold zero or true (RZ, URZ, PT, UPT) do not count.

An opcode that is not in the tables raises ValueError, so nothing goes unchecked.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from .assembly import Instruction

_TOKEN = re.compile(r"\b(U?R|U?P)(\d+)\b(\.64)?")
_OUTPUT = re.compile(r"U?(?:R(?:\d+|Z)|P(?:\d|T))")
_NO_SCOREBOARD = 7


class Control(NamedTuple):
    """The compiler's hints to the scheduler in an instruction.

    ``stall``: cycles until the warp's next instruction. ``write``, ``read``: the scoreboard held
    until the results are written, or until the operands have been read. ``waits``: the scoreboards
    that must be free before it is issued.
    """

    stall: int
    write: int | None
    read: int | None
    waits: frozenset[int]


class Product(NamedTuple):
    """An asynchronous product; ``closes``: it ends a group that a later wait can name."""

    accumulator: tuple[str, ...]
    operand: tuple[str, ...]  # A in registers; empty if from shared memory
    closes: bool


class Effects(NamedTuple):
    """Registers read and written, as sets; ``unit``: the unit of a variable-latency instruction.

    Instructions of a unit finish in order. A product's accumulator and operand are only in
    ``product``. ``waits_for_groups``: it waits until that many groups of products are left.
    """

    reads: frozenset[str]
    writes: frozenset[str]
    unit: str | None = None
    late: frozenset[str] = frozenset()  # registers in reads that the unit reads some time later
    orders: str | None = None  # memory or a barrier's word, for other threads' next accesses
    in_order: bool = True  # results of the unit come in the order of its instructions
    product: Product | None = None
    waits: frozenset[int] = frozenset()  # for scoreboards, besides those of the control code
    waits_for_groups: int | None = None
    fences: bool = False  # products see the present contents of registers
    copies: str | None = None  # begins a copy to shared memory; what signals its arrival
    waits_for_copies: str | None = None


def control(encoding: str) -> Control:
    """The control code in the upper half of an instruction, "0x000fe20000000f00"."""
    bits = int(encoding, 16) >> 41
    write, read = (bits >> 5) & 7, (bits >> 8) & 7
    return Control(
        stall=bits & 15,
        write=None if write == _NO_SCOREBOARD else write,
        read=None if read == _NO_SCOREBOARD else read,
        waits=frozenset(board for board in range(6) if bits >> (11 + board) & 1),
    )


# Which of the first operands are results.

_ONE = "one register, or a predicate and one, and up to two predicates after it (carries)"
_PREDICATES = "two predicates"
_PREDICATE = "one predicate"
_VOTE = "a register and a predicate, or a predicate"
_NONE = "none"

_RESULTS = {
    _ONE: """
        BMSK BREV CS2R DADD DFMA DMUL F2FP FADD FFMA FMNMX FMUL FSEL FSET FSWZADD HADD2 HFMA2 HMMA
        HMNMX2 HMUL2 I2FP I2IP IABS IADD3 IDP IMAD IMMA IMNMX ISCADD LEA LEPC LOP3 MOV P2R PRMT R2UR
        SEL SGXT SHF UBMSK UF2FP UFLO UIADD3 UIMAD ULDC ULEA ULOP3 UMOV UP2UR UPOPC UPRMT USEL USGXT
        USHF VABSDIFF VABSDIFF4 VIADD VHMNMX VIADDMNMX VIMNMX VIMNMX3
        B2R DMMA F2F F2I FLO FRND I2F I2I LDC LDG LDL LDS LDSM LD MOVM MUFU POPC QSPC REDUX S2R S2UR
        SHFL ATOM ATOMG ATOMS ELECT
    """,
    _PREDICATES: "DSETP FSETP HSETP2 ISETP PLOP3 UISETP UPLOP3",
    _PREDICATE: "FCHK",
    _VOTE: "VOTE VOTEU",
    _NONE: """
        BAR BPT BRA BREAK BSSY BSYNC CALL CCTL DEPBAR ERRBAR EXIT FENCE JMP KILL LDGDEPBAR LDGSTS
        MEMBAR NANOSLEEP NOP PMTRIG RED RET ST STG STL STS STSM UCGABAR_ARV UCGABAR_WAIT
        UTMACCTL UTMACMDFLUSH UTMALDG UTMASTG WARPGROUP WARPSYNC YIELD
    """,
}
_RESULTS_OF = {name: kind for kind, names in _RESULTS.items() for name in names.split()}

# Instructions of variable latency, by unit; for all others stalls cover the latency.
_UNITS = {
    "shared": "LDS LDSM SHFL STS STSM ATOMS MOVM",
    "global": "LDG LD LDL STG ST STL LDGSTS ATOM ATOMG RED",
    "conversion": "MUFU F2I I2F F2F FRND FLO POPC I2I FCHK",
    "constant": "LDC",
    "special": "S2R S2UR B2R QSPC REDUX",
    "double": "DMMA",
    "barrier": "SYNCS",
    "fence": "MEMBAR FENCE",
    "tensor memory": "UTMALDG UTMASTG UTMACMDFLUSH UTMACCTL",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}
# A barrier to other threads waits until memory and the barriers' words are in order: reads are
# ready or no longer needed, and writes are visible. Such an order counts as a register. A fence
# between proxies needs no other's: they are in order anyway.
_MEMORY, _PROXIES = "memory order", "memory order of proxies"
_ORDERING = {"SYNCS.EXCH": _MEMORY, "SYNCS.CCTL": _MEMORY, "MEMBAR": _MEMORY, "FENCE": _PROXIES}
_ORDERED = {"BAR": (_MEMORY, _PROXIES), "SYNCS.ARRIVE": (_MEMORY, _PROXIES), "FENCE": (_MEMORY,)}

_COPIES = {"UTMALDG": "mbarrier", "LDGSTS": "scoreboard"}

# These also read uniform registers late; no unit reads a guard late.
_LATE_UNITS = ("tensor memory",)

# Registers of A, B and C (and D) in a warp's products, by the opcode's first modifiers.
_WARP_PRODUCTS = {
    ("HMMA", "16816", "F32"): (4, 2, 4),
    ("HMMA", "16816", "F16"): (4, 2, 2),
    ("HMMA", "1688", "F32"): (2, 1, 4),
    ("HMMA", "1688", "F16"): (2, 1, 2),
    ("HMMA", "1684", "F32"): (2, 1, 4),
    ("HMMA", "1688", "F32", "TF32"): (4, 2, 4),
    ("DMMA", "8x8x4"): (2, 2, 4),
    ("DMMA", "884"): (2, 2, 4),
    ("DMMA", "16x8x4"): (4, 2, 8),
    ("DMMA", "16x8x8"): (8, 4, 8),
    ("DMMA", "16x8x16"): (16, 8, 8),
}
_GROUP_PRODUCT = re.compile(r"[HQI]GMMA\.64x(\d+)x\d+(?:\.SP)?\.(F32|F16|S32)\b")


def queue(unit: str) -> str:
    """The queue of a unit: units of one queue take their operands in order."""
    return "memory" if unit in ("shared", "global") else unit


def effects(instruction: Instruction) -> Effects:
    """The effects of an instruction; raises ValueError for an unknown opcode."""
    return _effects(instruction.opcode, instruction.operands, instruction.guard)


@lru_cache(maxsize=1 << 16)
def _effects(opcode: str, operands: tuple[str, ...], guard: str) -> Effects:
    name, *modifiers = opcode.split(".")
    guards = frozenset(_registers(guard))
    if name in ("HGMMA", "QGMMA", "IGMMA"):
        return _group_product(opcode, operands, guards)
    if name == "SYNCS":
        outputs = min(1, len(operands)) if "CCTL" not in modifiers else 0
    elif name in _RESULTS_OF:
        outputs = _outputs(_RESULTS_OF[name], operands)
    else:
        raise ValueError(f"unknown opcode {opcode} {', '.join(operands)}")
    widths = _widths(name, modifiers, len(operands) - outputs)
    writes: set[str] = set()
    for text in operands[:outputs]:
        writes.update(_wide(text, widths[0]))
    reads: set[str] = set()
    for text, width in zip(operands[outputs:], widths[1:], strict=True):
        reads.update(_wide(text, width))
    groups, boards = None, frozenset()
    if opcode.endswith("DEPBAR.LE") and not guard:
        if operands[0] == "gsb0":
            groups = int(operands[1], 16)
        elif int(operands[1], 16) == 0:
            boards = frozenset((int(operands[0].removeprefix("SB")),))
    unit = _UNIT_OF.get(name)
    for start, orders in _ORDERED.items():
        if opcode.startswith(start):
            reads.update(orders)
    late = frozenset(r for r in reads if r[0] == "R" or unit in _LATE_UNITS)
    return Effects(
        reads=guards.union(reads),
        writes=frozenset(writes),
        unit=unit,
        late=late if unit else frozenset(),
        orders=next((o for start, o in _ORDERING.items() if opcode.startswith(start)), None),
        in_order=unit != "global",
        waits=boards,
        waits_for_groups=groups,
        fences=opcode == "WARPGROUP.ARRIVE" and not guard,
        copies=_COPIES.get(name),
        waits_for_copies=_arrived(opcode),
    )


def _arrived(opcode: str) -> str | None:
    if opcode.startswith("SYNCS.PHASECHK"):
        return "mbarrier"
    return "scoreboard" if opcode == "DEPBAR.LE" else None


def _outputs(kind: str, operands: tuple[str, ...]) -> int:
    """The number of leading operands that are results."""
    if kind == _NONE:
        return 0
    if kind == _PREDICATES:
        return 2
    if kind == _PREDICATE:
        return 1
    run = [text for text in operands if text != "PR"]
    shape = ""
    for text in run:
        if not _OUTPUT.fullmatch(text):
            break
        shape += "R" if "R" in text else "P"
    pattern = "RP?|P" if kind == _VOTE else "P?RP{0,2}"
    found = re.match(pattern, shape)
    if found is None:
        raise ValueError(f"no result among the operands {', '.join(operands)}")
    return len(found[0]) + (operands[:1] == ("PR",))


def _widths(name: str, modifiers: list[str], inputs: int) -> list[int]:
    """The number of registers of the results, then of each other operand."""
    double = name in ("DADD", "DFMA", "DMUL", "DSETP")
    size = _access(name, modifiers)
    narrow = [1] * inputs
    if (name, *modifiers) in _WARP_PRODUCTS or name in ("HMMA", "DMMA"):
        a, b, c = _warp_product(name, modifiers)
        return [c, a, b, c, *narrow[3:]]
    if name == "IMMA":
        raise ValueError(f"unknown shape of {'.'.join((name, *modifiers))}")
    if double:
        return [2] * (inputs + 1)
    if "WIDE" in modifiers:
        return [2, 1, 1, 2, *narrow[3:]]
    if name == "UIADD3" and "64" in modifiers:
        return [2] * (inputs + 1)
    if name == "CS2R":
        return [1 if "32" in modifiers else 2, *narrow]
    if name in ("F2F", "F2I", "I2F", "FRND", "I2I"):
        return _conversion(name, modifiers, inputs)
    if name in ("STG", "ST", "STL", "STS", "STSM", "RED", "SYNCS", "ATOM", "ATOMG", "ATOMS"):
        return [size, 1, *[size] * (inputs - 1)]
    if name in ("LDG", "LD", "LDL", "LDS", "LDSM", "LDC", "ULDC"):
        return [size, *narrow]
    if name in ("UTMALDG", "UTMASTG"):
        # Shared memory's address, for a load the barrier's, and the position of the box.
        return [0, int(modifiers[0][0]) + (2 if name == "UTMALDG" else 1), 2, *narrow[2:]]
    if name == "RET":
        return [0, 2, *narrow[1:]]
    if name == "LEPC":
        return [2, *narrow]
    return [1, *narrow]


def _access(name: str, modifiers: list[str]) -> int:
    """The number of registers that a load, a store or a barrier's word moves."""
    if name in ("LDSM", "STSM"):
        return next((int(m) for m in modifiers if m in ("2", "4")), 1)
    if "128" in modifiers:
        return 4
    return 2 if "64" in modifiers else 1


def _conversion(name: str, modifiers: list[str], inputs: int) -> list[int]:
    """F2F.F32.F64 converts the second type to the first; F2I and I2F name only unusual types."""
    kinds = [m for m in modifiers if re.fullmatch(r"[FUS]\d+", m)]
    into = outof = 1
    if name in ("F2F", "FRND", "I2I"):
        into = 2 if kinds[:1] == ["F64"] else 1
        outof = 2 if kinds[-1:] == ["F64"] else 1
    elif name == "F2I":
        into = 2 if {"U64", "S64"} & set(kinds) else 1
        outof = 2 if "F64" in kinds else 1
    else:
        into = 2 if "F64" in kinds else 1
        outof = 2 if {"U64", "S64"} & set(kinds) else 1
    return [into, *[outof] * inputs]


def _warp_product(name: str, modifiers: list[str]) -> tuple[int, int, int]:
    key = (name, *(m for m in modifiers if m not in ("BF16", "SP")))
    for length in (4, 3, 2):
        if key[:length] in _WARP_PRODUCTS and len(key) >= length:
            return _WARP_PRODUCTS[key[:length]]
    raise ValueError(f"unknown shape of {'.'.join((name, *modifiers))}")


def _group_product(opcode: str, operands: tuple[str, ...], guards: frozenset[str]) -> Effects:
    """``HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR4].tnspB, R24, gsb0``.

    A group's four warps share 64 rows: a thread holds half a 32-bit accumulator per column. A of 64
    rows takes four registers, because a product is 32 bytes deep.
    """
    shape = _GROUP_PRODUCT.match(opcode)
    if shape is None or ".SP" in opcode:
        raise ValueError(f"unknown shape of {opcode}")
    size = int(shape[1]) // (4 if shape[2] == "F16" else 2)
    accumulator, left, *rest = operands
    operand = () if left.startswith("gdesc") else tuple(_wide(left, 4))
    reads = set(guards)
    for text in (left, *rest):
        if text.startswith("gdesc"):
            first = int(_TOKEN.findall(text)[0][1])
            # With A in registers the first descriptor is not read.
            reads.update(f"UR{n}" for n in range(first + 2 * bool(operand), first + 4))
        elif "P" in text:
            reads.update(_registers(text))
    if not any(text == accumulator or text == "RZ" for text in rest):
        raise ValueError(f"a product whose result is not its accumulator: {opcode} {operands}")
    product = Product(tuple(_wide(accumulator, size)), operand, "gsb0" in rest)
    return Effects(frozenset(reads), frozenset(), product=product)


def _wide(text: str, width: int) -> list[str]:
    """The registers of an operand, ``width`` from its first; addresses have their own width."""
    if text == "PR":
        return [f"P{n}" for n in range(7)]
    if "[" in text and width == 1:
        return _registers(text)
    if "[" in text and text.startswith(("[R", "desc", "c[", "a[")):
        return _registers(text)
    found = []
    for kind, number, _ in _TOKEN.findall(text):
        length = 1 if "P" in kind else width
        found += [f"{kind}{n}" for n in range(int(number), int(number) + length)]
    return found


def _registers(text: str) -> list[str]:
    """The registers that a guard or an address names; ``desc[UR4]`` and ``R2.64`` are pairs."""
    found = []
    for token in _TOKEN.finditer(text):
        kind, number, wide = token.groups()
        pair = wide or (kind == "UR" and text[: token.start()].endswith("desc["))
        found += [f"{kind}{n}" for n in range(int(number), int(number) + (2 if pair else 1))]
    return found
