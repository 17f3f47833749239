"""Kernels written in PTX, each with a fault that can be planted: right as they stand, and wrong if
a line marked ``// out`` is left out or one marked ``// becomes ...`` is replaced.
"""

import torch
from known_kernels import exchange

from bench.emulator import driver

HEADER = """
.version 8.4
.target {target}
.address_size 64
.extern .shared .align 16 .b8 buffer[];
.visible .entry exchange(.param .u64 exchange_param_0, .param .u64 exchange_param_1,
                         .param .u64 exchange_param_2, .param .u64 exchange_param_3)
.reqntid {threads}
{{
.reg .pred %p<8>;
.reg .b32 %r<32>;
.reg .b64 %rd<8>;
ld.param.b64 %rd1, [exchange_param_0];
ld.param.b64 %rd2, [exchange_param_1];
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
cvt.u64.u32 %rd3, %r2;
add.s64 %rd1, %rd1, %rd3;
add.s64 %rd2, %rd2, %rd3;
mov.u32 %r4, buffer;
add.s32 %r3, %r2, %r4;
xor.b32 %r4, %r3, 128;
shl.b32 %r5, %r1, 4;
mov.u32 %r6, buffer;
add.s32 %r5, %r5, %r6;
add.s32 %r6, %r6, 8192;
setp.lt.u32 %p1, %r1, 32;
setp.eq.u32 %p2, %r1, 0;
mov.b32 %r9, 0;
"""
"""%rd1, %rd2: this thread's words of the two tensors; %r3: its word of the buffer, %r4: that of the
thread of the other warp, %r5: its chunk of 16 bytes; %r6: the barriers; %p1: whether it is of warp
0, %p2: whether it is thread 0."""


def run(body: str, planted: bool, arch: int, threads: int = 64) -> torch.Tensor:
    """Executes a body, or what it is with its fault; returns what threads wrote."""
    lines = []
    for line in body.strip().splitlines():
        code, _, mark = line.partition("//")
        if planted and mark.strip():
            code = mark.strip().removeprefix("becomes").removeprefix("out")
        lines.append(code)
    target = f"sm_{arch}{'a' if arch == 90 else ''}"
    header = HEADER.format(target=target, threads=threads)
    text = header + "\n".join(lines) + "\nst.global.b32 [%rd2], %r9;\nret;\n}\n"
    x = torch.arange(threads, dtype=torch.int32)
    o = torch.zeros(threads, dtype=torch.int32)
    exchange.device_caches.clear()
    driver.rewrite_by(lambda _: text)
    exchange[(1,)](x, o, M=64, N=64)  # which has 16 KiB of shared memory
    return o


