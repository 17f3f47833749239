"""Calls that come again: what a recording repeats is what a first call computes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cnn.functional as F
from kernels import autotune, conv_pool, device, ops, planner, replay
from kernels.conv import descriptor_gemm
from kernels.conv.engine import Dgrad, Fprop, PooledConv, Wgrad
from kernels.device import Device, launches
from kernels.geometry import Conv2dGeometry, Pool2dGeometry
from kernels.ops import calls
from kernels.problem import Problem

pytestmark = pytest.mark.skipif(
    not (device.takes_cpu() or torch.cuda.is_available()), reason="calls are kept on kernels alone"
)
HOPPER = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)


def random(*shape: int, last: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu").to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else t


def conv(**arguments: Any) -> Callable[..., Tensor]:
    return lambda x, w, *more: F.conv2d(x, w, *more[:1], **arguments, **dict(_residual(more)))


def _residual(more: tuple) -> list[tuple[str, Tensor]]:
    return [("residual", more[1])] if len(more) > 1 else []


BLOCK = {"padding": 1, "pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
CALLS = {  # a call, and the sizes of its operands
    "product": (conv(padding=1), [(2, 4, 6, 5), (8, 4, 3, 3), (8,)]),
    "strided": (conv(stride=2, groups=2), [(2, 4, 7, 6), (6, 2, 3, 3)]),
    "residual": (
        conv(padding="same", activation="relu"),
        [(2, 4, 6, 5), (8, 4, 3, 3), (8,), (2, 8, 6, 5)],
    ),
    "first": (conv(stride=2, padding=3), [(2, 3, 9, 8), (8, 3, 7, 7), (8,)]),
    "depthwise": (conv(padding=1, groups=4), [(2, 4, 6, 5), (4, 1, 3, 3), (4,)]),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(2, 8, 3, 4), (8, 4, 3, 3)]),
    "pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [(2, 4, 7, 6)]),
    "indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], [(2, 4, 7, 6)]),
    "block": (
        lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, **BLOCK),
        [(2, 4, 6, 5), (8, 4, 3, 3), (8,)],
    ),
    "stem": (
        lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, 2, **BLOCK),
        [(2, 3, 9, 8), (8, 3, 7, 7), (8,)],
    ),
}


def everything(call: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """The result without and with gradients, the gradients, and those of the gradients."""
    with torch.no_grad():
        results = [call(*operands)]
    leaves = [t.detach().requires_grad_() for t in operands]
    y = call(*leaves)
    dy = torch.arange(y.numel(), dtype=y.dtype, device=y.device).view(y.shape).sin()
    grads = torch.autograd.grad(y, leaves, dy.requires_grad_(), create_graph=True)
    seconds = torch.autograd.grad(grads[0], dy, torch.ones_like(grads[0]))
    return [*results, y, *grads, *seconds]


def of_functions(known: dict) -> set[tuple]:
    return {key for key in known if isinstance(key[0], str)}


def of_operators(known: dict) -> set[tuple]:
    return set(known) - of_functions(known)


@pytest.fixture
def forget():
    def clear() -> None:
        calls.known.clear()

    clear()
    yield clear
    clear()


@pytest.mark.parametrize(
    ("name", "last"), [*((name, True) for name in CALLS), ("product", False), ("pool", False)]
)
def test_a_call_that_comes_again_computes_what_a_first_one_does(name, last, forget):
    call, sizes = CALLS[name]
    first, second = ([random(*size, last=last) for size in sizes] for _ in range(2))
    expected = everything(call, second)
    forget()
    everything(call, first)
    known = dict(calls.known)
    assert len(of_functions(known)) == 2, "without and with gradients"
    before = launches()
    again = everything(call, second)
    assert calls.known == known
    assert launches() != before
    for ours, theirs in zip(again, expected, strict=True):
        assert ours.equal(theirs)
        assert ours.stride() == theirs.stride()


def test_operands_may_be_one_tensor_in_one_call_and_two_in_the_next(forget):
    x, other, w = random(2, 4, 5, 6), random(2, 4, 5, 6), random(4, 4, 3, 3)
    call = conv(padding=1)
    expected = call(x, w, None, other)
    forget()
    call(x, w, None, x)
    assert call(x, w, None, other).equal(expected)


def test_strides_alignment_dtype_and_numbers_make_another_call(forget):
    x, w, bias = random(2, 8, 6, 6), random(8, 8, 3, 3), random(8)
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    shifted = memory[1:].view(2, 6, 6, 8).permute(0, 3, 1, 2)
    shifted.copy_(x)
    apart = random(16)[::2]
    apart.copy_(bias)
    expected = F.conv2d(x, w, bias)
    for operands in [(x.contiguous(), w, bias), (shifted, w, bias), (x, w, apart), (x, w, None)]:
        known = of_operators(calls.known)
        y = F.conv2d(*operands)
        assert of_operators(calls.known) != known
        if operands[2] is not None:
            torch.testing.assert_close(y, expected)
    known = of_operators(calls.known)
    F.conv2d(x.half(), w.half(), bias.half())
    F.conv2d(x, w, bias, stride=2)
    assert len(of_operators(calls.known)) == len(known) + 2


@pytest.mark.parametrize("name", ["product", "pool", "block"])
def test_nothing_is_replayed_while_tuning_or_warming_up(name, forget, monkeypatch):
    """Then a call that is known is made in full: it may take another plan, or a family of them."""
    call, sizes = CALLS[name]
    operands = [random(*size) for size in sizes]
    call(*operands)
    assert of_functions(calls.known)
    monkeypatch.setattr(replay.Recording, "__call__", lambda *_: pytest.fail("replayed"))
    for owner, state, value in (
        (autotune, "_on", True),
        (device, "_launching", device._Launching("warm_up")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, state, value)
            patch.setattr(ops.conv2d, "_launch", lambda *_: None)
            patch.setattr(device, "launch", lambda *_, **__: None)
            call(*operands)


def test_the_setting_of_float32_makes_another_call(forget, monkeypatch):
    """Of bytes too, whose weight is float32 where the input is not."""
    x, w, one = random(1, 3, 6, 6), random(4, 3, 3, 3), random(3)
    numbers = (1, 1), (0, 0, 0, 0), (1, 1), 1, None, False
    bytes_ = x.to(torch.uint8)
    keys = set()
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(calls, "resolve_precision", lambda *_, p=precision: p)
        keys.add(calls.operator_key(ops.conv2d.conv2d, (x, w, None, None), numbers))
        operands = bytes_, w, None, one, one
        keys.add(calls.operator_key(ops.conv2d_8bit.conv2d_bytes, operands, numbers))
    assert len(keys) == 4


def test_a_recording_holds_no_tensor(forget):
    x, w = random(2, 4, 5, 6), random(4, 4, 3, 3)
    y = F.conv2d(x, w)
    held = [weakref.ref(t) for t in (x, w, y)]
    del x, w, y
    gc.collect()
    assert calls.known
    assert not any(ref() is not None for ref in held)


def test_what_takes_a_tensor_from_elsewhere_is_not_complete():
    elsewhere = random(4)

    def add(x: Tensor) -> Tensor:
        y = replay.new(x, x.shape, x.stride())
        y.copy_(x + elsewhere)
        return y if x.numel() else elsewhere

    _, recording = replay.record(lambda x: elsewhere, [random(4)])
    assert not recording.complete
    _, recording = replay.record(add, [random(4)])
    assert recording.complete


def test_an_index_is_checked_in_each_call(forget):
    y, indices = F.max_pool2d(random(1, 2, 4, 4), 2, return_indices=True)
    for _ in range(2):
        F.max_unpool2d(y, indices, 2)
    if y.is_cpu:
        with pytest.raises(RuntimeError, match=r"index 99 is outside \[0, 16\)"):
            F.max_unpool2d(y, torch.full_like(indices, 99), 2)


DESCRIBED = Conv2dGeometry.of((2, 64, 16, 16), (64, 64, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1)


@pytest.mark.skipif(not device.takes_cpu(), reason="plans for a GPU that need not be there")
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad", "pooled"])
def test_descriptors_are_made_over_the_new_tensors(direction):
    g, dtype = DESCRIBED, torch.float16
    x_shape, w_shape, y_shape = g.x_shape, g.w_shape, g.y_shape

    def launch(call):
        plan = planner.plan(Problem(call.direction, g, dtype, "ieee", HOPPER, "aligned"))
        assert plan.engine is descriptor_gemm.ENGINE
        plan.engine.launch(call, plan.tile)

    def fprop(x, w):
        y = replay.new(x, y_shape, random(*y_shape).stride())
        launch(Fprop(x, w, y, g))
        return y

    def dgrad(dy, w):
        dx = replay.new(dy, x_shape, random(*x_shape).stride())
        launch(Dgrad(dy, w, dx, g))
        return dx

    def wgrad(x, dy):
        dw, db = replay.new(x, w_shape, random(*w_shape).stride()), replay.new(x, (64,), (1,))
        launch(Wgrad(x, dy, dw, db, g))
        return dw, db

    def pooled(x, w):
        pool = Pool2dGeometry(*y_shape, (2, 2), (2, 2), (0, 0))
        y = replay.new(x, pool.y_shape, random(*pool.y_shape).stride())
        argmax = replay.new(y, y.shape, y.stride(), torch.uint8)
        tile = conv_pool.descriptor_gemm.tiles(
            Problem("fprop", g, dtype, "ieee", HOPPER, "aligned"), pool
        )[0]
        conv_pool.descriptor_gemm.ENGINE.launch(PooledConv(x, w, None, y, argmax, g, pool), tile)
        return y, argmax

    function = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad, "pooled": pooled}[direction]
    left, right = {"dgrad": (y_shape, w_shape), "wgrad": (x_shape, y_shape)}.get(
        direction, (x_shape, w_shape)
    )
    first, second = ([random(*s, dtype=dtype) for s in (left, right)] for _ in range(2))
    expected, _ = replay.record(function, second)
    _, recording = replay.record(function, first)
    assert recording.complete
    results = recording(*second)
    several = isinstance(results, tuple)
    for ours, theirs in zip(
        results if several else [results], expected if several else [expected], strict=True
    ):
        assert ours.equal(theirs)
