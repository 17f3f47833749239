"""``torch.compile(model, backend="triton_cnn")``: what is fused, what is not, and that both agree
with eager mode.

Most tests run the rewritten graph through AOTAutograd and no further, as Inductor takes its time.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

import cnn.functional as F
from cnn import compile_backend
from cnn.compile_backend import compile_report, fuse

FUSED = "conv2d + relu"
POOLED = "conv2d + relu + max_pool2d"
SUMMED = "conv2d + residual + relu"
LEFT = "left to Inductor"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rewritten(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    return aot_eager(fuse(gm), inputs)


rewritten.reset = compile_backend.triton_cnn.reset


def became() -> list[str]:
    return [row.became for row in compile_report().rows]


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of a convolution that keeps the image's size, and a residual."""
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 6, 6), "r": (2, 4, 6, 6), "w": (4, 3, 3, 3), "b": (4,)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def run(function: Callable[..., Any], wanted: str, **inputs: Tensor) -> dict[str, Any]:
    """Results, gradients of the inputs in ``wanted``, and the inputs as they are afterwards."""
    given = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in inputs.items()}
    results = pytree.tree_leaves(function(**given))
    differentiable = [y for y in results if y.requires_grad]
    if differentiable:
        weights = [torch.linspace(0.5, 1.5, y.numel()).to(y).view(y.shape) for y in differentiable]
        torch.autograd.backward(differentiable, weights)
    gradients = {f"d{name}": given[name].grad for name in wanted}
    return {f"result{i}": y for i, y in enumerate(results)} | gradients | given


def check(function: Callable[..., Any], wanted: str = "xrwb", **inputs: Tensor) -> list[str]:
    """Compare with eager mode; what became of the function's convolutions and poolings."""
    inputs = inputs or operands()
    expected = run(function, wanted, **inputs)
    got = run(torch.compile(function, backend=rewritten, fullgraph=True), wanted, **inputs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)
            assert got[name].stride() == value.stride(), name
            assert got[name].requires_grad == value.requires_grad, name
    return became()


def conv(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return TF.conv2d(x, w, b, padding=1)


# What is fused.

FUSING: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "alone": (lambda x, r, w, b: conv(x, w, b), ["conv2d"]),
    "relu": (lambda x, r, w, b: TF.relu(conv(x, w, b)), [FUSED]),
    "relu without bias": (lambda x, r, w, b: torch.relu(conv(x, w)), [FUSED]),
    "relu method": (lambda x, r, w, b: conv(x, w, b).relu(), [FUSED]),
    "relu in place": (lambda x, r, w, b: conv(x, w, b).relu_(), [FUSED]),
    "relu told to": (lambda x, r, w, b: TF.relu(conv(x, w, b), True), [FUSED]),
    "relu by keyword": (lambda x, r, w, b: TF.relu(input=conv(x, w, b), inplace=True), [FUSED]),
    "torch.relu_": (lambda x, r, w, b: torch.relu_(conv(x, w, b)), [FUSED]),
    "sum": (lambda x, r, w, b: conv(x, w, b) + r, ["conv2d + residual"]),
    "sum and relu": (lambda x, r, w, b: TF.relu(conv(x, w, b) + r), [SUMMED]),
    "sum the other way": (lambda x, r, w, b: TF.relu(r + conv(x, w, b)), [SUMMED]),
    "sum in place": (lambda x, r, w, b: conv(x, w, b).add_(r).relu_(), [SUMMED]),
    "torch.add": (lambda x, r, w, b: torch.add(conv(x, w, b), r, alpha=1).relu(), [SUMMED]),
    "add by keyword": (lambda x, r, w, b: r.add(other=conv(x, w, b)).relu(), [SUMMED]),
    "two convolutions": (
        lambda x, r, w, b: TF.relu(conv(x, w, b) + conv(x, w)),
        [SUMMED, "conv2d"],
    ),
    "pool": (lambda x, r, w, b: TF.max_pool2d(conv(x, w, b).relu(), 2), [POOLED]),
    "pool by keyword": (
        lambda x, r, w, b: TF.max_pool2d(input=conv(x, w, b).relu(), padding=1, kernel_size=(3, 2)),
        [POOLED],
    ),
    "torch.max_pool2d": (
        lambda x, r, w, b: torch.max_pool2d(conv(x, w, b).relu(), 3, (2, 1), 1),
        [POOLED],
    ),
    "pool alone": (lambda x, r, w, b: TF.max_pool2d(x, 3, 1, 1, 2, True), ["max_pool2d"]),
    "indices": (
        lambda x, r, w, b: TF.max_pool2d(conv(x, w, b).relu(), 2, return_indices=True),
        [FUSED, "max_pool2d"],
    ),
    "with indices": (
        lambda x, r, w, b: TF.max_pool2d_with_indices(conv(x, w, b).relu(), 2),
        [FUSED, "max_pool2d"],
    ),
    "a sum is not pooled": (
        lambda x, r, w, b: TF.max_pool2d(TF.relu(conv(x, w, b) + r), 2),
        [SUMMED, "max_pool2d"],
    ),
    "transpose": (
        lambda x, r, w, b: TF.conv_transpose2d(r, w, None, 2, 1, 1, 1, (2, 1)),
        ["conv_transpose2d"],
    ),
    "transpose with groups": (
        lambda x, r, w, b: TF.conv_transpose2d(r, w[:, :1], b, stride=(3, 2), groups=4),
        ["conv_transpose2d"],
    ),
    "same": (lambda x, r, w, b: TF.conv2d(x, w, b, 1, "same", 2).relu(), [FUSED]),
    "valid": (lambda x, r, w, b: torch.conv2d(x, w, b, (2, 1), "valid").relu(), [FUSED]),
    "groups": (
        lambda x, r, w, b: TF.conv2d(r, w[:, :2], bias=b, padding=(2, 1), groups=2).relu(),
        [FUSED],
    ),
    "cnn's": (lambda x, r, w, b: F.max_pool2d(TF.relu(F.conv2d(x, w, b)), 2), [POOLED]),
    "cnn's and torch's": (
        lambda x, r, w, b: TF.max_pool2d(F.conv2d(x, w, b, padding=1, residual=r).relu(), 2),
        [SUMMED, "max_pool2d"],
    ),
    "cnn's activation": (
        lambda x, r, w, b: TF.max_pool2d(F.conv2d(x, w, b, activation="relu"), 2),
        [POOLED],
    ),
    "cnn's fused": (
        lambda x, r, w, b: F.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=2),
        [POOLED],
    ),
    "what is between changes nothing of it": (
        lambda x, r, w, b: _with_calm_neighbors(x, r, w, b),
        [SUMMED],
    ),
    "checkpoint": (
        lambda x, r, w, b: checkpoint.checkpoint(
            lambda x: TF.max_pool2d(conv(x, w, b).relu(), 2), x * 2, use_reentrant=False
        ),
        [POOLED],
    ),
    "no_grad": (lambda x, r, w, b: _without_gradient(x, w, b), [POOLED]),
}


