"""What is read of PTX; what is not known is refused, with the line and the instruction."""

import numpy as np
import pytest

from bench.emulator import arithmetic
from bench.emulator.codegen import Program
from bench.emulator.instructions import handler_of
from bench.emulator.parser import Address, Imm, Kernel, PTXError, Vector, parse


def kernel(body: str) -> str:
    return f""".version 8.4
.target sm_90a
.address_size 64
.file 1 "/a/kernel.py"
.visible .entry sample(
    .param .u64 .ptr .global .align 1 sample_param_0,
    .param .u32 sample_param_1
)
.reqntid 128
{{
    .reg .pred %p<3>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<3>;
    .loc 1 7 0 // kernel.py:7:0
    {body}
    ret;
}}
"""


def program(body: str) -> Program:
    return Program(parse(kernel(body)), handler_of)


def test_parameters_registers_and_places():
    k: Kernel = parse(kernel("add.s32 %r1, %r2, -3;"))
    assert (k.name, k.threads) == ("sample", 128)
    assert [(p.size, p.offset) for p in k.params] == [(8, 0), (4, 8)]
    assert len(k.registers) == 3 + 9 + 3
    assert k.instrs[0].where == ("kernel.py", 7)
    assert str(k.instrs[0]) == "PTX line 15: add.s32 %r1, %r2, -3  (kernel.py:7)"


def test_operands():
    (ins, *_) = parse(kernel("@!%p1 st.shared.v2.b32 [%r1+-16], {%r2, 0f3F800000};")).instrs
    address, vector = ins.operands
    assert ins.guard is not None
    assert ins.guard.negated
    assert isinstance(address, Address)
    assert (address.base.name, address.offset) == ("%r1", -16)
    assert isinstance(vector, Vector)
    assert isinstance(vector.items[1], Imm)
    assert (vector.items[1].value, vector.items[1].bits) == (0x3F800000, 32)


def test_scopes_of_inline_assembly_have_their_own_registers_and_labels():
    body = "{ .reg .pred p; wait: @p bra wait; }"
    k = parse(kernel(f"{body} {body}"))
    first, second, _ = k.instrs
    assert k.target_of(first) == 0
    assert k.target_of(second) == 1
    assert first.guard != second.guard


def test_a_table_of_labels_is_a_chain_of_branches():
    k = parse(kernel("T: .branchtargets A, B; brx.idx %r1, T; A: trap; B: ret;"))
    assert [ins.op for ins in k.instrs] == ["setp", "bra", "bra", "trap", "ret", "ret"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", "unknown instruction"),
        ("add.s32.sat %r1, %r2, %r3;", "unknown modifier .sat"),
        ("fma.rz.f32 %r1, %r2, %r3, %r4;", "unknown modifier .rz"),
        ("cvt.rz.f16.f32 %r1, %r2;", "rounding .rz"),
        ("add.s32 %r1, %r2;", "not understood"),
        ("add.s32 %rd1, %r2, %r3, %r4;", "not understood"),
        ("add.s64 %rd1, %rd2, %r3;", "%r3 has 32 bits, 64 are read"),
        ("add.s32 %p1, %r2, %r3;", "%p1 has 1 bits"),
        ("mov.b32 %r1, %smid;", "unknown special register %smid"),
        ("add.s32 %r1, %r2, ?;", "unknown operand"),
        ("ld.global.cluster.v3.b32 %r1, [%rd1];", "unknown modifier .v3"),
        ("st.shared::cluster.b32 [%r1], %r2;", "unknown modifier .shared::cluster"),
        ("mbarrier.pending_count.b64 %r1, %rd1;", "not understood"),
        ("cp.async.bulk.prefetch.L2.global [%rd1], 16;", "cp.async.bulk.prefetch"),
        ("tcgen05.fence::before_thread_sync;", "unknown instruction"),
        ("redux.sync.abs.f32 %r1, %r2, -1;", "unknown modifier .abs"),
        ("ld.b32 %r1, [%rd1];", "a generic address"),
        ("bra NOWHERE;", "no label NOWHERE"),
        ("ld.local.b32 %r1, [%r2];", "unknown modifier .local"),
    ],
)
def test_what_is_not_known_is_named_with_its_line(body, message):
    with pytest.raises(PTXError) as caught:
        program(body)
    assert message in str(caught.value)
    assert "PTX line 15: " in str(caught.value)
    assert body.rstrip(";") in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [("@%p9 ret;", "unknown predicate %p9"), (".frob %r1;", "unknown directive")],
)
def test_an_unknown_name_is_named_with_its_line(body, message):
    with pytest.raises(PTXError, match=f"{message}.*PTX line 15"):
        program(body)


def test_stack_memory_may_be_declared():
    program(".local .align 4 .b8 __local_depot0[8]; .reg .b64 %SP;")


def test_functions_are_shared_by_instructions_of_one_shape():
    steps = program("add.s32 %r1, %r2, 3; add.s32 %r4, %r4, 5;").blocks[0].steps
    assert steps[0].function is steps[1].function
    assert steps[0].sources != steps[1].sources


def test_a_value_that_is_part_of_a_function_has_its_own():
    text = "cp.async.wait_group 0; cp.async.wait_group 1;"
    steps = program(text).blocks[0].steps
    assert steps[0].function is not steps[1].function


@pytest.mark.parametrize(
    ("a", "start", "length", "signed", "unsigned"),
    [(0xF0, 4, 4, -1, 0xF), (0x80000001, 28, 8, -8, 8), (5, 0, 32, 5, 5), (5, 1, 0, 0, 0)],
)
def test_bit_fields(a, start, length, signed, unsigned):
    """Beyond the register there are zeros, or copies of the sign."""
    at, count = np.full(1, start, np.uint32), np.full(1, length, np.uint32)
    value = np.full(1, a, np.uint32)
    assert arithmetic.bfe(value, at, count, 32)[0] == unsigned
    assert arithmetic.bfe(value.view(np.int32), at, count, 32)[0] == signed
