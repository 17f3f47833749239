"""Each operator in our version and its peers', on the same inputs.

Inputs are channels_last; each contender first converts them to its preferred form, untimed. The
peers: ``cudnn`` is PyTorch's eager call in channels_last, which is cuDNN for convolutions and
ATen's own kernels for pooling; ``cudnn_nchw`` is the same in NCHW; ``inductor`` is the same
compiled with its widest search; ``flaggems`` is FlagGems' Triton kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from kernels import planner
from kernels.device import describe
from kernels.geometry import Conv2dGeometry, Pool2dGeometry
from kernels.ops.tensors import resolve_precision
from kernels.pool.max_pool import argmax_dtype
from kernels.problem import Problem as Planned
from kernels.problem import layout_of

from ._private import inductors_pooling
from .measure import DTYPES
from .suites import DIRECTIONS, NAMED, Block, Case

PEERS = ("cudnn", "cudnn_nchw", "inductor", "flaggems")
Inputs = tuple[Tensor, ...]
Draw = Callable[[tuple[int, ...]], Tensor]


def installed() -> list[str]:
    """The peers that can run here."""
    return [peer for peer in PEERS if peer != "flaggems" or find_spec("flag_gems")]


def _as_they_are(*inputs: Tensor) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Contender:
    """``call(*prepare(*inputs))`` returns the result, alone or as the first of several.

    Only the call is timed.
    """

    call: Callable[..., Any]
    prepare: Callable[..., Inputs] = _as_they_are

    def result(self, inputs: Inputs) -> Tensor:
        """The tensor to compare with the reference's."""
        found = self.call(*self.prepare(*inputs))
        return found if isinstance(found, Tensor) else found[0]

    def nchw(self) -> "Contender":
        """The same on NCHW inputs."""
        prepare = self.prepare
        return replace(self, prepare=lambda *inputs: prepare(*(t.contiguous() for t in inputs)))

    def compiled(self) -> "Contender":
        """The same with Inductor's widest search.

        "max-autotune" itself would put each call in its own CUDA graph; here, as for every
        contender, one graph holds the calls on all sets.
        """
        torch.compiler.reset()  # or the shapes of earlier cases count as recompilations
        call = torch.compile(
            self.call, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True
        )
        return replace(self, call=call)


class Convolution:
    """``x[N,C,H,W] * w[K,C/groups,R,S]``: fprop, dgrad, wgrad, or fprop with bias and ReLU."""

    def __init__(self, op: str, g: Conv2dGeometry, precision: str):
        self.op, self.g, self.precision = op, g, precision
        (top, bottom), (left, right) = g.padding
        self._ours = (g.stride, (top, bottom, left, right), g.dilation, g.groups, precision)
        self._torch = (g.stride, (top, left), g.dilation, g.groups)

    def work(self, itemsize: int) -> tuple[int, int]:
        """Floating-point operations, and the minimum of bytes moved."""
        return self.g.flops, self.g.bytes(itemsize)

    def inputs(self, draw: Draw) -> Inputs:
        """x, w and the bias (conv_relu) or dy (dgrad, wgrad), scaled like unit normals."""
        g = self.g
        x, w = draw(g.x_shape), draw(g.w_shape)
        w *= 1 / sqrt(prod(g.w_shape[1:]))
        last = {"fprop": (), "conv_relu": (draw((g.K,)),)}
        return (x, w, *(last[self.op] if self.op in last else (draw(g.y_shape),)))

    def predicted(self, x: Tensor, w: Tensor, *_: Tensor) -> float | None:
        """The planner's ms for such inputs; None on a CPU."""
        if x.device.type == "cpu":
            return None
        y = torch.empty(self.g.y_shape, dtype=x.dtype, device="meta")
        images = (x, y.to(memory_format=torch.channels_last))
        layout = layout_of(images, () if self.op == "wgrad" else (w,))
        direction = DIRECTIONS[self.op]
        precision = resolve_precision(self.precision, x)
        here = describe(x.device)
        return planner.plan(Planned(direction, self.g, x.dtype, precision, here, layout)).ms

    def ours(self) -> Contender:
        """Our kernel, or wgrad's two passes."""
        ops, numbers, g = torch.ops.triton_cnn, self._ours, self.g
        return Contender(
            {
                "fprop": lambda x, w: ops.conv2d(x, w, None, None, *numbers, False),
                "conv_relu": lambda x, w, b: ops.conv2d(x, w, b, None, *numbers, True),
                "dgrad": lambda x, w, dy: ops.conv2d_dgrad(dy, w, None, (g.H, g.W), *numbers, True),
                "wgrad": lambda x, w, dy: ops.conv2d_wgrad(
                    x, dy, w.shape, w.stride(), *numbers, False
                ),
            }[self.op]
        )

    def eager(self) -> Contender:
        """cuDNN; for conv_relu followed by PyTorch's in-place ReLU."""
        numbers = self._torch

        def backward(mask: list[bool]) -> Callable[..., Tensor]:
            *geometry, groups = numbers
            return lambda x, w, dy: torch.ops.aten.convolution_backward(
                dy, x, w, None, *geometry, False, (0, 0), groups, mask
            )[mask.index(True)]

        return Contender(
            {
                "fprop": lambda x, w: torch.conv2d(x, w, None, *numbers),
                "conv_relu": lambda x, w, b: torch.conv2d(x, w, b, *numbers).relu_(),
                "dgrad": backward([True, False, False]),
                "wgrad": backward([False, True, False]),
            }[self.op]
        )

    def inductor(self) -> Contender:
        """The eager call, compiled."""
        return self.eager().compiled()

    def flaggems(self) -> Contender:
        """FlagGems' forward pass; its backward cannot compute one gradient only."""
        import flag_gems  # pyright: ignore[reportMissingImports]

        conv2d, numbers = flag_gems.ops.conv2d, self._torch
        if self.op == "fprop":
            return Contender(lambda x, w: conv2d(x, w, None, *numbers)).nchw()
        if self.op == "conv_relu":
            return Contender(lambda x, w, b: conv2d(x, w, b, *numbers).relu_()).nchw()
        raise NotImplementedError("FlagGems computes both gradients of a convolution together")


