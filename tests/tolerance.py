"""When a result counts as right: the one acceptance rule of all numeric tests.

The oracle is torch on the CPU in float64. A result passes if

- its NaNs and infinities are where the oracle has them;
- each element is within eps(dtype) / 2 * |y| + ``SUM_ERROR`` * eps(accumulator) * magnitude: one
  rounding of the result, and the roundings of a sum whose magnitude is what the operator gives on
  absolute values, sum |x||w| + |bias| + |residual|;
- its root-mean-square error is at most twice that of torch's own operator of the same dtype on
  the same device. Torch's is not taken for less than a correctly rounded result has, nor, of
  sums, for less than ``LUCK`` allows; nor, if ``product_eps`` is given, for less than a quarter of
  it times the result. In float64 the oracle is that operator, so this is not asked.

Torch's error is a measure only of elements that torch has within the bound. What its CPU kernels
give in low precision depends on the processor: some write NaN where the oracle is finite (those
for AMX, beside an infinity), some round partial sums. In place of such an error stands the least
that torch's is taken for, so no result passes or fails for a fault of torch.

Maxima are not compared with torch's: a correct sum in another order exceeds twice torch's largest
error once in some dozens of random cases, its RMS error does not.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from kernels.geometry import Conv2dGeometry, conv_transpose_output_size

SUM_ERROR = 4.0
LUCK = (1 / 8, 1 / 2)
"""RMS error of a sum of random terms added one by one, in eps * magnitude, and how much smaller
that of one element may be by chance; the latter shrinks with the root of the number of elements.
Without it, 2 % of correct float32 results of random shapes would fail, most of a few elements."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Operator = Callable[..., Tensor]


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def assert_close(
    ours: Tensor,
    reference: Tensor,
    same_dtype: Tensor,
    magnitude: Tensor,
    *,
    name: str = "result",
    product_eps: float = 0.0,
) -> None:
    """Apply the rule to ``ours``; ``same_dtype`` is torch's own result, the others are float64.

    ``product_eps`` is the relative error of one product where operands are rounded before it
    (2**-10 for TF32).
    """
    assert ours.shape == reference.shape, f"{name}: shape {ours.shape}, not {reference.shape}"
    assert ours.dtype == same_dtype.dtype, f"{name}: dtype {ours.dtype}, not {same_dtype.dtype}"
    if ours.numel() == 0:
        return
    dtype = ours.dtype
    eps = torch.finfo(dtype).eps
    sum_eps = max(min(eps, torch.finfo(torch.float32).eps), product_eps)
    smallest = torch.finfo(dtype).smallest_normal * eps  # the spacing of subnormal numbers

    expected = reference.to(dtype).double()
    ours, same_dtype = ours.detach().double().cpu(), same_dtype.detach().double().cpu()
    _assert_same_nonfinite(ours, expected, name)
    finite = expected.isfinite()
    if not finite.any():
        return
    ours, reference, expected = ours[finite], reference[finite], expected[finite]
    same_dtype, magnitude = same_dtype[finite], magnitude[finite]
    # Of a sum that is not finite a ReLU alone makes what is: zero, which has no error.
    magnitude = magnitude.where(magnitude.isfinite(), 0)

    error = (ours - reference).abs()
    bound = eps / 2 * reference.abs() + SUM_ERROR * sum_eps * magnitude + smallest
    worst = (error / bound).argmax()
    assert (error <= bound).all(), (
        f"{name}: {ours[worst]:.9g} where {reference[worst]:.9g} is right, "
        f"an error of {error[worst] / bound[worst]:.3g} bounds"
    )
    if dtype == torch.float64:
        return
    luck = sum_eps * (LUCK[0] + LUCK[1] / error.numel() ** 0.5)
    # Tensor cores cut operands to tf32, so each product is smaller, and in a sum nothing evens out.
    cut = product_eps / 4 * _rms(reference)
    least = _rms(expected - reference) + luck * _rms(magnitude) + cut + smallest
    torch_error = (same_dtype - reference).abs()
    assumed = (expected - reference).abs() + luck * magnitude + cut + smallest
    torch_error = torch.where(torch_error <= bound, torch_error, assumed)  # NaN exceeds any bound
    allowed = 2 * max(_rms(torch_error), least)
    assert _rms(error) <= allowed, (
        f"{name}: RMS error {_rms(error):.3g}, {_rms(error) / allowed:.3g} times what is allowed"
    )


