"""The acceptance rule itself: what it takes and what it refuses, whatever torch makes of it.

Torch's own result in low precision depends on the processor. None of its faults may let a wrong
result pass, or a right one fail.
"""

import pytest
import torch
import torch.nn.functional as TF
from cases import DEPTHWISE, GROUPED, conv2d, operands, params
from tolerance import assert_close, assert_operator_close, torch_conv2d

LOW = (torch.float16, torch.bfloat16)
FAULTS = {  # of torch's own result, of which half or all elements are faulty
    "nan": lambda t: torch.full_like(t, torch.nan),
    "inf": lambda t: torch.full_like(t, torch.inf),
    "-inf": lambda t: torch.full_like(t, -torch.inf),
    "flushed": torch.zeros_like,
    "rounded sums": lambda t: t * (1 + 2**-6),
}
SHARES = {"half": 2, "all": 1}


def numbers(dtype):
    """(right in float64, the nearest of dtype, others whose errors are large in the mean alone)."""
    top = 2 / torch.finfo(dtype).eps  # numbers of dtype have a distance of 1 below it
    nearest = top - torch.arange(1, 65, dtype=torch.float64).remainder(12) - 1
    if dtype == torch.float32:  # whose sums have an error of their own
        return nearest, nearest.to(dtype), (nearest - 3).to(dtype)
    return nearest - 0.25, nearest.to(dtype), (nearest - 1).to(dtype)


def faulty(t, fault, share):
    """A copy of which every other element, or each, has a fault of torch."""
    t = t.clone()
    t[:: SHARES[share]] = FAULTS[fault](t[:: SHARES[share]])
    return t


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", params((*LOW, torch.float32)))
def test_torchs_faults_neither_pass_nor_fail_a_result(dtype, fault, share):
    right, nearest, far = numbers(dtype)
    torchs, magnitude = faulty(nearest, fault, share), right.abs()
    assert_close(nearest, right, torchs, magnitude)
    for wrong in (torchs, faulty(nearest, fault, "all")):
        with pytest.raises(AssertionError, match=r"differs in|is right"):
            assert_close(wrong, right, torchs, magnitude)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close(far, right, torchs, magnitude)
    one = nearest.clone()
    one[2] *= 1.5
    with pytest.raises(AssertionError, match="is right, an error of"):
        assert_close(one, right, torchs, magnitude)


@pytest.mark.parametrize("dtype", params((*LOW, torch.float32)))
def test_torchs_error_counts_where_torch_is_right(dtype):
    right, nearest, far = numbers(dtype)
    assert_close(far, right, far, right.abs())
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close(far, right, nearest, right.abs())


@pytest.mark.parametrize("dtype", params((*LOW, torch.float32, torch.float64)))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_where_the_oracle_has_it(value, dtype):
    right = torch.linspace(-2, 2, 9, dtype=torch.float64)
    magnitude = right.abs()
    right[4] = value
    ours = right.to(dtype)
    for torchs in (ours, ours.nan_to_num(1, 1, 1), torch.full_like(ours, torch.nan)):
        assert_close(ours, right, torchs, magnitude)
        for place, other in (
            (4, 0),
            (4, torch.inf if value != torch.inf else torch.nan),
            (7, value),
        ):
            wrong = ours.clone()
            wrong[place] = other
            with pytest.raises(AssertionError, match="differs in 1 of 9"):
                assert_close(wrong, right, torchs, magnitude)


def test_what_overflows_is_infinite():
    right = torch.tensor([1.0, 1e5], dtype=torch.float64)
    assert_close(right.half(), right, torch.full((2,), torch.nan).half(), right)
    with pytest.raises(AssertionError, match=r"\+inf differs"):
        assert_close(right.half().clamp(max=65504), right, right.half(), right)


@pytest.mark.parametrize("dtype", params((*LOW, torch.float32, torch.float64)))
def test_an_infinity_that_a_relu_takes_allows_no_error(dtype):
    """Neither of itself nor of the others."""
    right = torch.tensor([0.0, 1.0], dtype=torch.float64)
    magnitude = torch.tensor([torch.inf, 1.0], dtype=torch.float64)
    assert_close(right.to(dtype), right, right.to(dtype), magnitude)
    for wrong in ([1e-3, 1], [0, 1.5]):
        with pytest.raises(AssertionError, match="is right, an error of"):
            assert_close(torch.tensor(wrong, dtype=dtype), right, right.to(dtype), magnitude)
    near, nearest, far = numbers(torch.float32)
    magnitude = near.abs()
    near[0] = nearest[0] = far[0] = 0
    magnitude[0] = torch.inf
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close(far, near, nearest, magnitude)


# As a whole: torch's convolution with the fault of processors that have AMX.


def spread(t):
    """NaN beside what is not finite, else zero."""
    found = TF.max_pool2d((~t.isfinite()).float(), 3, 1, 1) > 0
    return torch.where(found & t.isfinite(), torch.nan, 0.0).to(t.dtype)


def torch_conv2d_with_amx(g, dtype):
    """The operator whose result and gradients in ``dtype`` have NaN where they should not."""

    def operator(x, w, bias, residual):
        y = torch_conv2d(g)(x, w, bias, residual)
        if y.dtype != dtype:
            return y
        for t in (x, w):
            t.register_hook(lambda gradient: gradient + spread(gradient))
        return y + spread(y.detach())

    return operator


@pytest.mark.parametrize(("g", "dtype"), params((GROUPED, DEPTHWISE), LOW))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_operator_beside_torchs_nan(g, dtype, value, device):
    t = operands(g, dtype, device)
    t.x[0, 1, 0, 0] = t.dy[0, 3, 1, 0] = value
    ours, torchs = conv2d(g), torch_conv2d_with_amx(g, dtype)
    names = "x", "w", "bias", "residual"
    y, (dx, dw, *_) = assert_operator_close(ours, torchs, t.inputs, t.dy, names=names)
    assert all((result.isfinite() & spread(result).isnan()).any() for result in (y, dx, dw))

    def shifted(*inputs):
        y = ours(*inputs)
        return y + spread(y.detach()).isnan()

    for wrong, message in ((torchs, "NaN differs"), (shifted, "is right, an error of")):
        with pytest.raises(AssertionError, match=message):
            assert_operator_close(wrong, torchs, t.inputs, t.dy, names=names)


def test_operands_that_tensor_cores_cut_are_right_and_more_is_not():
    """Products of tf32 lose a third of their bound on average, and none of it evens out."""
    random = torch.Generator().manual_seed(0)
    x, w = (torch.rand(4096, generator=random) + 0.5 for _ in range(2))
    cut_x, cut_w = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, w))
    right, eps = x.double() * w.double(), 2**-9
    torchs = right.float()
    assert_close(cut_x * cut_w, right, torchs, right, product_eps=eps)
    for wrong in (right * (1 - 0.9 * eps), right * (1 + 0.9 * eps)):  # within each element's bound
        with pytest.raises(AssertionError, match="RMS error"):
            assert_close(wrong.float(), right, torchs, right, product_eps=eps)
    with pytest.raises(AssertionError, match="is right, an error of"):
        assert_close(cut_x * cut_w, right, torchs, right)
