"""Measures the planner's best few plans if that is asked for, and remembers which was quickest.

Off by default: ``enabled(True)`` or the environment variable TRITON_CNN_AUTOTUNE=1, read at import,
turns it on. The operators then ask ``choose`` in the planner's place. A plan must give the right
result before it is timed, on random operands that lie as the caller's do. The winner holds for a
class of geometries, in this process and on disk (``tuning_cache``). Nothing else times; times are
in ms.

Tuning does not touch the order of summation: in fprop and dgrad only plans that add in the same
order as the planner's first choice compete, and that order follows from channels, taps, dtype and
layout. So whatever wins, and for whichever batch it won, an image's result keeps its bits.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from math import inf, prod, sqrt
from operator import add
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import OutOfResources
from triton.testing import do_bench

from . import planner
from ._private import FakeTensor, PTXASError
from .conv.engine import Plan
from .device import fork_safe_lock, is_emulated
from .geometry import Direction, largest_offset
from .problem import Problem
from .tuning_cache import Record, Store, cache_folder, versions_of

FEW = 8
"""How many plans compete: about a second on a GPU, once for each class."""

Operands = Sequence[Tensor | None]
Results = tuple[Tensor, ...]


# Whether it is on. One setting for the whole process and no context variable, as autograd runs a
# GPU's backward pass in threads of its own, which see none of the caller's.
_scopes: dict[object, bool] = {None: os.environ.get("TRITON_CNN_AUTOTUNE") == "1"}
_scopes_lock = fork_safe_lock()
_on = _scopes[None]


def is_enabled() -> bool:
    """Whether operators are to ask ``choose`` for their plans."""
    return _on


@contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """Turn tuning on or off within the context, in all threads.

    Of contexts that are open at once, in whichever threads, the last to be entered counts.
    """
    scope = object()
    _set(scope, on)
    try:
        yield
    finally:
        _set(scope, None)


def _set(scope: object, on: bool | None) -> None:
    global _on
    with _scopes_lock:
        if on is None:
            del _scopes[scope]
        else:
            _scopes[scope] = on
        _on = next(reversed(_scopes.values()))


# What is tuned.


def class_of(problem: Problem, variant: str = "") -> str:
    """The class of problems that one winner serves; ``variant`` is what else makes other binaries.

    Channels, taps and the like count as they are. The batch is rounded up to a power of two,
    height and width to three significant bits: a new size is seldom a new class, while 7, 14,
    28, 56, 112 and 224, where boxes of other shapes come out even, are never in one.
    """
    direction, g, dtype, precision, _, layout, _ = problem
    sizes = f"n{_round_up(g.N, 1)} c{g.C} h{_round_up(g.H, 3)} w{_round_up(g.W, 3)} k{g.K}"
    window = f"{g.R}x{g.S} stride {g.stride} padding {g.padding} dilation {g.dilation}"
    kind = f"{str(dtype).split('.')[-1]} {precision} {layout}"
    words = f"{direction} {sizes} {window} groups {g.groups} {kind} {variant}"
    return words.strip()


def _round_up(size: int, bits: int) -> int:
    """The least number that is not below ``size`` and has at most ``bits`` significant bits."""
    step = 1 << max(0, (size - 1).bit_length() - bits)
    return -(-size // step) * step


def _competitors(direction: Direction, candidates: list[Plan]) -> list[Plan]:
    """Those that add in the order of the first; wgrad sums over the batch and is free in it."""
    order = _order(direction, candidates[0])
    return [plan for plan in candidates if _order(direction, plan) == order]


def _order(direction: Direction, plan: Plan) -> tuple:
    tile = plan.tile
    if direction == "wgrad":
        return (plan.engine,)
    return plan.engine, tile.depth, tile.packed, tile.split_k


def _record(plan: Plan) -> Record:
    return json.loads(json.dumps({"engine": plan.engine.name, **asdict(plan.tile)}))


def _recall(records: list[Record], plans: list[Plan]) -> Plan | None:
    """The first of the records that is among the plans, if need be with its own split_k.

    Splits follow the exact size, and are no part of a binary.
    """
    for record in records:
        for form in (dict, _without_splits):
            for plan in plans:
                if form(_record(plan)) == form(record):
                    return plan
    return None


def _without_splits(record: Record) -> Record:
    return {**record, "split_k": None}


# What is right.


class Expected(NamedTuple):
    """Rows of a result as they should be, and the magnitudes of the sums that give them."""

    values: Tensor
    magnitude: Tensor


_BATCHED: dict[Direction, tuple[int, ...]] = {"fprop": (0, 3), "dgrad": (0,), "wgrad": (0, 1)}
"""Which operands have an axis of images: of (x, w, bias, residual), (dy, w, bias) and (x, dy)."""

_PART = 1 << 27  # elements that the reference widens to float64 at a time: 1 GiB


def _random_like(t: Tensor, coarse: bool, generator: torch.Generator) -> Tensor:
    """Normally distributed values with the shape, strides, dtype and alignment of ``t``."""
    start = t.data_ptr() % 16 // t.element_size()
    size = start + largest_offset(t.shape, t.stride()) + 1
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    values = torch.randn(size, generator=generator, dtype=wide, device=t.device)
    if coarse:
        values = values.bfloat16()
    return values.to(t.dtype).as_strided(t.shape, t.stride(), start)


def random_operands(problem: Problem, tensors: Operands) -> Operands:
    """Operands like the caller's, whose NaNs and infinities would hide errors; no RNG is advanced.

    In modes that round float32 operands, or split them, the values have the eight significant bits
    of bfloat16: their products are exact in each mode, which leaves the errors of the sum.
    """
    first = tensors[0]
    assert first is not None
    generator = torch.Generator(first.device).manual_seed(0)
    coarse = problem.dtype == torch.float32 and problem.precision != "ieee"
    return [None if t is None else _random_like(t, coarse, generator) for t in tensors]


def expected_results(
    problem: Problem, operands: Operands, reference: Callable[..., Results]
) -> list[list[Expected]]:
    """For each result its parts, one after the other along the first axis.

    Values come from the reference in float64, magnitudes from the reference on absolute values. A
    few images are taken at a time, so that float64 costs little memory; what is kept is float32
    if that is finer than the results.
    """
    g, direction = problem.g, problem.direction
    images = max(1, _PART // (prod(g.x_shape[1:]) + prod(g.y_shape[1:])))
    keep = torch.float32 if problem.dtype.itemsize <= 2 else torch.float64
    parts: list[list[Expected]] = []
    for start in range(0, g.N, images):
        part = [
            t[start : start + images] if t is not None and i in _BATCHED[direction] else t
            for i, t in enumerate(operands)
        ]
        wide = [None if t is None else t.double() for t in part]
        values = reference(*wide)
        magnitudes = reference(*(None if t is None else t.abs() for t in wide))
        if direction != "wgrad":
            values, magnitudes = ([t.to(keep) for t in ts] for ts in (values, magnitudes))
        parts.append([Expected(*pair) for pair in zip(values, magnitudes, strict=True)])
    results = [list(result) for result in zip(*parts, strict=True)]
    if direction == "wgrad":
        sums = [[reduce(add, ts) for ts in zip(*result, strict=True)] for result in results]
        return [[Expected(values, magnitude)] for values, magnitude in sums]
    return results


def _sum_error(problem: Problem) -> float:
    """Error that a right sum may have, relative to its magnitude.

    A few roundings, and a drift: tensor cores cut a sum's low bits off after each product, so the
    error of a random sum grows with the power 1.5 of its depth, its magnitude only linearly.
    """
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    eps = torch.finfo(wide).eps
    if problem.dtype.itemsize == 1:
        eps = 2.0**-13  # Hopper's tensor cores keep about 14 bits of sums of 8-bit products
    return (4 + sqrt(problem.g.gemm(problem.direction).depth) / 8) * eps


def worst_error(results: Results, expected: list[list[Expected]], sum_error: float) -> float:
    """The largest error of an element, in units of what it may be; not a number counts as infinite.

    An element may be off by the rounding of the result and by ``sum_error`` times the magnitude.
    """
    worst = 0.0
    for result, parts in zip(results, expected, strict=True):
        limits = torch.finfo(result.dtype)
        pieces = result.split([len(part.values) for part in parts])
        for piece, (values, magnitude) in zip(pieces, parts, strict=True):
            if piece.shape != values.shape:
                return inf
            if piece.numel() == 0:
                continue
            bound = limits.eps / 2 * values.abs() + sum_error * magnitude
            bound += limits.smallest_normal * limits.eps  # the spacing of subnormal numbers
            error = (piece.to(values.dtype) - values).abs_() / bound
            error.masked_fill_(piece == values.to(piece.dtype), 0)  # infinities among them
            worst = max(worst, error.nan_to_num_(nan=inf, posinf=inf).max().item())
    return worst


def measure(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call in ms: on a GPU with cold caches, in the interpreter of three calls."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            ms: Any = do_bench(call, warmup=20, rep=50, return_mode="median")
            return ms
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)


# Choosing.


@contextmanager
def _no_cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose without trying, which for one float64 reference would take seconds."""
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous


