"""Hazards of machine code: the known one is found, each kind is, and what waits has none."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from bench import assembly, binaries, dataflow, hazards, sass, selection
from bench.__main__ import main
from bench.dataflow import Hazard

ROOT = Path(__file__).parents[1]
KNOWN = Path(__file__).parent / "data" / "wgrad_in_flight.sass"
OLD_TRITON = ROOT / ".venv-triton-3.6" / "bin" / "python"


def program(text: str) -> list[assembly.Instruction]:
    """A program of an instruction or label a line, before each instruction its control code if it
    has one: "w0" and "r1" are its scoreboards, "wait01" are those it waits for.
    """
    lines = []
    for i, line in enumerate(map(str.strip, text.strip().splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        codes, instruction = re.fullmatch(r"((?:[wr]\d |wait\d+ )*)(.*)", line).groups()
        boards = dict.fromkeys("wr", 7)
        waits = 0
        for code in codes.split():
            if code.startswith("wait"):
                waits = sum(1 << int(board) for board in code.removeprefix("wait"))
            else:
                boards[code[0]] = int(code[1:])
        upper = (1 | boards["w"] << 5 | boards["r"] << 8 | waits << 11) << 41
        lines.append(f"        /*{16 * i:04x}*/  {instruction} ;  /* 0x{0:016x} */")
        lines.append(f"        /* 0x{upper:016x} */")
    return assembly.nvidia("\n".join(lines))


def find(text: str) -> list[tuple[str, str]]:
    """Kind and register of a program's hazards."""
    return [
        (hazard.kind, hazard.register)
        for hazard in dataflow.find(program(f"kernel:\n{text}\nEXIT"), "kernel")
    ]


# The known case.


def test_the_known_hazard_is_found_in_its_machine_code():
    """Of the eight operands the first is free once seven products are left."""
    found = dataflow.find(assembly.nvidia(KNOWN.read_text()), ".L_x_3")
    assert {hazard.kind for hazard in found} == {"operand of a product in flight"}
    assert [hazard.register for hazard in found] == [f"R{r}" for r in range(60, 88, 4)]
    assert all("HGMMA" in hazard.first and "LDSM" in hazard.second for hazard in found)


def test_the_known_case_is_clean_with_the_waits_it_lacks():
    text = KNOWN.read_text().replace("gsb0, 0x7", "gsb0, 0x0")
    assert dataflow.find(assembly.nvidia(text), ".L_x_3") == []


COMPILED = """
import json
from dataclasses import replace

import torch

from bench import compiled, dataflow, selection
from kernels.conv import descriptor_gemm
from kernels.conv.engine import Wgrad
from kernels.geometry import Conv2dGeometry
from kernels.tile import Tile

g = Conv2dGeometry(32, 128, 28, 28, 128, 3, 3, padding=((1, 1), (1, 1)))
found = {}
with selection.compiling("sm_90") as (_, launched):
    x, w, y = selection.operands(g, torch.bfloat16)
    for box in ((2, 8, 8), (128, 1, 1)):
        tile = Tile(64, 64, 128, warps=4, stages=3, box=box)
        launched.clear()
        descriptor_gemm.wgrad(Wgrad(x, y, w, None, g), tile)
        (kernel,) = launched
        code = compiled.instructions(kernel, encoded=True)
        found[str(box)] = dataflow.find(code, kernel.metadata.name)
print(json.dumps(found))
"""


@pytest.mark.skipif(not OLD_TRITON.exists(), reason="no environment with Triton 3.6.0")
def test_the_known_hazard_is_found_where_triton_3_6_compiles_it():
    found = json.loads(run(OLD_TRITON, "-c", COMPILED))
    operands = [Hazard(*hazard) for hazard in found["(2, 8, 8)"]]
    assert {hazard.kind for hazard in operands} == {"operand of a product in flight"}
    assert all("HGMMA" in hazard.first for hazard in operands)
    assert found["(128, 1, 1)"] == []  # one long axis: both operands are in shared memory


