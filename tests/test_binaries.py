"""How many binaries a network needs, and that a new batch or image size needs none.

Compilations are counted, not made: Triton asks a hook before each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from bench import suites
from kernels import device, library
from kernels.geometry import Conv2dGeometry, output_strides

found = set()

def hook(key, fn, **_):
    found.add((fn.name, key))
    return True  # do not compile

triton.knobs.runtime.jit_cache_hook = hook

def tensor(shape):
    return torch.empty_strided(
        shape, output_strides(shape, True), dtype=torch.bfloat16, device="meta"
    )

def step(N, image):
    '''All convolutions of ResNet-50, forward and both gradients, of N images of image x image.'''
    for layer in suites.layers():
        if layer.suite != "resnet50_v1.5" or not isinstance(layer.geometry, Conv2dGeometry):
            continue
        g = layer.geometry
        size = max(1, g.H * image // 224)
        x, w = tensor((N, g.C, size, size)), tensor(g.w_shape)
        (top, bottom), (left, right) = g.padding
        rest = (g.stride, (top, bottom, left, right), g.dilation, g.groups, None)
        y = library._conv2d(x, w, None, None, *rest, False)
        if g.C > 3:
            library._dgrad(y, w, None, x.shape[2:], *rest, True)
        library._wgrad(x, y, w.shape, w.stride(), *rest, False)

with device.compile_only(GPUTarget("cuda", 90, 32)):
    step(256, 224)
    one_step = len(found)
    found.clear()
    with device.warm_up():
        step(256, 224)
    warm = set(found)
    sizes = [
        (N, image)
        for N in (1, 3, 16, 31, 64, 100, 512)
        for image in (64, 96, 160, 224, 288, 352, 448, 512)
        if N * 64 * (image // 2) ** 2 < 2**30  # offsets of 32 bits
    ]
    found.clear()
    for N, image in sizes:
        step(N, image)
    new = sorted({name for name, key in found - warm})
print(json.dumps({
    "one_step": one_step, "warm": len(warm), "sizes": len(sizes), "seen": len(found), "new": new
}))
"""


@pytest.fixture(scope="module")
def counts() -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_training_step_of_resnet50_needs_few_binaries(counts):
    assert 10 < counts["one_step"] <= 48


def test_a_new_size_needs_no_binary_after_warming_up(counts):
    """Batches of 1 to 512 images of 64 to 512 pixels, in multiples of 32."""
    assert counts["sizes"] > 40
    assert counts["seen"] > counts["one_step"]  # other sizes do take other binaries
    assert counts["new"] == []
