"""The reader of machine code, on short programs whose instructions can be counted by hand."""

import pytest

from bench.assembly import Instruction, Program, Steady, amd, nvidia


def sass(text: str) -> Program:
    """A program in the form of nvdisasm's, of one instruction or label a line."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return Program(
        nvidia(
            "\n".join(
                line if line.endswith(":") else f"        /*{16 * i:04x}*/       {line} ;"
                for i, line in enumerate(lines)
            )
        )
    )


PERSISTENT = """
    S2UR UR6, SR_CTAID.X
    @P0 BRA `(.L_x_0)
    .L_x_5:
    MOV R1, R2
    @UP0 UTMALDG.4D [UR40], [UR8]
    .L_x_4:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR9+0x20000], R11
    @!P3 BRA `(.L_x_2)
    .L_x_6:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR9+0x20020], R11
    @!P4 BRA `(.L_x_3)
    .L_x_7:
    HGMMA.64x128x16.F32.BF16 R88, gdesc[UR52], R88
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR52], R24, gsb0
    @UP3 UTMALDG.4D [UR8], [UR32]
    @P3 BRA `(.L_x_4)
    FADD R24, R24, R1
    F2FP.BF16.PACK_AB R8, R24, R25
    @UP0 UTMASTG.4D [UR48], [UR6]
    @!P3 BRA `(.L_x_5)
    .L_x_0:
    EXIT
    .L_x_2:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR9+0x20000], R11
    @!P3 BRA `(.L_x_2)
    BRA `(.L_x_6)
    .L_x_3:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR9+0x20020], R11
    @!P4 BRA `(.L_x_3)
    BRA `(.L_x_7)
    .L_x_8:
    BRA `(.L_x_8)
    NOP