WARPS = {
    "barrier": (
        "race",
        """
        st.shared.b32 [%r3], %r1;
        bar.sync 0;  // out
        ld.shared.b32 %r9, [%r4];
        """,
    ),
    "barrier before the next write": (
        "race",
        """
        st.shared.b32 [%r3], %r1;
        bar.sync 0;
        ld.shared.b32 %r9, [%r4];
        bar.sync 0;  // out
        st.shared.b32 [%r3], %r9;
        """,
    ),
    "barrier of one warp": (
        "race",
        """
        st.shared.b32 [%r3], %r1;
        bar.sync 0;  // becomes bar.warp.sync -1;
        ld.shared.b32 %r9, [%r4];
        """,
    ),
    "named barrier": (
        "race",
        """
        @%p1 bra FIRST;
        bar.sync 1, 64;
        ld.shared.b32 %r9, [%r4];
        bra END;
        FIRST:
        st.shared.b32 [%r3], %r1;  // becomes bar.arrive 1, 64;
        bar.arrive 1, 64;          // becomes st.shared.b32 [%r3], %r1;
        END:
        """,
    ),
    "another named barrier": (
        "stopped",
        """
        @%p1 bra FIRST;
        bar.sync 1, 64;  // becomes bar.sync 2, 64;
        ld.shared.b32 %r9, [%r4];
        bra END;
        FIRST:
        st.shared.b32 [%r3], %r1;
        bar.arrive 1, 64;
        END:
        """,
    ),
    "number of threads of a barrier": (
        "stopped",
        """
        @%p1 bra FIRST;
        bar.sync 1, 64;
        bra END;
        FIRST:
        bar.sync 1, 64;  // becomes bar.sync 1, 32;
        END:
        """,
    ),
    "barrier that some threads skip": (
        "stopped",
        """
        bar.sync 0;  // becomes @%p2 bar.sync 0;
        """,
    ),
    "exchange in a part of a warp": (
        "stopped",
        """
        setp.lt.u32 %p3, %r1, 64;  // becomes setp.lt.u32 %p3, %r1, 48;
        @%p3 shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;
        """,
    ),
    "read of what was not written": (
        "uninitialised shared memory",
        """
        st.shared.b32 [%r3], %r1;
        bar.sync 0;
        ld.shared.b32 %r9, [%r4];  // becomes ld.shared.b32 %r9, [%r4+512];
        """,
    ),
    "threads that write one word": (
        "conflicting shared writes",
        """
        st.shared.b32 [%r3], %r1;  // becomes st.shared.b32 [buffer], %r1;
        """,
    ),
    "shared memory out of bounds": (
        "shared write out of bounds",
        """
        st.shared.b32 [%r3], %r1;  // becomes st.shared.b32 [%r3+65536], %r1;
        """,
    ),
    "read of shared memory out of bounds": (
        "shared read out of bounds",
        """
        st.shared.b32 [%r3], %r1;
        ld.shared.b32 %r9, [%r3];  // becomes ld.shared.b32 %r9, [%r3+65536];
        """,
    ),
    "alignment of shared memory": (
        "misaligned shared write",
        """
        st.shared.b32 [%r3], %r1;  // becomes st.shared.b32 [%r3+2], %r1;
        """,
    ),
    "global read out of bounds": (
        "global read out of bounds",
        """
        ld.global.b32 %r9, [%rd1];  // becomes ld.global.b32 %r9, [%rd1+4];
        """,
    ),
    "global write out of bounds": (
        "global write out of bounds",
        """
        st.global.b32 [%rd2], %r1;  // becomes st.global.b32 [%rd2+4], %r1;
        """,
    ),
    "alignment of global memory": (
        "misaligned global read",
        """
        ld.global.b32 %r9, [%rd1];  // becomes ld.global.b32 %r9, [%rd1+2];
        """,
    ),
    "alignment of a write to global memory": (
        "misaligned global write",
        """
        st.global.b32 [%rd2], %r1;  // becomes st.global.b32 [%rd2+2], %r1;
        """,
    ),
    "alignment of an atomic": (
        "misaligned global atomic",
        """
        atom.global.add.u32 %r9, [%rd2], 1;  // becomes atom.global.add.u32 %r9, [%rd2+2], 1;
        """,
    ),
    "write to a parameter": (
        "write to read-only memory",
        """
        mov.b64 %rd4, exchange_param_1;
        cvta.param.u64 %rd4, %rd4;
        ld.global.b32 %r9, [%rd4];  // becomes @%p2 st.global.b32 [%rd4], %r1;
        """,
    ),
    "threads that write one word of global memory": (
        "conflicting global writes",
        """
        ld.param.b64 %rd4, [exchange_param_1];
        @%p2 st.global.b32 [%rd4], %r1;  // becomes st.global.b32 [%rd4], %r1;
        """,
    ),
    "atomic out of bounds": (
        "global atomic out of bounds",
        """
        atom.global.add.u32 %r9, [%rd2], 1;  // becomes atom.global.add.u32 %r9, [%rd2+4], 1;
        """,
    ),
    "trap": (
        "stopped",
        """
        setp.gt.u32 %p3, %r1, 64;  // becomes setp.gt.u32 %p3, %r1, 62;
        @%p3 trap;
        """,
    ),
    "copy, not waited for": (
        "asynchronous hazard",
        """
        cp.async.ca.shared.global [%r3], [%rd1], 4;
        cp.async.commit_group;
        cp.async.wait_group 0;  // out
        ld.shared.b32 %r9, [%r3];
        cp.async.wait_group 0;
        """,
    ),
    "copy, the wait for an older one": (
        "asynchronous hazard",
        """
        cp.async.ca.shared.global [%r3], [%rd1], 4;
        cp.async.commit_group;
        cp.async.ca.shared.global [%r3+512], [%rd1], 4;
        cp.async.commit_group;
        cp.async.wait_group 1;  // becomes cp.async.wait_group 2;
        ld.shared.b32 %r9, [%r3];
        cp.async.wait_group 0;
        """,
    ),
    "copy by another warp": (
        "asynchronous hazard",
        """
        cp.async.ca.shared.global [%r3], [%rd1], 4;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;  // out
        ld.shared.b32 %r9, [%r4];
        """,
    ),
    "copy over what another warp reads": (
        "asynchronous hazard",
        """
        st.shared.b32 [%r3], %r1;
        bar.sync 0;
        ld.shared.b32 %r9, [%r4];
        bar.sync 0;  // out
        cp.async.ca.shared.global [%r3], [%rd1], 4;
        cp.async.wait_all;
        """,
    ),
    "copy, under way at the end": (
        "copy not waited for",
        """
        cp.async.ca.shared.global [%r3], [%rd1], 4;
        cp.async.wait_all;  // out
        """,
    ),
    "copy out of bounds": (
        "global read out of bounds",
        """
        add.s64 %rd1, %rd1, 0;  // becomes add.s64 %rd1, %rd1, 4;
        cp.async.ca.shared.global [%r3], [%rd1], 4;
        cp.async.wait_all;
        """,
    ),
}
"""By what the case is about: the kind of finding, and the kernel."""