class MaxPool:
    """Max-pooling for training: forward records and backward reads each window's argmax.

    Ours and Inductor's take one byte per output, PyTorch's and FlagGems' an int64 index.
    """

    def __init__(self, op: str, g: Pool2dGeometry):
        self.op, self.g = op, g
        self._window = (g.kernel, g.stride, g.padding, g.dilation)

    def work(self, itemsize: int) -> tuple[int, int]:
        """No products, and the minimum of bytes moved, with the argmax."""
        return 0, self.g.bytes(itemsize, argmax_dtype(self.g).itemsize)

    def inputs(self, draw: Draw) -> Inputs:
        """x, and dy for the backward pass."""
        x = draw(self.g.x_shape)
        return (x,) if self.op == "max_pool" else (x, draw(self.g.y_shape))

    def predicted(self, *_: Tensor) -> None:
        """None: pooling is not planned."""

    def ours(self) -> Contender:
        """One kernel per direction."""
        ops, g = torch.ops.triton_cnn, self.g
        window = (*self._window, g.ceil_mode)

        def forward(x: Tensor) -> Inputs:
            return ops.max_pool2d(x, *window, True, False)

        if self.op == "max_pool":
            return Contender(forward)
        return Contender(
            lambda dy, argmax: ops.max_pool2d_backward(dy, argmax, (g.H, g.W), *window, True),
            lambda x, dy: (dy, forward(x)[1]),
        )

    def eager(self) -> Contender:
        """ATen's pooling, with int64 indices."""
        aten, window = torch.ops.aten, (*self._window, self.g.ceil_mode)
        if self.op == "max_pool":
            return Contender(lambda x: aten.max_pool2d_with_indices(x, *window))
        return Contender(
            lambda dy, x, indices: aten.max_pool2d_with_indices_backward(dy, x, *window, indices),
            lambda x, dy: (dy, x, aten.max_pool2d_with_indices(x, *window)[1]),
        )

    def inductor(self) -> Contender:
        """Inductor's pooling in a training step: a one-byte argmax between the passes."""
        aten, g = torch.ops.aten, self.g
        window = (*self._window, g.ceil_mode)

        pool, places = inductors_pooling(window, (g.H, g.W))

        def backward(dy: Tensor, x: Tensor, argmax: Tensor) -> Tensor:
            return aten.max_pool2d_with_indices_backward(dy, x, *window, places(argmax))

        if self.op == "max_pool":
            return Contender(pool).compiled()
        return Contender(backward, lambda x, dy: (dy, x, pool(x)[1])).compiled()

    def flaggems(self) -> Contender:
        """FlagGems' kernels, which work in NCHW."""
        import flag_gems  # pyright: ignore[reportMissingImports]

        ops, window = flag_gems.ops, (*self._window, self.g.ceil_mode)
        if self.op == "max_pool":
            return Contender(lambda x: ops.max_pool2d_with_indices(x, *window)).nchw()
        return Contender(
            lambda dy, x, indices: ops.max_pool2d_backward(dy, x, indices, *window),
            lambda x, dy: (dy, x, ops.max_pool2d_with_indices(x, *window)[1]),
        ).nchw()