_choosing = fork_safe_lock()  # one class at a time


class Tuner:
    """Chooses plans by measuring them, once for each class of problems.

    ``measure`` and ``candidates`` can be given for tests, ``folder`` is where winners are kept.
    """

    def __init__(
        self,
        folder: Path | None = None,
        measure: Callable[[Callable[[], Any], torch.device], float] = measure,
        candidates: Callable[[Problem], list[Plan]] = planner.candidates,
    ):
        self._folder, self._measure, self._candidates = folder, measure, candidates
        self._plans: dict[tuple[Problem, str, torch.device], Plan] = {}
        self._stores: dict[torch.device, Store] = {}

    def choose(
        self,
        problem: Problem,
        tensors: Operands,
        run: Callable[..., Results],
        reference: Callable[..., Results],
        variant: str = "",
    ) -> Plan:
        """The quickest right plan of the planner's best few, from memory, disk or measurement.

        ``tensors`` are the operator's operands: x, w, bias, residual for fprop; dy, w, bias for
        dgrad; x, dy for wgrad. ``run(plan, *operands)`` executes the operator with a plan and
        returns fresh results, ``reference(*operands)`` gives the same results independently, for
        operands in float64 and for any part of the batch. ``variant`` names what else makes other
        binaries: fused operands, a ReLU.

        Raises RuntimeError if no plan is right. During a CUDA graph's capture, when nothing can be
        measured, an unknown class takes the planner's own choice; so it does if there is no memory
        to measure in, at the price of a warning, and if nothing is launched or computed.
        """
        where = tensors[0].device  # type: ignore[union-attr]  the first operand is never None
        plan = self._plans.get((problem, variant, where))
        if plan is not None:
            return plan
        if not _is_computed(problem, tensors):
            return planner.plan(problem)
        with _choosing:
            plan = self._choose(problem, variant, where, tensors, run, reference)
            if plan is None:
                return planner.plan(problem)
            if len(self._plans) >= 4096:
                self._plans.clear()
            self._plans[problem, variant, where] = plan
        return plan

    def _choose(self, problem, variant, where, tensors, run, reference) -> Plan | None:
        """From the store, else by measuring; None during a capture."""
        plans = _competitors(problem.direction, self._candidates(problem))
        store = self._store(problem, where)
        name = class_of(problem, variant)
        plan = _recall(store.get(name), plans)
        if plan is not None:
            return plan
        if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        try:
            with torch.no_grad(), _no_cudnn_benchmark():
                plan = self._quickest(problem, where, plans[:FEW], tensors, run, reference)
        except torch.OutOfMemoryError:
            reason = f"no memory to tune {name} in: the plan is the planner's"
            warnings.warn(reason, RuntimeWarning, stacklevel=3)
            return planner.plan(problem)
        store.put(name, _record(plan))
        return plan

    def _quickest(self, problem, where, plans, tensors, run, reference) -> Plan:
        operands = random_operands(problem, tensors)
        expected = expected_results(problem, operands, reference)
        right, wrong = [], []
        for plan in plans:
            try:
                worst = worst_error(run(plan, *operands), expected, _sum_error(problem))
                reason = f"its error is {worst:.3g} times what rounding explains"
            except (OutOfResources, PTXASError) as error:
                worst, reason = inf, str(error)
            if worst <= 1:
                right.append(plan)
            else:
                wrong.append(f"{_record(plan)}: {reason}")
        message = f"rejected for {problem.direction} of {problem.g} ({class_of(problem)}): {wrong}"
        if not right:
            raise RuntimeError(f"no plan is right; {message}")
        if wrong:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        if len(right) == 1:
            return right[0]
        return min(right, key=lambda plan: self._measure(lambda: run(plan, *operands), where))

    def _store(self, problem: Problem, where: torch.device) -> Store:
        if where not in self._stores:
            self._stores[where] = Store(
                self._folder or cache_folder(), versions_of(where, problem.device)
            )
        return self._stores[where]


def _is_computed(problem: Problem, tensors: Operands) -> bool:
    """Whether launches compute something: not on fake tensors, empty ones, or to compile only."""
    real = "cpu" if problem.device.backend == "interpreter" or is_emulated() else "cuda"
    return all(
        t is None or (t.device.type == real and t.numel() > 0 and not isinstance(t, FakeTensor))
        for t in tensors
    )


choose = Tuner().choose