def _with_calm_neighbors(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = conv(x, w, b)
    other = TF.dropout(r, 0.0, True, False).clone()
    other[0] = 1
    other += 1
    TF.hardtanh(other, inplace=True)
    running = torch.zeros_like(b)
    other = TF.batch_norm(other, running, running + 1, training=True)
    return TF.relu(y + other)


def _without_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        return TF.max_pool2d(conv(x, w, b).relu(), 2)


@pytest.mark.parametrize("name", FUSING)
def test_fused(name):
    function, expected = FUSING[name]
    assert sorted(check(function)) == sorted(expected)


# What is not: each of these gives something else when its rule is left out.


def returned_too(x, r, w, b):
    y = conv(x, w, b)
    return y.relu(), y


def read_twice(x, r, w, b):
    y = conv(x, w, b)
    return y.relu() * y.sigmoid()


def in_place_and_read(x, r, w, b):
    y = conv(x, w, b)
    y.relu_()
    return y


def view_read(x, r, w, b):
    y = conv(x, w, b)
    view = y.view(-1)
    y.relu_()
    return view


def input_changed(x, r, w, b):
    y = conv(x, w, b)
    x.add_(1)
    return y.relu()


def view_changed(x, r, w, b):
    x = x.clone()
    view = x[0].view(-1)
    y = conv(x, w, b)
    view.mul_(2)
    return y.relu()


def item_set(x, r, w, b):
    x = x.clone()
    y = conv(x, w, b)
    x[:, 1] = 5
    return y.relu()


def changed_by_out(x, r, w, b):
    y = conv(x, w, b)
    torch.mul(x, 2, out=x)
    return y.relu()


def changed_by_inplace(x, r, w, b):
    y = conv(x, w, b)
    TF.leaky_relu(x, 0.5, True)
    return y.relu()


def changed_by_operator(x, r, w, b):
    y = conv(x, w, b)
    x -= 3
    return y.relu()


def changed_by_statistics(x, r, w, b):
    y = conv(x, w, b)
    TF.batch_norm(r, b, b + 1, training=True)
    return y.relu()


def changed_by_aten(x, r, w, b):
    y = conv(x, w, b)
    torch.ops.aten.mul_.Scalar(x, 2)
    return y.relu()


def weight_changed(x, r, w, b):
    y = conv(x, w, b)
    w.mul_(2)
    return y.relu()


def residual_changed(x, r, w, b):
    y = conv(x, w, b) + r
    r.mul_(2)
    return y.relu()


def sum_before_change(x, r, w, b):
    y = conv(x, w, b)
    x.mul_(2)
    return (y + r).relu()


def grad_disabled_before(x, r, w, b):
    with torch.no_grad():
        y = conv(x, w, b)
    return (y.relu() * r).sum()


def grad_disabled_after(x, r, w, b):
    y = conv(x, w, b)
    with torch.no_grad():
        z = y.relu()
    return z * r


def scaled(x, r, w, b):
    return torch.add(conv(x, w, b), r, alpha=2).relu()


def scaled_the_other_way(x, r, w, b):
    return r.add(conv(x, w, b), alpha=2).relu()


def broadcast(x, r, w, b):
    return (conv(x, w, b) + r[:, :, :1]).relu()


def broadcasting(x, r, w, b):
    return (conv(x[:1], w, b) + r).relu()


def number_added(x, r, w, b):
    return (conv(x, w, b) + 1).relu()


def promoting(x, r, w, b):
    return (conv(x.round().float(), w.round().float()) + r).relu()


def promoted(x, r, w, b):
    return (conv(x, w, b) + r.float()).relu()


def added_to_itself(x, r, w, b):
    y = conv(x, w, b)
    return (y + y).relu()


def written_into_the_other(x, r, w, b):
    s = r.clone()
    s += conv(x, w, b)
    return s.relu(), s


def pool_with_ceil_mode(x, r, w, b):
    return TF.max_pool2d(conv(x, w, b).relu(), 4, 4, 0, 1, True)


def pool_with_dilation(x, r, w, b):
    return TF.max_pool2d(conv(x, w, b).relu(), 2, 1, 0, 2)


def pool_without_relu(x, r, w, b):
    return TF.max_pool2d(conv(x, w, b), 2)


def pool_twice(x, r, w, b):
    y = conv(x, w, b).relu()
    return TF.max_pool2d(y, 2), TF.max_pool2d(y, 3)


POOLING = ["max_pool2d"]
NOT_FUSING: dict[Callable[..., Any], tuple[str, list[str], str]] = {
    returned_too: ("xwb", ["conv2d"], "its result has 2 readers"),
    read_twice: ("xwb", ["conv2d"], "its result has 2 readers"),
    in_place_and_read: ("xwb", ["conv2d"], "its result has 2 readers"),
    view_read: ("xwb", ["conv2d"], "its result has 2 readers"),
    input_changed: ("", ["conv2d"], "add_ changes what it reads before relu"),
    view_changed: ("", ["conv2d"], "mul_ changes what it reads before relu"),
    item_set: ("", ["conv2d"], "setitem changes what it reads before relu"),
    changed_by_out: ("", ["conv2d"], "mul changes what it reads before relu"),
    changed_by_inplace: ("", ["conv2d"], "leaky_relu changes what it reads before relu"),
    changed_by_operator: ("", ["conv2d"], "isub changes what it reads before relu"),
    changed_by_statistics: ("xw", ["conv2d"], "batch_norm changes what it reads before relu"),
    changed_by_aten: ("", ["conv2d"], "changes what it reads before relu"),
    weight_changed: ("", ["conv2d"], "mul_ changes what it reads before relu"),
    residual_changed: ("xwb", ["conv2d + residual"], "mul_ changes what it reads before relu"),
    sum_before_change: ("r", ["conv2d"], "mul_ changes what it reads before add"),
    grad_disabled_before: ("xrwb", ["conv2d"], "_set_grad_enabled stands between"),
    grad_disabled_after: ("xrwb", ["conv2d"], "_set_grad_enabled stands between"),
    scaled: ("xrwb", ["conv2d"], "its sum has alpha=2"),
    scaled_the_other_way: ("xrwb", ["conv2d"], "its sum has alpha=2"),
    broadcast: ("xrwb", ["conv2d"], "another shape"),
    broadcasting: ("xrwb", ["conv2d"], "another shape"),
    number_added: ("xwb", ["conv2d"], "not with another tensor"),
    promoting: ("r", ["conv2d"], "another shape, dtype"),
    promoted: ("xrwb", ["conv2d"], "another shape, dtype"),
    added_to_itself: ("xwb", ["conv2d"], "not with another tensor"),
    written_into_the_other: ("xrwb", ["conv2d"], "written into the other operand"),
    pool_with_ceil_mode: ("xwb", [FUSED, *POOLING], "max_pool2d has dilation, ceil_mode"),
    pool_with_dilation: ("xwb", [FUSED, *POOLING], "max_pool2d has dilation, ceil_mode"),
    pool_without_relu: ("xwb", ["conv2d", *POOLING], "no ReLU stands between"),
    pool_twice: ("xwb", [FUSED, *POOLING, *POOLING], "its result has 2 readers"),
}


@pytest.mark.parametrize("function", NOT_FUSING, ids=lambda function: function.__name__)
def test_not_fused(function):
    wanted, expected, why = NOT_FUSING[function]
    assert check(function, wanted) == expected
    assert why in compile_report().rows[0].why