class ConvPool:
    """Convolution, bias, ReLU and max-pooling: forward for training, and backward to bias, weight
    and, except for an image's channels, x.
    """

    def __init__(self, op: str, block: Block, precision: str):
        self.op, self.block = op, block
        g, pool = block
        (top, bottom), (left, right) = g.padding
        self._ours = (g.stride, (top, bottom, left, right), g.dilation, g.groups, precision)
        self._torch = (g.stride, (top, left), g.dilation, g.groups)
        self._window = (pool.kernel, pool.stride, pool.padding)
        self._wanted = (g.C > 4, True, True)

    def work(self, itemsize: int) -> tuple[int, int]:
        """Floating-point operations, and the minimum of bytes: x, w, the result and its argmax,
        once each, and their gradients.
        """
        g, pool = self.block
        ends = itemsize * (prod(g.x_shape) + prod(g.w_shape))
        result = (itemsize + 1) * prod(pool.y_shape)
        if self.op == "conv_relu_max_pool":
            return g.flops, ends + result
        return g.flops * sum(self._wanted[:2]), ends * sum(self._wanted[:2]) + result

    def inputs(self, draw: Draw) -> Inputs:
        """x, w, bias and, for the backward pass, dy."""
        g, pool = self.block
        x, w, bias = draw(g.x_shape), draw(g.w_shape), draw((g.K,))
        w *= 1 / sqrt(prod(g.w_shape[1:]))
        forward = self.op == "conv_relu_max_pool"
        return (x, w, bias) if forward else (x, w, bias, draw(pool.y_shape))

    def predicted(self, *_: Tensor) -> None:
        """None: the model of a fused block predicts an order, not a time."""

    def ours(self) -> Contender:
        """One kernel forward; backward as planned."""
        ops, g, numbers, window = torch.ops.triton_cnn, self.block.conv, self._ours, self._window

        def forward(x: Tensor, w: Tensor, bias: Tensor) -> Inputs:
            return ops.conv2d_relu_max_pool2d(x, w, bias, *numbers, *window, True)

        def backward(dy: Tensor, argmax: Tensor, x: Tensor, w: Tensor) -> Tensor:
            about = (g.H, g.W), w.shape, w.stride(), *numbers, *window, True, self._wanted
            return ops.conv2d_relu_max_pool2d_backward(dy, argmax, x, w, *about)[1]

        if self.op == "conv_relu_max_pool":
            return Contender(forward)
        return Contender(backward, lambda x, w, b, dy: (dy, forward(x, w, b)[1], x, w))

    def eager(self) -> Contender:
        """cuDNN's convolution, ATen's in-place ReLU and its max-pooling with int64 indices."""
        aten, numbers, window = torch.ops.aten, self._torch, (*self._window, (1, 1), False)

        def forward(x: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = torch.conv2d(x, w, bias, *numbers).relu_()
            return *aten.max_pool2d_with_indices(z, *window), z

        def backward(dy: Tensor, indices: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Tensor:
            *geometry, groups = numbers
            dz = aten.max_pool2d_with_indices_backward(dy, z, *window, indices)
            dz = aten.threshold_backward(dz, z, 0)
            return aten.convolution_backward(
                *(dz, x, w, [w.shape[0]], *geometry, False, (0, 0), groups, list(self._wanted))
            )[1]

        if self.op == "conv_relu_max_pool":
            return Contender(forward)
        return Contender(backward, lambda x, w, b, dy: (dy, *forward(x, w, b)[1:], x, w))

    def inductor(self) -> Contender:
        """The eager calls, compiled."""
        return self.eager().compiled()

    def flaggems(self) -> Contender:
        """FlagGems' kernels in sequence, forward; backward as in Convolution."""
        import flag_gems  # pyright: ignore[reportMissingImports]

        ops, numbers, window = flag_gems.ops, self._torch, (*self._window, (1, 1), False)

        def forward(x: Tensor, w: Tensor, bias: Tensor) -> Any:
            z = ops.conv2d(x, w, bias, *numbers).relu_()
            return ops.max_pool2d_with_indices(z, *window)

        if self.op == "conv_relu_max_pool":
            return Contender(forward).nchw()
        raise NotImplementedError("FlagGems computes both gradients of a convolution together")


Problem = Convolution | MaxPool | ConvPool


def problem(case: Case) -> Problem:
    """The operator of a case on its layer."""
    g = case.layer.geometry
    precision = DTYPES[case.dtype].precision
    if isinstance(g, Block):
        return ConvPool(case.op, g, precision)
    if isinstance(g, Pool2dGeometry):
        return MaxPool(case.op, g)
    return Convolution(NAMED.get(case.op, case.op), g, precision)


def contender(name: str, of: Problem) -> Contender:
    """ "ours" or a peer, by name. Raises if a peer does not support it."""
    if name == "cudnn_nchw":
        return of.eager().nchw()
    return of.eager() if name == "cudnn" else getattr(of, name)()