"""


def test_retries_of_a_barrier_are_neither_loops_nor_part_of_a_turn():
    program = sass(PERSISTENT)
    assert len(program.loops) == 4  # tiles, turns, two retries
    macs = 2 * 64 * 128 * 16
    assert program.steady(warps=4) == Steady(2, 8, macs, 4)
    assert program.steady(warps=8) == Steady(2, 8, 2 * macs, 4)


def test_a_loop_over_tiles_that_makes_the_steady_loop_only_longer_changes_no_count():
    longer = PERSISTENT.replace("MOV R1, R2", "MOV R1, R2\nMOV R3, R4\nMOV R5, R6")
    assert sass(longer).steady(4) == sass(PERSISTENT).steady(4)


def test_in_a_flattened_loop_the_way_without_the_epilogue_counts():
    program = sass("""
        MOV R1, R2
        .L_x_7:
        IADD3 R0, R0, 0x1, RZ
        @P1 BRA `(.L_x_3)
        IMAD R7, R8, R9, RZ
        LDG.E.U16 R5, [R2.64]
        .L_x_3:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R11
        @!P1 BRA `(.L_x_4)
        .L_x_10:
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16].tnspA, R24, gsb0
        @UP1 UTMALDG.4D [UR8], [UR40]
        @!P0 BRA `(.L_x_6)
        FADD R24, R24, R5
        STS [R3], R24
        @UP1 UTMASTG.4D [UR40], [UR8]
        CS2R R24, SRZ
        .L_x_6:
        ISETP.GE.AND P1, PT, R0, R1, PT
        @P1 BRA `(.L_x_7)
        @!P5 EXIT
        EXIT
        .L_x_4:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R11
        @!P1 BRA `(.L_x_4)
        BRA `(.L_x_10)
    """)
    assert program.steady(8) == Steady(1, 9, 64 * 256 * 16 * 2, 4)


def test_a_loop_around_the_steady_one_that_stores_nothing_is_no_end_of_a_tile():
    program = sass("""
        .L_x_1:
        MOV R1, R2
        .L_x_0:
        LDSM.16.M88.4 R4, [R8]
        HMMA.16816.F32.BF16 R24, R4, R6, R24
        @P0 BRA `(.L_x_0)
        IADD3 R5, R5, 0x1, RZ
        @P1 BRA `(.L_x_1)
        FADD R24, R24, R5
        @!P2 EXIT
        STG.E.128 [R2.64], R24
        EXIT
    """)
    # Both instructions of the outer loop's end, then the sum, the way out not taken, store, exit.
    assert program.steady(4) == Steady(1, 3, 16 * 8 * 16 * 4, 6)


def test_of_an_unrolled_loop_and_its_remainders_the_longest_is_steady():
    program = sass("""
        .L_x_9:
        HMMA.1688.F32.TF32 R24, R4, R6, R24
        @P1 BRA `(.L_x_9)
        @P0 BRA `(.L_x_1)
        .L_x_0:
        HMMA.1688.F32.TF32 R24, R4, R6, R24
        HMMA.1688.F32.TF32 R24, R8, R6, R24
        HMMA.1688.F32.TF32 R24, R12, R6, R24
        HMMA.1688.F32.TF32 R24, R16, R6, R24
        IADD3 R5, R5, -0x4, RZ
        @P1 BRA `(.L_x_0)
        .L_x_1:
        @P2 BRA `(.L_x_3)
        .L_x_2:
        HMMA.1688.F32.TF32 R24, R4, R6, R24
        @P1 BRA `(.L_x_2)
        .L_x_3:
        STG.E.128 [R2.64], R24
        EXIT
    """)
    assert program.steady(8) == Steady(4, 6, 4 * 16 * 8 * 8 * 8, 3)


def test_products_of_an_unrolled_loop_are_steady_and_those_after_a_nan_are_not():
    text = """
        HMMA.16816.F32.BF16 R24, R4, R6, R24
        LDSM.16.M88.4 R4, [R8]
        HMMA.16816.F32.BF16 R24, R4, R6, R24
        FSETP.NEU.AND P0, PT, R24, R24, PT
        @!P0 BRA `(.L_x_2)
        .L_x_0:
        HMMA.16816.F32.BF16 R24, R4, R6, RZ
        @P1 BRA `(.L_x_0)
        STS [R3], R24
        .L_x_2:
        STG.E.128 [R2.64], R24
        EXIT
    """
    assert sass(text).steady(4) == Steady(2, 3, 2 * 16 * 8 * 16 * 4, 4)
    # The turn of a loop that some lengths pass by, and as much before it: the loop is steady.
    peeled = text.replace("HMMA.16816.F32.BF16 R24, R4, R6, R24", "MOV R1, R2", 1)
    assert sass(peeled).steady(4) == Steady(1, 2, 16 * 8 * 16 * 4, 3)


def test_a_turn_starts_its_copies():
    program = sass("""
        .L_x_0:
        HMMA.16816.F32 R24, R4, R6, R24
        @P0 BRA `(.L_x_1)
        LDGSTS.E.BYPASS.128 [R3], [R4.64]
        LDGSTS.E.BYPASS.128 [R3], [R5.64]
        .L_x_1:
        @P1 BRA `(.L_x_0)
        STG.E.128 [R2.64], R24
        EXIT
    """)
    assert program.steady(4) == Steady(1, 5, 8192, 2)


def test_without_tensor_cores_the_loop_with_most_multiply_adds_is_steady():
    program = sass("""
        .L_x_0:
        HFMA2.MMA R6, -RZ, RZ, 0, 0
        HFMA2.MMA R7, -RZ, RZ, 0, 0
        IADD3 R5, R5, 0x1, RZ
        IADD3 R5, R5, 0x1, RZ
        @P0 BRA `(.L_x_0)
        .L_x_1:
        FFMA R1, R2, R3, R1
        @P0 BRA `(.L_x_1)
        STG.E [R2.64], R1
        EXIT
    """)
    assert program.steady(4) == Steady(0, 2, 0, 2)


def test_a_call_of_a_label_may_leave_the_loop():
    program = sass("""
        @!P0 BRA `(.L_x_0)
        .L_x_1:
        HMMA.16816.F32 R24, R4, R6, R24
        @!P0 CALL.REL.NOINC `(.L_x_0)
        BRA `(.L_x_1)
        .L_x_0:
        STG.E [R2.64], R1
        EXIT
    """)
    assert program.steady(4) == Steady(1, 3, 8192, 2)


def test_products_that_one_thread_issues_have_no_shape():
    program = sass("""
        .L_x_9:
        @P4 BRA `(.L_x_7)
        UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR28], idesc[UR29], UPT
        UTCBAR [UR10], URZ
        .L_x_7:
        BRA.U UP0, `(.L_x_9)
        STG.E [R2.64], R1
        EXIT
    """)
    assert program.steady(4) == Steady(1, 4, None, 2)


def test_a_program_without_a_loop_has_no_steady_one():
    assert sass("FFMA R1, R2, R3, R1 \n EXIT").steady(4) is None


def test_a_computed_jump_is_refused():
    with pytest.raises(ValueError, match="computed jump"):
        sass("BRX R4 -0x100 \n EXIT")


def test_an_amd_kernel_begins_at_its_name_and_loads_under_a_mask():
    text = """
