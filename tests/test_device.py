"""Launching: counting, empty grids, threads; and compiling without a device."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from triton.backends.compiler import GPUTarget

from cnn import functional as F
from kernels import device as devices

ROOT = Path(__file__).parents[1]


def test_launches_are_counted_and_an_empty_grid_is_none(device):
    x, w = torch.randn(2, 5, 6, 6, device=device), torch.randn(4, 5, 3, 3, device=device)
    before = devices.launches().get("fprop_kernel", 0)
    F.conv2d(x, w)
    F.conv2d(x[:0], w)
    assert devices.launches()["fprop_kernel"] == before + 1


def test_threads_get_right_numbers(device):
    inputs = [torch.randn(2, 6, 8, 8, dtype=torch.float64) for _ in range(4)]
    w = torch.randn(7, 6, 3, 3, dtype=torch.float64)
    results: dict[int, torch.Tensor] = {}

    def work(i):
        for _ in range(3):
            results[i] = F.conv2d(inputs[i].to(device), w.to(device), padding=1).cpu()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        torch.testing.assert_close(results[i], TF.conv2d(x, w, padding=1), rtol=1e-12, atol=1e-12)


FORKED = """
import os, signal, threading, time
import torch, torch.nn.functional as TF
import cnn.functional as F
from kernels import autotune, device

x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
right = TF.conv2d(x, w)

def child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # what hangs ends
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def convolves():
    return torch.allclose(F.conv2d(x, w), right, atol=1e-5)

def hold(lock, held):
    with lock:
        held.set()
        time.sleep(0.2)

for lock in (device._lock, autotune._scopes_lock, autotune._choosing):
    held = threading.Event()
    thread = threading.Thread(target=hold, args=(lock, held))
    thread.start()
    held.wait()
    assert child(lambda: lock.acquire(timeout=10)) == 0
    thread.join()
    assert lock.acquire(timeout=10)
    lock.release()

stop = threading.Event()
thread = threading.Thread(target=lambda: [convolves() for _ in iter(stop.is_set, True)])
thread.start()
found = [(time.sleep(0.01 * i), child(convolves)) for i in range(6)]
stop.set()
thread.join()
assert [code for _, code in found] == [0] * 6, found
"""


def test_a_child_forked_beside_a_kernel_runs_its_own():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not devices.INTERPRET, reason="the interpreter is off")
def test_the_interpreter_is_usable():
    x, w = torch.randn(64, 8, 8, 8), torch.randn(16, 8, 3, 3)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        F.conv2d(x, w, padding=1)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3, seconds


@pytest.mark.skipif(not devices.INTERPRET, reason="the interpreter is off")
@pytest.mark.parametrize(
    "mode",
    [
        lambda: devices.compile_only(GPUTarget("cuda", 90, 32)),
        lambda: devices.emulate(devices.typical(GPUTarget("cuda", 90, 32))),
    ],
    ids=["compile_only", "emulate"],
)
def test_compiled_code_needs_a_process_without_the_interpreter(mode):
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), mode():
        pass


@pytest.mark.parametrize(
    ("shape", "strides", "pixels", "wide"),
    [
        ((2, 3, 4, 5), (60, 20, 5, 1), 40, False),
        ((2, 1, 1, 1), (2**31, 1, 1, 1), 2, True),
        ((1, 1, 2, 2), (1, 1, 2**31 - 2**20 - 2, 1), 4, False),
        ((1, 1, 2, 2), (1, 1, 2**31 - 2**20 - 1, 1), 4, True),
        ((1, 1, 1, 1), (2**40, 2**40, 2**40, 2**40), 1, False),
        ((2**16, 1, 2**15, 1), (0, 0, 0, 0), 2**31, True),
    ],
)
def test_offsets_are_wide_where_the_largest_offset_or_the_count_of_pixels_is(
    shape, strides, pixels, wide
):
    view = torch.empty_strided(shape, strides, device="meta")
    assert devices.int64_index(pixels, view, None) is wide


# What a call costs, and CUDA graphs.


def test_the_cost_of_a_call_is_measured_without_a_gpu():
    run = subprocess.run(
        [sys.executable, "-m", "bench", "launch", "--rounds", "2", "--calls", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.rsplit(maxsplit=2) for line in run.stdout.splitlines()]
    assert {"conv2d", "backward of conv2d (2)"} <= {line[0] for line in lines}
    assert all(float(microseconds) > 0 and unit == "us" for _, microseconds, unit in lines)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, whose graphs these are")
@pytest.mark.parametrize("channels", [3, 32, 64])
def test_a_cuda_graph_captures_every_operator(channels, device):
    """A step of training, replayed on other numbers."""
    x = torch.randn(4, channels, 16, 16, device=device, dtype=torch.bfloat16)
    w = torch.randn(64, channels, 3, 3, device=device, dtype=torch.bfloat16)
    x, w = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, w))

    def step() -> list[torch.Tensor]:
        y = F.conv2d(x, w, padding=1, activation="relu")
        z, indices = F.max_pool2d(y, 2, return_indices=True)
        up = F.conv_transpose2d(F.max_unpool2d(z, indices, 2), w, padding=1)
        return [up, *torch.autograd.grad(up.square().mean(), (x, w))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, captured, step()))
