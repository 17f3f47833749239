"""Check that a result is right, and the same each time.

An operator is called again and again, alone and beside other work, because faults of timing show as
differences between repeats. New memory is NaN in each call: missing writes become visible, and an
earlier call's results cannot hide them. The first result is compared with ``references``' on the
same device in float64, or in float32 for large problems.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from math import ceil, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from kernels import device, planner
from kernels.geometry import Conv2dGeometry, Pool2dGeometry
from kernels.ops.dispatch import operators
from kernels.ops.tensors import resolve_precision
from kernels.problem import Problem, layout_of

from .. import measure, suites
from ..measure import DTYPES
from . import references, tiles
from .items import DIRECTIONS, Check, Forced
from .operands import Call, Source, call_of

REPEATS = 8  # alone, and as many beside other work
_LARGE = 2**31  # multiply-adds; beyond this the reference is float32
_EXACT = ("max_pool2d", "max_pool2d_gather", "max_unpool2d", "max_unpool2d_backward")
_BATCHES = 256  # the most batches of other work beside one call

Results = tuple[Tensor, ...]


# Launching.


def launch(check: Check, call: Call) -> Results:
    """Call the operator once, or the engine with the tile that the check names."""
    if check.forced is not None:
        return (_forced(check, check.forced, call),)
    found = getattr(torch.ops.triton_cnn, check.operator)(*call.tensors, *call.numbers)
    return found if isinstance(found, tuple) else (found,)


def compile_(check: Check) -> None:
    """Launch it in a mode that only compiles."""
    call = call_of(check, torch.device("meta"))
    if check.forced is not None:
        _forced(check, check.forced, call)
    else:
        operators[check.operator].launch(*call.tensors, *call.numbers)


def _forced(check: Check, forced: Forced, call: Call) -> Tensor:
    first, second, *_ = call.tensors
    assert first is not None
    assert second is not None
    assert isinstance(check.geometry, Conv2dGeometry)
    precision = resolve_precision(DTYPES[check.dtype].precision, first)
    direction = DIRECTIONS[check.operator]
    return tiles.launch(forced, direction, check.geometry, precision, first, second)


def chosen(check: Check, call: Call) -> Forced | None:
    """The engine and tile that run a convolution; None for other operators."""
    g, direction = check.geometry, DIRECTIONS.get(check.operator)
    if check.forced is not None or direction is None or not isinstance(g, Conv2dGeometry):
        return check.forced
    first = call.tensors[0]
    assert first is not None
    precision = resolve_precision(DTYPES[check.dtype].precision, first)
    source = Source(check, torch.device("meta"))
    x, w, y = (source.images(shape) for shape in (g.x_shape, g.w_shape, g.y_shape))
    layout = layout_of((x, y), () if direction == "wgrad" else (w,))
    here = device.describe(first.device)
    plan = planner.plan(Problem(direction, g, first.dtype, precision, here, layout))
    return Forced(plan.engine.name, plan.tile)


# References and bounds.


@contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    """A context in which memory allocated by torch holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@lru_cache(maxsize=1)  # tiles of one layer come one after another
def _case(problem: Check, where: torch.device) -> tuple[Call, Results]:
    """A problem's operands and the reference's results."""
    call = call_of(problem, where)
    measure.set_torch(DTYPES["fp32"], where, search=False)
    try:
        return call, _reference(problem, call, torch.float64 if _is_small(problem) else None)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return call, _reference(problem, call, None)


def _is_small(check: Check) -> bool:
    g = check.geometry.conv if isinstance(check.geometry, suites.Block) else check.geometry
    exact = check.dtype == "fp32"
    return exact or isinstance(g, Pool2dGeometry) or g.flops < 2 * _LARGE


def _reference(check: Check, call: Call, dtype: torch.dtype | None) -> Results:
    wider = [
        t if t is None or not t.is_floating_point() else t.to(dtype or torch.float32)
        for t in call.tensors
    ]
    first = call.tensors[0]
    assert first is not None
    if check.operator == "conv2d_fp8":  # ATen's rounds to bfloat16
        x, w, scale, bias, residual = wider
        *geometry, relu = call.numbers
        assert w is not None
        assert scale is not None
        w = w * scale.view(-1, 1, 1, 1)
        return (references.conv2d(x, w, bias, residual, *geometry, None, relu),)
    with first.device:
        found = getattr(references, check.operator)(*wider, *call.numbers)
    return found if isinstance(found, tuple) else (found,)


def bound(check: Check) -> float:
    """The largest relative RMS error that counts as right.

    It is half a unit in the last place, which no rounded result exceeds; plus the rounding of a
    random float32 sum, and the bits that tensor cores cut off in each of theirs; plus 2**-9 for
    products in tf32. In a sum of float8 products Hopper keeps about 14 bits.
    """
    if check.operator in _EXACT:
        return 0.0
    kind = DTYPES[check.dtype]
    terms = _terms(check)
    sums = 2**-24 * sqrt(terms)
    if check.dtype != "fp32":
        sums += 2**-24 * ceil(terms / (8 if check.dtype == "tf32" else 16))
    if check.operator == "conv2d_fp8":
        sums += 2**-13 * sqrt(terms)
    products = 2**-9 if check.dtype == "tf32" else 0.0
    return torch.finfo(kind.torch).eps / 2 + products + sums


