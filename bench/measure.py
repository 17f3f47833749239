"""Measure times, ceilings and errors, and identify what they were measured on.

Times are in milliseconds, rates in TFLOP/s and GB/s, errors relative to the reference.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).parents[1]
MEASURED = ("kernels", "cnn", "bench/*.py")  # git paths that times depend on
MOST_SETS = 1024
REPLAY_SECONDS = 0.2  # of replays of one graph, within these limits
FEWEST_REPLAYS, MOST_REPLAYS = 10, 200
LAUNCHED_SECONDS = 5.0  # of calls that are launched one by one


class Dtype(NamedTuple):
    """A dtype and its product mode: one product costs ``products`` in the ``ceiling``'s dtype."""

    torch: torch.dtype
    precision: str
    ceiling: str
    products: int = 1


DTYPES = {
    "bf16": Dtype(torch.bfloat16, "ieee", "bf16"),
    "fp16": Dtype(torch.float16, "ieee", "fp16"),
    "fp32": Dtype(torch.float32, "ieee", "fp32"),
    "tf32": Dtype(torch.float32, "tf32", "tf32"),
    "tf32x3": Dtype(torch.float32, "tf32x3", "tf32", products=3),
    "bf16x3": Dtype(torch.float32, "bf16x3", "bf16", products=3),
    "bf16x6": Dtype(torch.float32, "bf16x6", "bf16", products=6),
}


def identity(device: torch.device, unnamed: str) -> dict[str, str]:
    """The facts that two runs must share for their rows to be in one file.

    ``unnamed`` is the commit if git cannot tell it.
    """
    gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": commit().replace("unknown", unnamed),
    }


def commit() -> str:
    """The commit of this tree, with "-dirty" if anything measured has changed since."""
    head = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    return f"{head}-dirty" if changes not in ("", "unknown") else head


def is_same_code(one: str, other: str) -> bool:
    """Whether two commits have the same measured code: results may be committed in between."""
    if one == other:
        return True
    named = one.isalnum() and other.isalnum()  # neither is dirty
    return named and _output("git", "diff", "--stat", one, other, "--", *MEASURED) == ""


def _output(*command: str) -> str:
    """The first line of a program's output; "unknown" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def set_torch(dtype: Dtype, device: torch.device, search: bool = True) -> None:
    """Configure PyTorch in this process for the dtype: TF32 only if requested; cuDNN may search."""
    if device.type == "cpu":
        return
    cudnn: Any = torch.backends.cudnn  # its settings are not in the stubs
    matmul: Any = torch.backends.cuda.matmul
    cudnn.benchmark = search
    tf32 = dtype.precision == "tf32"
    # Inductor reads the older and the newer settings, and either raises if the two differ.
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    for scope in (cudnn, cudnn.conv, cudnn.rnn, matmul):
        scope.fp32_precision = "tf32" if tf32 else "ieee"


def sets_needed(bytes_moved: int, device: torch.device) -> int:
    """The number of sets of buffers, each of ``bytes_moved``, that exceed twice the L2 cache."""
    if device.type == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_SETS, 2 * cache // max(1, bytes_moved) + 1))


def milliseconds(
    call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]], device: torch.device
) -> float:
    """The median time of ``call(*set)``; results are kept, so that each set finds a cold cache.

    On a GPU one CUDA graph holds a call for each set, and its replays are timed.
    """
    if device.type == "cpu":
        return _cpu_milliseconds(call, sets)
    for _ in range(3):
        call(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*each) for each in sets]
    once = _timed(graph.replay)
    replays = int(REPLAY_SECONDS * 1e3 / max(once, 1e-3))
    replays = max(FEWEST_REPLAYS, min(MOST_REPLAYS, replays))
    times = [_timed(graph.replay) for _ in range(replays)]
    del kept
    return statistics.median(times) / len(sets)


def launched_milliseconds(
    call: Callable[..., Any], arguments: tuple[Tensor, ...], device: torch.device
) -> float:
    """The median time of ``call(*arguments)`` launched by Python, ten calls in a row."""
    if device.type == "cpu":
        return _cpu_milliseconds(call, [arguments] * 2)

    def several() -> None:
        for _ in range(10):
            call(*arguments)

    several()
    once = _timed(several)
    rounds = max(3, min(30, int(LAUNCHED_SECONDS * 1e3 / once)))
    return statistics.median(_timed(several) for _ in range(rounds)) / 10


def _timed(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cpu_milliseconds(call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]]) -> float:
    times = []
    for each in sets:
        start = time.perf_counter()
        call(*each)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings(names: Sequence[str], device: torch.device) -> dict[str, float]:
    """The device's measured rates: ``copy_gbs``, read and written, and products by dtype.

    ``names`` are ceilings of DTYPES; bf16 is always among the result.
    """
    size, elements = (8192, 2**28) if device.type == "cuda" else (128, 2**16)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(target.copy_, [(source,)], device)
    found = {"copy_gbs": 2 * source.nbytes / copy / 1e6}
    del source, target
    for name in dict.fromkeys(["bf16", *names]):
        dtype = DTYPES[name]
        set_torch(dtype, device)
        pairs = [tuple(torch.randn(2, size, size, device=device).to(dtype.torch)) for _ in range(2)]
        found[f"{name}_tflops"] = 2 * size**3 / milliseconds(torch.mm, pairs, device) / 1e9
    return found


def roofline_milliseconds(
    flops: int, bytes_moved: int, dtype: Dtype, ceilings: dict[str, float]
) -> float:
    """The shortest time under the ceilings."""
    compute = flops * dtype.products / ceilings[f"{dtype.ceiling}_tflops"] / 1e9
    return max(compute, bytes_moved / ceilings["copy_gbs"] / 1e6)


def relative_rms(found: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference, in the reference's dtype."""
    difference = torch.linalg.vector_norm(found.to(reference.dtype) - reference).item()
    size = torch.linalg.vector_norm(reference).item()
    return difference / size if size else difference
