"""The reader of fences, on PTX in which waits, fences and products can be counted by hand."""

import pytest

from bench.fences import unfenced

WAIT = "cp.async.wait_group 2;"
FENCE = "fence.proxy.async.shared::cta; mov.b32 %r1, 0;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r2}, %rd1, %rd2, 1, 1, 1, 0, 0;"
BARRIER = "bar.sync 0;"


def loop(*lines: str, name: str = "$L__BB0_2") -> list[str]:
    return [f"{name}:  // a loop", *lines, f"@%p1 bra {name};"]


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (loop(WAIT, BARRIER, FENCE, PRODUCT, PRODUCT), 0),
        (loop(WAIT, BARRIER, PRODUCT, PRODUCT), 2),
        (loop(FENCE, WAIT, BARRIER, PRODUCT), 1),  # fenced before the copies were there
        (loop(WAIT, FENCE, PRODUCT, WAIT, PRODUCT), 1),
        ([WAIT, FENCE, *loop(PRODUCT, WAIT)], 1),  # from the second turn on
        ([WAIT, FENCE, *loop(PRODUCT), WAIT], 0),
        ([WAIT, *loop(*loop(FENCE, PRODUCT, name="$L__BB0_3"), WAIT, PRODUCT)], 1),
        ([*loop(WAIT, BARRIER), FENCE, PRODUCT], 0),
        (loop(BARRIER, PRODUCT), 0),  # nothing is copied
        (["cp.async.wait_all;", "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2;"], 1),
    ],
)
def test_products_after_a_wait_without_a_fence(lines, count):
    assert unfenced("\n".join(lines)) == count
