"""Every kernel compiles for GPUs that are not here: no spills in 16 bits, tensor cores at work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
PRODUCTS = {
    "fprop_kernel",
    "wgrad_kernel",
    "few_channel_fprop_kernel",
    "few_channel_wgrad_kernel",
}
OTHERS = {
    "split_sum_kernel",
    "few_channel_dgrad_kernel",
    "depthwise_kernel",
    "depthwise_wgrad_kernel",
    "relu_backward_kernel",
    "max_pool2d_kernel",
    "max_pool2d_backward_kernel",
    "max_pool2d_gather_kernel",
    "max_unpool2d_kernel",
    "max_unpool2d_backward_kernel",
}


@pytest.fixture(scope="module", params=TARGETS)
def codes(request, tmp_path_factory) -> list[dict]:
    """What the planner's choices compile to, in a process of its own without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # A cache of its own: what is read was compiled now, by this version.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, "-m", "bench.compiled", request.param],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_compiles_without_spills_in_16_bits(codes):
    assert {code["kernel"] for code in codes} == PRODUCTS | OTHERS
    assert {code["dtype"] for code in codes} == {"float16", "bfloat16", "float32", "float64"}
    narrow = [code for code in codes if code["dtype"] in ("float16", "bfloat16")]
    assert [code for code in narrow if code["spills"]] == []


def test_products_in_16_bits_use_tensor_cores_in_their_loop(codes):
    products = [
        code
        for code in codes
        if code["kernel"] in PRODUCTS and code["dtype"] in ("float16", "bfloat16")
    ]
    assert {code["kernel"] for code in products} == PRODUCTS
    assert [code for code in products if not code["tensor_core_instructions"]] == []