HANDOVER = """
        @%p2 mbarrier.init.shared.b64 [%r6], 32;
        @%p2 mbarrier.init.shared.b64 [%r6+8], 32;
        bar.sync 0;
        @%p1 bra PRODUCER;
        {consumer}
        bra END;
        PRODUCER:
        {producer}
        END:
"""
_READ = "ld.shared.b32 %r9, [%r4];"
_WAIT = "mbarrier.try_wait.parity.shared.b64 %p3, [%r6+{at}], 0;"


def _handover(consumer: str, producer: str) -> str:
    return HANDOVER.format(consumer=consumer, producer=producer)


_PRODUCER = """
        st.shared.b32 [%r3], %r1;
        mbarrier.arrive.shared.b64 _, [%r6];
        mbarrier.try_wait.parity.shared.b64 %p3, [%r6+8], 0;
        st.shared.b32 [%r3], %r1;
"""
_CONSUMER = """
        mbarrier.try_wait.parity.shared.b64 %p3, [%r6], 0;
        ld.shared.b32 %r9, [%r4];
        mbarrier.arrive.shared.b64 _, [%r6+8];
"""
MBARRIERS = {
    "the wait of the reader": (
        "race",
        _handover(_CONSUMER.replace("0;\n", "0;  // out\n", 1), _PRODUCER),
    ),
    "the wait of the writer": (
        "race",
        _handover(_CONSUMER, _PRODUCER.replace("0;\n", "0;  // out\n", 1)),
    ),
    "the arrival of the reader": (
        "stopped",
        _handover(_CONSUMER.replace("+8];\n", "+8];  // out\n"), _PRODUCER),
    ),
    "the arrival of the writer": (
        "stopped",
        _handover(_CONSUMER, _PRODUCER.replace("[%r6];\n", "[%r6];  // out\n")),
    ),
    "the parity of the reader's wait": (
        "race",
        _handover(
            _CONSUMER.replace(
                "[%r6], 0;\n",
                "[%r6], 0;  // becomes mbarrier.try_wait.parity.shared.b64 %p3, [%r6], 1;\n",
            ),
            _PRODUCER,
        ),
    ),
    "an arrival too early": (
        "race",
        _handover(
            """
        mbarrier.try_wait.parity.shared.b64 %p3, [%r6], 0;
        ld.shared.b32 %r9, [%r4];               // becomes mbarrier.arrive.shared.b64 _, [%r6+8];
        mbarrier.arrive.shared.b64 _, [%r6+8];  // becomes ld.shared.b32 %r9, [%r4];
            """,
            _PRODUCER,
        ),
    ),
    "an arrival too many": (
        "stopped",
        """
        mov.b32 %r7, 128;  // becomes mov.b32 %r7, 1;
        @%p2 mbarrier.init.shared.b64 [%r6], %r7;
        bar.sync 0;
        mbarrier.arrive.shared.b64 _, [%r6], 2;
        """,
    ),
    "a barrier that is not initialised": (
        "stopped",
        """
        @%p2 mbarrier.init.shared.b64 [%r6], 64;  // out
        bar.sync 0;
        mbarrier.arrive.shared.b64 _, [%r6];
        """,
    ),
    "a barrier that is initialised twice": (
        "barrier",
        """
        @%p2 mbarrier.init.shared.b64 [%r6], 64;
        @%p2 mbarrier.inval.shared.b64 [%r6];  // out
        @%p2 mbarrier.init.shared.b64 [%r6], 32;
        """,
    ),
    "a barrier that copies are to complete": (
        "barrier",
        """
        @%p2 mbarrier.init.shared.b64 [%r6], 1;
        mov.b32 %r7, 0;  // becomes mov.b32 %r7, 16;
        @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r6], %r7;
        @%p2 mbarrier.inval.shared.b64 [%r6];
        """,
    ),
}