COMPUTED = """
import json

import torch

from bench import compiled, dataflow, selection
from kernels.conv import few_channels, implicit_gemm
from kernels.conv.engine import Fprop, Normalization, Wgrad
from kernels.geometry import Conv2dGeometry, Pool2dGeometry
from kernels.pool.pool_gradient import PoolGradient
from kernels.tile import Tile

pads = (1, 1), (1, 1)
layer = Conv2dGeometry(8, 64, 56, 56, 64, 3, 3, padding=pads)
pool = Pool2dGeometry(8, 64, 56, 56, (2, 2), (2, 2))
first = Conv2dGeometry(8, 3, 56, 56, 64, 7, 7, padding=pads)


def of_pooled(x, w, y):
    dy = selection.empty(pool.y_shape, x.dtype, False)
    call = Wgrad(x, dy, w, None, layer, "tf32", pooled=PoolGradient(pool, dy.byte()))
    implicit_gemm.wgrad(call, Tile(128, 64, 32, warps=8, stages=3))


def widened(x, w, y):
    values = Normalization(w.new_empty(3), w.new_empty(3))
    few_channels.fprop(Fprop(x.byte(), w, y, first, "tf32", normalization=values), Tile(64, 32, 16))


found = {}
with selection.compiling("sm_90") as (_, launched):
    for g, engine, launch in ((layer, implicit_gemm, of_pooled), (first, few_channels, widened)):
        hazards = []
        for rule in (engine.overlapped, lambda tile, computed: tile.stages):
            engine.overlapped = rule
            launched.clear()
            launch(*selection.operands(g, torch.float32, g is first))
            (kernel,) = launched
            code = compiled.instructions(kernel, encoded=True)
            hazards.append(dataflow.find(code, kernel.metadata.name))
        found[launch.__name__] = hazards
print(json.dumps(found))
"""


@pytest.mark.skipif(not OLD_TRITON.exists(), reason="no environment with Triton 3.6.0")
def test_a_computed_operand_is_overwritten_where_triton_3_6_overlaps_turns():
    """Of a map's gradient that is found as it is loaded, and of an image of bytes."""
    for ruled, overlapped in json.loads(run(OLD_TRITON, "-c", COMPUTED)).values():
        assert ruled == []
        assert {kind for kind, *_ in overlapped} == {"operand of a product in flight"}