def _assert_same_nonfinite(ours: Tensor, expected: Tensor, name: str) -> None:
    for what, pattern in (
        ("NaN", torch.isnan),
        ("+inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        wrong = (pattern(ours) != pattern(expected)).sum().item()
        assert wrong == 0, f"{name}: {what} differs in {wrong} of {ours.numel()} elements"


@contextmanager
def float32_convolutions(precision: str):
    """Torch's own setting for float32 convolutions on a GPU, within the context."""
    setting = torch.backends.cudnn.conv
    previous = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = previous


def evaluate(
    operator: Operator, inputs: Sequence[Tensor | None], dy: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(result, the gradient of each input that is not None) of one call of an operator."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = operator(*leaves)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return y.detach(), tuple(None if t is None else next(gradients) for t in leaves)


_known: dict[tuple, Any] = {}


def evaluate_torch(
    operator: Operator, inputs: Sequence[Tensor | None], dy: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """``evaluate`` of one of torch's operators below, on contiguous operands. It takes longer than
    ours does, so it is kept for those who ask again: of other layouts, tiles and engines.
    """
    key = operator, *map(_content, (*inputs, dy))
    if key not in _known:
        if len(_known) >= 256:
            _known.clear()
        dense = [None if t is None else t.detach().contiguous() for t in inputs]
        _known[key] = evaluate(operator, dense, dy.detach().contiguous())
    return _known[key]


def _content(t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    return t.shape, t.dtype, t.device, t.detach().double().cpu().numpy().tobytes()


def double(t: Tensor | None) -> Tensor | None:
    """The same values in float64 on the CPU, where the oracle runs."""
    return None if t is None else t.detach().double().cpu()


def assert_operator_close(
    ours: Operator,
    torch_operator: Operator,
    inputs: Sequence[Tensor | None],
    dy: Tensor,
    *,
    names: Sequence[str],
    relu: bool = False,
    product_eps: float = 0.0,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Apply the rule to an operator's result and to the gradient of each of its inputs.

    ``ours`` includes the ReLU if there is one, ``torch_operator`` does not. As an element may lie
    on the other side of zero after rounding, the gradients of the oracle take the mask of our
    result, which by then has passed. Returns our result and gradients, for further checks.
    """
    y, gradients = evaluate(ours, inputs, dy)
    dz = torch.where(y <= 0, 0, dy) if relu else dy
    with float32_convolutions("ieee"):
        torch_y, torch_gradients = evaluate_torch(torch_operator, inputs, dz)
    exact = [double(t) for t in inputs]
    exact_y, exact_gradients = evaluate_torch(torch_operator, exact, dz.double().cpu())
    absolute = [None if t is None else t.abs() for t in exact]
    bound_y, bound_gradients = evaluate_torch(torch_operator, absolute, dz.double().cpu().abs())
    if relu:
        torch_y, exact_y = torch_y.relu(), exact_y.relu()
    assert_close(y, exact_y, torch_y, bound_y, name="y", product_eps=product_eps)
    for name, gradient, right, same_dtype, bound in zip(
        names, gradients, exact_gradients, torch_gradients, bound_gradients, strict=True
    ):
        if gradient is not None:
            assert right is not None
            assert same_dtype is not None
            assert bound is not None
            assert_close(
                gradient, right, same_dtype, bound, name=f"d{name}", product_eps=product_eps
            )
    return y, gradients


@cache
def torch_conv2d(g: Conv2dGeometry) -> Operator:
    """Torch's own convolution of geometry g, called as (x, w, bias, residual)."""
    (top, bottom), (left, right) = g.padding

    def conv2d(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        padding: tuple[int, int] = (top, left)
        if (top, left) != (bottom, right):
            x, padding = TF.pad(x, (left, right, top, bottom)), (0, 0)
        y = TF.conv2d(x, w, bias, g.stride, padding, g.dilation, g.groups)
        return y if residual is None else y + residual

    return conv2d


@cache
def torch_conv_transpose2d(g: Conv2dGeometry) -> Operator:
    """Torch's own transposed convolution, called as (x, w, bias): x like g's y, result like g's x.

    Padding that differs from side to side is cut off a result without padding.
    """
    (top, bottom), (left, right) = g.padding
    rest = tuple(
        size - conv_transpose_output_size(*axis, output_padding=0)
        for size, *axis in zip(
            (g.H, g.W), (g.P, g.Q), g.kernel, g.stride, g.padding, g.dilation, strict=True
        )
    )

    def conv_transpose2d(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if (top, left) == (bottom, right):
            return TF.conv_transpose2d(
                x, w, bias, g.stride, (top, left), rest, g.groups, g.dilation
            )
        y = TF.conv_transpose2d(x, w, None, g.stride, 0, 0, g.groups, g.dilation)
        y = TF.pad(y, (-left, rest[1] - right, -top, rest[0] - bottom))
        return y if bias is None else y + bias[:, None, None]

    return conv_transpose2d