BASE = 1024  # where shared memory begins
_LEFT = BASE >> 4 | 1024 >> 4 << 16 | 128 >> 4 << 32
_RIGHT = BASE + 2048 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32
_OUTSIDE = BASE + 2**17 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32
PRODUCT = f"""
        st.shared.v4.b32 [%r5], {{%r1, %r1, %r1, %r1}};
        st.shared.v4.b32 [%r5+2048], {{%r1, %r1, %r1, %r1}};
        fence.proxy.async.shared::cta;  [FENCE]
        bar.sync 0;                     [BARRIER]
        mov.b64 %rd4, {_LEFT};          [LEFT]
        mov.b64 %rd5, {_RIGHT};         [RIGHT]
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
            {{%r10, %r11, %r12, %r13}}, %rd4, %rd5, 0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;  [WAIT]
        st.shared.v4.b32 [%r5], {{%r1, %r1, %r1, %r1}};
        mov.b32 %r9, %r10;
        [END]
"""


def _product(**marks: str) -> str:
    text = PRODUCT
    for name in ("FENCE", "BARRIER", "LEFT", "RIGHT", "WAIT", "END"):
        text = text.replace(f"[{name}]", marks.get(name, ""))
    return text


_END = "wgmma.wait_group.sync.aligned 0;"
PRODUCTS = {
    "proxy fence": ("missing proxy fence", _product(FENCE="// out")),
    "barrier before": ("asynchronous hazard", _product(BARRIER="// out")),
    "wait": ("asynchronous hazard", _product(WAIT="// out", END=_END)),
    "wait for an older one": (
        "asynchronous hazard",
        _product(WAIT="// becomes wgmma.wait_group.sync.aligned 1;", END=_END),
    ),
    "wait at the end": ("wgmma not waited for", _product(WAIT="// out")),
    "operand that is not the same in all threads": (
        "stopped",
        _product(LEFT=f"// becomes add.s64 %rd4, %rd3, {_LEFT};"),
    ),
    "operand out of bounds": ("stopped", _product(RIGHT=f"// becomes mov.b64 %rd5, {_OUTSIDE};")),
    "rows of a matrix": (
        "conflicting shared writes",
        """
        mov.u32 %r6, buffer;
        mov.b32 %r7, %r5;  // becomes mov.b32 %r7, %r6;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r1};
        """,
    ),
}