def run(python: Path | str, *arguments: str) -> str:
    """What Python prints, in a process of its own without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [str(python), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# Products in flight. Their operands: four registers of A; half an accumulator a column.

HGMMA = "HGMMA.64x64x16.F32.BF16"


@pytest.mark.parametrize(
    "touches",
    [
        "w0 LDSM.16.MT88.4 R100, [R2]",
        "w0 LDSM.16.MT88.4 R97, [R2]",
        "w0 LDS R103, [R2]",
        "w0 LDG.E.128 R100, desc[UR4][R2.64]",
        "w0 LDG.E.64 R102, desc[UR4][R2.64]",
        "MOV R100, RZ",
        "@P0 MOV R100, RZ",
        "CS2R R102, SRZ",
        "IMAD.WIDE R102, R2, R3, R4",
        "IMAD.U32 R101, RZ, RZ, UR4",
        f"{HGMMA} R72, R8, gdesc[UR8], R72, gsb0",  # its result
    ],
)
def test_an_operand_is_not_written_while_a_product_may_read_it(touches):
    product = f"{HGMMA} R24, R100, gdesc[UR4].tnspB, R24, gsb0"
    registers = [register for _, register in find(f"{product}\n{touches}")]
    assert len(registers) == 1
    assert registers[0] in ("R100", "R101", "R102", "R103")
    assert find(f"{product}\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n{touches}") == []


@pytest.mark.parametrize(
    "spares",
    [
        "w0 LDSM.16.MT88.4 R104, [R2]",
        "w0 LDSM.16.MT88.2 R98, [R2]",
        "w0 LDG.E.64 R98, desc[UR4][R2.64]",
        "FADD R2, R100, R101",  # reads it, too
        "STS.128 [R2], R100",
        f"{HGMMA} R24, R100, gdesc[UR8], R24, gsb0",
    ],
)
def test_an_operand_may_be_read_and_its_neighbours_written(spares):
    assert find(f"{HGMMA} R24, R100, gdesc[UR4].tnspB, R24, gsb0\n{spares}") == []


@pytest.mark.parametrize("touches", ["FADD R2, R55, RZ", "MOV R24, RZ", "STG.E [R2], R30"])
def test_an_accumulator_is_left_alone_until_its_product_is_waited_for(touches):
    product = f"{HGMMA} R24, gdesc[UR4], R24, gsb0"
    assert [kind for kind, _ in find(f"{product}\n{touches}")] == [
        "accumulator of a product in flight"
    ]
    assert find(f"{product}\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n{touches}") == []


@pytest.mark.parametrize(
    ("opcode", "last"),
    [
        ("HGMMA.64x64x16.F32.BF16", 55),
        ("HGMMA.64x256x16.F32", 151),
        ("HGMMA.64x64x8.F32.TF32", 55),
        ("HGMMA.64x64x16.F16", 39),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 87),
    ],
)
def test_an_accumulator_is_as_wide_as_its_shape_and_type(opcode, last):
    product = f"{opcode} R24, gdesc[UR4], RZ, !UPT, gsb0"
    assert find(f"{product}\nMOV R{last}, RZ") != []
    assert find(f"{product}\nMOV R{last + 1}, RZ") == []


def test_products_of_one_accumulator_follow_one_another():
    product = f"{HGMMA} R24, gdesc[UR4], R24"
    assert find(f"{product}\n{product}, gsb0\n{product}, gsb0") == []
    other = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"  # of another shape
    assert find(f"{product}\n{other}") != []
    operand = f"{HGMMA} R60, R24, gdesc[UR4], R60, gsb0"  # takes the result from registers
    assert find(f"{product}, gsb0\n{operand}") != []


def test_a_wait_ends_the_groups_before_the_last_ones():
    text = f"""
        {HGMMA} R24, R100, gdesc[UR4], R24
        {HGMMA} R24, R104, gdesc[UR4], R24, gsb0
        {HGMMA} R24, R108, gdesc[UR4], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        MOV R100, RZ
        MOV R104, RZ
        MOV R108, RZ
    """
    assert find(text) == [("operand of a product in flight", "R108")]


def test_a_product_that_may_not_be_there_ends_no_other_ones_wait():
    text = f"""
        {HGMMA} R24, R100, gdesc[UR4], R24, gsb0
        {{}} {HGMMA} R24, R104, gdesc[UR4], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        MOV R100, RZ
    """
    assert find(text.format("")) == []
    assert find(text.format("@P0")) == [("operand of a product in flight", "R100")]


def test_a_wait_does_not_end_a_group_that_is_open():
    text = f"""
        {HGMMA} R24, R100, gdesc[UR4], R24
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        MOV R100, RZ
    """
    assert find(text) == [("operand of a product in flight", "R100")]


def test_a_wait_on_one_way_only_is_none():
    text = f"""
        {HGMMA} R24, R100, gdesc[UR4], R24, gsb0
        @P0 BRA `(.L_x_1)
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        {{}}
        MOV R100, RZ
        {{}}
    """
    label = ".L_x_1:"
    assert find(text.format(label, "NOP")) == [("operand of a product in flight", "R100")]
    assert find(text.format("NOP", label)) == []


@pytest.mark.parametrize(("left", "count"), [(0, 0), (1, 1)])
def test_the_next_turn_of_a_loop_follows_this_one(left, count):
    text = f"""
        .L_x_1:
        w0 LDSM.16.M88.4 R100, [R2]
        wait0 WARPGROUP.ARRIVE
        {HGMMA} R24, R100, gdesc[UR4], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, {left:#x}
        @P0 BRA `(.L_x_1)
    """
    assert len(find(text)) == count


# Scoreboards.


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("w0 LDS R4, [R2]", "FADD R5, R4, R6", "read before it is written"),
        ("w0 LDG.E.128 R4, desc[UR4][R2.64]", "FADD R9, R7, R10", "read before it is written"),
        ("w0 LDSM.16.M88.4 R4, [R2]", "MOV R8, R7", "read before it is written"),
        ("w0 LDSM.16.M88.2 R4, [R2]", "MOV R8, R5", "read before it is written"),
        ("w0 LDC.64 R4, c[0x0][0x210]", "IADD3 R8, P0, R5, R8, RZ", "read before it is written"),
        ("w0 MUFU.RCP R4, R5", "FMUL R6, R4, R6", "read before it is written"),
        ("w0 S2R R4, SR_TID.X", "LOP3.LUT R5, R4, 0x7, RZ, 0xc0, !PT", "read before it is written"),
        ("w0 S2UR UR4, SR_CTAID.X", "UIADD3 UR5, UR4, 0x1, URZ", "read before it is written"),
        ("w0 I2F.RP R4, R5", "MUFU.RCP R6, R4", "read before it is written"),
        ("w0 SHFL.BFLY PT, R4, R5, 0x1, 0x1f", "FADD R4, R4, R5", "read before it is written"),
        ("w0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5", "@P0 MOV R4, R6", "read before"),
        ("w0 DMMA.8x8x4 R4, R8, R10, R4", "DADD R12, R6, R14", "read before it is written"),
        ("w0 LDS R4, [R2]", "w1 LDS R6, [R4]", "read before it is written"),
        ("w0 LDS R4, [R2]", "MOV R4, RZ", "written twice"),
        ("w0 LDS R5, [R2]", "CS2R R4, SRZ", "written twice"),
        ("r0 STG.E.128 desc[UR4][R2.64], R4", "MOV R7, RZ", "written before it is read"),
        ("r0 STG.E desc[UR4][R2.64], R4", "MOV R3, RZ", "written before it is read"),
        ("r0 STSM.16.M88.4 [R2], R4", "FADD R6, R8, R9", "written before it is read"),
        ("r0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64], P1", "MOV R2, RZ", "written before"),
        ("r0 @UP0 UTMALDG.4D [UR8], [UR16]", "UMOV UR13, URZ", "written before it is read"),
        ("r0 UTMASTG.2D [UR8], [UR16]", "UMOV UR17, URZ", "written before it is read"),
    ],
)
def test_what_takes_its_time_is_waited_for(first, second, kind):
    found = find(f"{first}\n{second}")
    assert len(found) == 1
    assert found[0][0].startswith(kind)
    assert find(f"{first}\nwait0 {second}") == []
    assert find(f"{first}\nwait0 @P6 NOP\n{second}") == []  # a guard does not keep it from waiting
    assert len(find(f"{first}\nwait12345 {second}")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "w0 LDSM.16.M88.2 R4, [R2]\nMOV R6, RZ",
        "w0 LDG.E.64 R4, desc[UR4][R2.64]\nMOV R6, RZ",
        "r0 STS.64 [R2], R4\nMOV R6, RZ",
        "r0 STG.E desc[UR4][R2.64], R4\nFADD R8, R4, R2",  # reads what is read
        "r0 STG.E desc[UR4][R2.64], R4\nUMOV UR4, URZ",  # uniform addresses are read at once
        "@P0 STG.E desc[UR4][R2.64], R4\nISETP.NE.AND P0, PT, R6, RZ, PT",  # and so are guards
        "FADD R4, R5, R6\nFADD R7, R4, R4",  # of fixed latency
        "w0 MUFU.RCP R4, R5\nwait0 I2F.RP R5, R6",
        # In one queue operands are read in order, before a later one's result is there.
        "w0 LDS R4, [R2]\nw1 LDS R2, [R6]",
        "w0 LDG.E R4, desc[UR4][R2.64]\nw1 r2 LDG.E R8, desc[UR4][R6.64]\nwait2 MOV R2, RZ",
        "STS [R2], R4\nSTG.E desc[UR4][R6.64], R8\nr3 STS [R2+0x4], R5\nwait3 MOV R4, RZ",
        # Results of shared memory come in order.
        "LDS R4, [R2]\nw0 LDS R5, [R2+0x4]\nwait0 FADD R6, R4, R5",
        "w0 LDSM.16.M88.4 R4, [R2]\nw1 LDS.64 R4, [R3]\nwait0 MOV R8, R7\nwait1 FADD R9, R4, R5",
        "LDGDEPBAR\nDEPBAR.LE SB0, 0x1",
    ],
)
def test_what_needs_no_wait_of_its_own_is_clean(text):
    assert find(text) == []


def test_results_of_global_memory_come_in_no_order():
    text = "LDG.E R4, desc[UR4][R2.64]\nw0 LDG.E R5, desc[UR4][R6.64]\nwait0 FADD R6, R4, R5"
    assert find(text) == [("read before it is written", "R4")]
    text = "w0 LDG.E R4, desc[UR4][R2.64]\nw1 LDG.E R4, desc[UR4][R6.64]"
    assert find(text) == [("written twice", "R4")]
    assert find("w0 LDS R4, [R2]\nw1 LDG.E R4, desc[UR4][R6.64]") == [("written twice", "R4")]


def test_a_result_that_replaces_another_one_is_waited_for_itself():
    text = "w0 LDSM.16.M88.4 R4, [R2]\nw1 LDS.64 R4, [R3]"
    assert find(f"{text}\nwait0 FADD R9, R4, R5") != []
    assert find(f"{text}\nwait1 MOV R9, R7") != []


def test_all_that_a_scoreboard_holds_is_waited_for_by_a_barrier():
    assert find("w2 LDS R4, [R2]\nDEPBAR.LE SB2, 0x0\nFADD R5, R4, R4") == []
    assert find("w2 LDS R4, [R2]\nDEPBAR.LE SB2, 0x1\nFADD R5, R4, R4") != []
    assert find("w2 LDS R4, [R2]\n@P0 DEPBAR.LE SB2, 0x0\nFADD R5, R4, R4") != []


def test_a_subroutine_returns_to_its_caller_with_what_it_left():
    text = """
        w0 LDS R8, [R2]
        CALL.REL.NOINC `(.L_x_1)
        {}FADD R9, R6, R8
        EXIT
        .L_x_1:
        wait0 MOV R5, R8
        w1 LDS R6, [R4]
        RET.REL.NODEC R20 `(kernel)
    """
    assert find(text.format("")) == [("read before it is written", "R6")]
    assert find(text.format("wait1 ")) == []


def test_an_unknown_instruction_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"unknown opcode FROB\.X R4, R5"):
        find("FROB.X R4, R5")
    with pytest.raises(ValueError, match=r"unknown shape of HMMA\.999\.F32"):
        find("HMMA.999.F32 R4, R8, R12, R4")
    with pytest.raises(ValueError, match=r"unknown shape of HGMMA\.64x8x16\.BF8"):
        find("HGMMA.64x8x16.BF8 R4, gdesc[UR4], R4")


def test_the_control_code_is_decoded():
    (instruction,) = program("w3 r1 wait05 LDS R4, [R2]")
    assert sass.control(instruction.upper_half) == sass.Control(1, 3, 1, frozenset({0, 5}))
    (instruction,) = program("MOV R4, R2")
    assert sass.control(instruction.upper_half) == sass.Control(1, None, None, frozenset())
    known = next(i for i in assembly.nvidia(KNOWN.read_text()) if i.address == "2390")
    assert sass.control(known.upper_half) == sass.Control(5, None, None, frozenset(range(6)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("w0 r1 @!UP6 SYNCS.EXCH.64 URZ, [UR4+0x10], UR6", "BAR.SYNC.DEFER_BLOCKING 0x0"),
        ("w0 SYNCS.EXCH.64 URZ, [UR4], UR6", "r1 SYNCS.ARRIVE.TRANS64 RZ, [UR4], R7"),
        ("w0 @!P4 SYNCS.CCTL.IV [UR4+0x20]", "BAR.SYNC.DEFER_BLOCKING 0x0"),
        ("r0 MEMBAR.ALL.CTA", "FENCE.VIEW.ASYNC.S"),
        ("w0 FENCE.VIEW.ASYNC.S", "BAR.SYNC.DEFER_BLOCKING 0x0"),
    ],
)
def test_memory_is_in_order_before_other_threads_go_on(first, second):
    ((kind, order),) = find(f"{first}\n{second}")
    assert (kind, order[:12]) == ("read before it is written", "memory order")
    assert find(f"{first}\nwait0 {second}") == []


def test_fences_between_proxies_are_in_order():
    fence = "FENCE.VIEW.ASYNC.S"
    assert find(f"{fence}\nw0 {fence}\nwait0 BAR.SYNC.DEFER_BLOCKING 0x0") == []
    assert find(f"{fence}\nw0 {fence}\nBAR.SYNC.DEFER_BLOCKING 0x0") != []
    assert find(f"{fence}\nwait0 BAR.SYNC.DEFER_BLOCKING 0x0") != []


@pytest.mark.parametrize(
    ("copy", "wait"),
    [
        ("r0 @UP0 UTMALDG.4D [UR16], [UR12]", "w0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"),
        ("r0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]", "DEPBAR.LE SB0, 0x1"),
    ],
)
def test_a_product_follows_a_wait_for_copies(copy, wait):
    product = f"{HGMMA} R24, gdesc[UR20], R24, gsb0"
    hazard = ("product of a copy that may not have arrived", "")
    assert find(f"{copy}\n{wait}\n{product}") == []
    assert find(f"{wait}\n{copy}\n{product}") == [hazard]
    loop = f".L_x_1:\nwait0 NOP\n{{}}\n{product}\n{copy}\n@P6 BRA `(.L_x_1)"
    assert find(loop.format(wait)) == []
    assert find(f"{wait}\n" + loop.format("NOP")) == [hazard]
    assert find(loop.format("NOP")) == [hazard]


def test_a_fence_stands_between_what_writes_a_product_s_registers_and_the_product():
    product = f"{HGMMA} R24, R100, gdesc[UR20], R24, gsb0"
    for written, register in (("CS2R R54, SRZ", "R54"), ("MOV R103, R2", "R103")):
        fenced = f"{written}\nWARPGROUP.ARRIVE\n{product}"
        assert find(fenced) == []
        assert find(f"{fenced}\n{product}") == []
        assert find(f"WARPGROUP.ARRIVE\n{written}\n{product}") == [
            ("product without a fence", register)
        ]
    assert find(f"MOV R104, R2\nUMOV UR20, URZ\n{product}") == []


def test_each_wait_of_the_known_case_is_missed_where_it_is_taken_away():
    code = assembly.nvidia(KNOWN.read_text().replace("gsb0, 0x7", "gsb0, 0x0"))
    found = []
    for i, instruction in enumerate(code):
        upper = int(instruction.upper_half, 16)
        if upper >> 52 & 63:
            without = instruction._replace(upper_half=f"{upper & ~(63 << 52):#018x}")
            changed = [*code[:i], without, *code[i + 1 :]]
            found.append(bool(dataflow.find(changed, ".L_x_3")))
    assert found == [True] * 8


# The command.


@pytest.fixture
def verdicts(monkeypatch, tmp_path) -> dict[str, hazards.Verdict]:
    """What the command finds of every layer, in place of compiling."""
    found: dict[str, hazards.Verdict] = {}
    monkeypatch.setattr(selection, "compiling", lambda arch: nullcontext((None, [])))
    monkeypatch.setattr(hazards.Verdicts, "of", lambda *arguments: found)
    monkeypatch.setattr(hazards, "_CACHE", tmp_path / "kept")
    return found


CLEAN = hazards.Verdict("0123", "conv.descriptor_gemm.product_kernel", 8, 0, ())
FAULTY = hazards.Verdict(
    "4567", "conv.descriptor_gemm.wgrad_kernel", 8, 8, ("R60 by 'LDSM'", "R64")
)


def test_a_hazard_is_told_and_is_a_failure(verdicts, capsys, tmp_path):
    verdicts.update(one=CLEAN, other=FAULTY, third=CLEAN)
    path = tmp_path / "table.json"
    options = ("--suite", "resnet18", "vgg16", "--dtype", "tf32", "--json", str(path))
    assert main(["hazards", *options]) == 1
    printed = capsys.readouterr()
    assert [line.split()[:4] for line in printed.out.splitlines()] == [
        ["suite", "dtype", "specialized", "binaries"],
        ["resnet18", "tf32", "3", "2"],
        ["vgg16", "tf32", "3", "2"],
    ]
    told = "python -m bench hazards: 4567 (conv.descriptor_gemm.wgrad_kernel): R60 by 'LDSM'"
    assert printed.err.splitlines()[-1] == told
    report = json.loads(path.read_text())
    assert report["command"] == f"python -m bench hazards {' '.join(options)}"
    assert report["rows"][0] == {
        "suite": "resnet18",
        "dtype": "tf32",
        "specialized": 3,
        "binaries": 2,
        "with_products": 2,
        "with_register_operands": 1,
        "with_hazards": 1,
        "hazards": 2,
        "kernels_with_hazards": ["conv.descriptor_gemm.wgrad_kernel"],
    }


def test_without_a_hazard_it_succeeds(verdicts, capsys):
    verdicts["one"] = CLEAN
    assert main(["hazards", "--layer", "stem"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "0"


def test_what_is_not_checked_is_a_failure(verdicts, monkeypatch, capsys):
    def fail(*arguments):
        raise ValueError("unknown opcode FROB R4")

    monkeypatch.setattr(hazards.Verdicts, "of", fail)
    assert main(["hazards", "--layer", "stem"]) == 1
    assert "resnet50_v1.5 stem bf16 is not checked: ValueError" in capsys.readouterr().err


def test_another_architecture_is_refused(capsys):
    assert main(["hazards", "--arch", "sm_80"]) == 2
    assert "hazards are known of sm_90, not of sm_80" in capsys.readouterr().err


def test_verdicts_are_kept(tmp_path):
    path = tmp_path / "folder" / "kept.json"
    kept = hazards.Verdicts(path)
    kept._kept.update(one=CLEAN, other=FAULTY)
    kept.save()
    assert hazards.Verdicts(path)._kept == {"one": CLEAN, "other": FAULTY}


def source(*sizes: int | None, block: int = 64) -> str:
    """What a kernel is compiled from; of sizes that are 1 Triton makes constants."""
    kinds = [("constexpr", 1) if size == 1 else ("i32", "") for size in sizes]
    return f"kernels.some.kernel 0123 {[*kinds, ('constexpr', block)]}{{'num_warps': 4}}"


def test_a_family_s_kernel_stands_for_those_of_other_sizes(monkeypatch, tmp_path):
    """And for none that is planned, nor in another layout."""
    planned = binaries.PLANNED, [source(2, 2), source(1, 2)]
    aligned = binaries.Group("aligned", True), [source(2, 1), source(2, 2, block=32)]
    aligned[1].append(source(1, 2, block=32))
    scattered = binaries.Group("scattered", True), [source(1, 1), source(2, 1)]
    compiled = []

    @contextmanager
    def intercepted(is_known, take):
        def launch(group, *arguments):
            for text in dict((planned, aligned, scattered))[group]:
                if not is_known(text):
                    take(text, text)

        with monkeypatch.context() as patched:
            patched.setattr(binaries.Group, "launch", launch)
            yield

    def check(text):
        compiled.append(text)
        return CLEAN._replace(binary=text)

    monkeypatch.setattr(hazards, "intercepted", intercepted)
    monkeypatch.setattr(hazards, "check", check)
    monkeypatch.setattr(hazards, "_checked_by", lambda: "")
    groups = {"planned": [planned[0]], "every": [planned[0], aligned[0], scattered[0]]}
    groups["family"] = groups["every"]
    monkeypatch.setattr(binaries, "groups", groups.get)

    verdicts = hazards.Verdicts(tmp_path / "kept")
    family = planned[1] + [source(2, 2, block=32), source(1, 1)]
    for scope, needed in (("planned", planned[1]), ("family", family), ("family", family)):
        found = verdicts.of(None, None, [], scope)
        assert compiled == needed
        assert {verdict.binary for verdict in found.values()} == set(needed)
    assert len(found) == 6
    found = verdicts.of(None, None, [], "every")
    assert {verdict.binary for verdict in found.values()} == set(compiled)
    assert len(found) == len(compiled) == 6


# The library's own binaries.


@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_resnet50_has_no_hazard(dtype):
    """With the oldest version of Triton where it is there, else with this one."""
    python = OLD_TRITON if OLD_TRITON.exists() else sys.executable
    options = ("--suite", "resnet50_v1.5", "--scope", "planned", "--dtype", dtype)
    text = run(python, "-m", "bench", "hazards", *options)
    head, row = (line.split() for line in text.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells["with_hazards"] == "0"
    assert int(cells["binaries"]) > 50
    assert int(cells["with_products"]) > 30