def _terms(check: Check) -> int:
    """The number of products, or values, that are added up for a result."""
    g = check.geometry
    if isinstance(g, Pool2dGeometry):
        return g.taps
    if isinstance(g, suites.Block):
        g = g.conv
        if check.operator.endswith("backward"):
            return g.N * g.P * g.Q
    if check.operator in ("conv2d_dgrad",):
        return g.K // g.groups * g.R * g.S
    if check.operator in ("conv2d", "conv2d_fp8", "conv2d_bytes", "conv2d_relu_max_pool2d"):
        return g.C // g.groups * g.R * g.S
    return g.N * g.P * g.Q


def _errors(check: Check, call: Call, found: Results, reference: Results) -> Iterator[float]:
    """The relative RMS error of each result; for integers the share that differs."""
    for ours, right in zip(found, reference[: len(found)], strict=True):
        if right.is_floating_point() and right.numel():
            yield measure.relative_rms(ours, right)
        elif check.operator == "max_pool2d" and right.numel():
            yield (ours.to(torch.int64) != right.to(torch.int64)).double().mean().item()
    if check.operator == "conv2d_relu_max_pool2d":
        yield _winners_error(check, call, found, reference[0])


def _winners_error(check: Check, call: Call, found: Results, right: Tensor) -> float:
    """The error of the map's values where our windows' argmax points, against the right maxima.

    Of two values that rounding makes equal, a window may choose either.
    """
    assert isinstance(check.geometry, suites.Block)
    x, w, bias = (t.to(right.dtype) for t in call.tensors if t is not None)
    geometry, window = call.numbers[:5], call.numbers[5:8]
    with right.device:
        z = references.conv2d(x, w, bias, None, *geometry, True)
        won = references.max_pool2d_gather(z, found[1], *window, (1, 1), False)
    return measure.relative_rms(won, right)


# The check.


@torch.no_grad()
def run(check: Check, where: torch.device) -> dict[str, Any]:
    """The row of one check."""
    call, reference = _case(replace(check, forced=None), where)
    before = Counter(device.launches())
    gpu = where.type == "cuda"
    alone = [_poisoned(check, call) for _ in range(REPEATS if gpu else 2)]
    launched = Counter(device.launches()) - before
    first = alone[0]
    differing = {"alone": _count_differing(first, alone[1:])}
    del alone[1:]
    covered = None
    if gpu:
        busy, covered = _beside_work(lambda: _poisoned(check, call), where)
        differing["busy"] = _count_differing(first, busy)
    errors = list(_errors(check, call, first, reference))
    error, most = max(errors, key=lambda e: e if isfinite(e) else float("inf")), bound(check)
    unwritten = sum(int((~t.isfinite()).sum()) for t in first if t.is_floating_point())
    reasons = [f"{count} repeats differ, {when}" for when, count in differing.items() if count]
    if unwritten:
        reasons.append(f"{unwritten} elements are not finite")
    elif not error <= most:
        reasons.append(f"the error is {error:.3g}, more than {most:.3g}")
    return {
        "ok": not reasons,
        "reason": "; ".join(reasons) or None,
        "error": error if isfinite(error) else None,
        "bound": most,
        "reference": str(reference[0].dtype).removeprefix("torch."),
        "differing": differing,
        "covered": covered,
        "kernels": sorted(launched),
        "chosen": str(plan) if (plan := chosen(check, call)) else None,
    }


def _poisoned(check: Check, call: Call) -> Results:
    with _new_memory_is_nan():
        return launch(check, call)


def _count_differing(first: Results, others: list[Results]) -> int:
    """The number of the others whose bits differ."""
    return sum(
        not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, other, strict=True))
        for other in others
    )


def _bits(t: Tensor) -> Tensor:
    """A tensor's bytes, so that NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.view(integer)


def _beside_work(call: Callable[[], Results], where: torch.device) -> tuple[list[Results], bool]:
    """The results of repeats beside products and copies on a second stream, and whether these
    lasted longer than the repeats.
    """
    work = _work(where)
    side = torch.cuda.Stream(where)
    start, end, side_start, side_end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
    start.record()
    call()
    end.record()
    with torch.cuda.stream(side):
        side_start.record()
        work()
        side_end.record()
    torch.cuda.synchronize()
    one, other = start.elapsed_time(end), side_start.elapsed_time(side_end)
    batches = min(_BATCHES, 2 + int(2 * one / max(other, 1e-3)))
    found = []
    for _ in range(REPEATS):
        with torch.cuda.stream(side):
            for _ in range(batches):
                work()
            side_end.record()
        found.append(call())
    end.record()
    torch.cuda.synchronize()
    return found, end.elapsed_time(side_end) > 0


@lru_cache(maxsize=1)
def _work(where: torch.device) -> Callable[[], None]:
    """A product that leaves some multiprocessors free, and a copy that keeps memory busy."""
    one, other, product = (
        torch.randn(1024, 1024, device=where, dtype=torch.bfloat16) for _ in range(3)
    )
    source = torch.randn(2**24, device=where)
    target = torch.empty_like(source)

    def work() -> None:
        torch.mm(one, other, out=product)
        target.copy_(source)

    return work