helper:
.LBB0_1:
	s_cbranch_scc1 .LBB0_1
	s_setpc_b64 s[30:31]
	.globl	fprop_kernel
fprop_kernel:                           ; @fprop_kernel
.Lfunc_begin1:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB1_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 20 30
	s_and_saveexec_b64 s[8:9], vcc
	s_cbranch_execz .LBB1_4
; %bb.3:
	global_load_dwordx4 v[2:5], v[0:1], off
.LBB1_4:
	s_or_b64 exec, exec, s[8:9]
	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
	v_mfma_f32_4x4x4_16b_f16 a[0:3], v[2:3], v[4:5], a[0:3]
	s_cbranch_scc0 .LBB1_2
	buffer_store_dwordx4 v[6:9], v1, s[0:3], 0 offen
	s_endpgm
"""
    macs = 4 * (32 * 32 * 8 + 16 * 4 * 4 * 4)
    assert Program(amd(text), "fprop_kernel").steady(4) == Steady(2, 7, macs, 2)


@pytest.mark.parametrize(
    ("opcode", "warps", "macs"),
    [
        ("HGMMA.64x128x16.F32.BF16", 4, 64 * 128 * 16),
        ("HGMMA.64x64x8.F32.TF32", 8, 2 * 64 * 64 * 8),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", 4, 64 * 256 * 32),
        ("HMMA.16816.F32.BF16", 4, 4 * 16 * 8 * 16),
        ("HMMA.1684.F32.TF32", 1, 16 * 8 * 4),
        ("QMMA.16832.F32.E4M3.E4M3", 2, 2 * 16 * 8 * 32),
        ("DMMA.884", 4, 4 * 8 * 8 * 4),
        ("DMMA.8x8x4", 4, 4 * 8 * 8 * 4),
        ("DMMA.16x8x16", 1, 16 * 8 * 16),
        ("v_mfma_f32_16x16x4_f32", 4, 4 * 16 * 16 * 4),
        ("v_mfma_f32_32x32x4_2b_bf16", 1, 2 * 32 * 32 * 4),
        ("UTCHMMA", 4, None),
        ("UTCQMMA.2CTA", 4, None),
    ],
)
def test_the_name_of_a_tensor_core_instruction_gives_its_shape(opcode, warps, macs):
    instruction = Instruction(opcode)
    assert instruction.tensor_core
    assert instruction.macs(warps) == macs


@pytest.mark.parametrize("opcode", ["HFMA2.MMA", "FFMA", "HADD2", "UTCBAR", "v_fma_f32", "s_nop"])
def test_other_instructions_are_none_of_the_tensor_cores(opcode):
    assert not Instruction(opcode).tensor_core


def test_an_encoded_instruction_is_read_in_full():
    text = """
.L_x_1:
        /*2390*/              @!P0 BRA `(.L_x_2) ;                /* 0x0000001800488947 */
                                                                  /* 0x03ffea0003800000 */
        /*23a0*/                   LDSM.16.MT88.4 R56, [R16+UR4+0xc000] ;  /* 0x00c00000ab20783b */
                                                                  /* 0x0002620000004200 */
"""
    jump, load = nvidia(text)
    assert (jump.labels, jump.target, jump.falls) == ((".L_x_1",), ".L_x_2", True)
    assert (jump.guard, jump.upper_half) == ("@!P0", "0x03ffea0003800000")
    assert load.operands == ("R56", "[R16+UR4+0xc000]")
    assert (load.guard, load.upper_half) == ("", "0x0002620000004200")
    assert str(load) == "23a0 LDSM.16.MT88.4 R56, [R16+UR4+0xc000]"
