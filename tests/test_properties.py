"""Whole convolutions drawn by hypothesis, against torch's under the rule of ``tolerance``."""

from cases import (
    DTYPES,
    LAYOUTS,
    conv2d,
    conv_case,
    conv_transpose2d,
    examples,
    operands,
    random,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_operator_close, torch_conv2d, torch_conv_transpose2d


@st.composite
def _axis(draw):
    """(size, kernel, stride, (before, after), dilation) of an axis with at least one place."""
    size, kernel, stride, dilation = (draw(st.integers(1, most)) for most in (9, 4, 4, 3))
    padding = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    short = dilation * (kernel - 1) + 1 - size - sum(padding)
    return size + max(0, short), kernel, stride, padding, dilation


@st.composite
def geometries(draw):
    """Any convolution: few channels, depthwise, grouped and plain ones all come often."""
    sizes, kernel, stride, padding, dilation = zip(draw(_axis()), draw(_axis()), strict=True)
    groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    c = groups * draw(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 17]))
    k = groups * draw(st.sampled_from([1, 2, 3, 7, 16, 18]))
    n = draw(st.integers(1, 3))
    return conv_case(n, c, sizes, k, kernel, stride, sum(padding, ()), dilation, groups)


problems = st.tuples(
    geometries(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.integers(0, 2**20)
)


@examples(100)
@given(problem=problems, relu=st.booleans(), bias=st.booleans(), residual=st.booleans())
def test_conv2d(problem, relu, bias, residual, device):
    g, dtype, layout, seed = problem
    t = operands(g, dtype, device, layout, seed)
    assert_operator_close(
        conv2d(g, relu),
        torch_conv2d(g),
        (t.x, t.w, t.bias if bias else None, t.residual if residual else None),
        t.dy,
        names=("x", "w", "bias", "residual"),
        relu=relu,
    )


@examples(30)
@given(problem=problems, bias=st.booleans())
def test_conv_transpose2d(problem, bias, device):
    g, dtype, layout, seed = problem
    t = operands(g, dtype, device, layout, seed)
    assert_operator_close(
        conv_transpose2d(g),
        torch_conv_transpose2d(g),
        (t.dy, t.w, random((g.C,), dtype, device, seed + 9) if bias else None),
        t.x,
        names=("x", "w", "bias"),
    )
