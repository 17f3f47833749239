"""``torch.compile(model, backend="triton_cnn")``: what is fused, what is not, and that both agree
with eager mode.

Most tests run the rewritten graph through AOTAutograd and no further, as Inductor takes its time.
"""

import copy
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from hand_made import MODELS
from rewritten import rewritten, run
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils import checkpoint

import cnn
import cnn.functional as F
import kernels.device
from cnn import compile_backend
from cnn.compile_backend import compile_report, triton_cnn
from cnn.graphs.layout import ChannelsLast

ROOT = Path(__file__).parents[1]
FUSED = "conv2d + relu"
POOLED = "conv2d + relu + max_pool2d"
SUMMED = "conv2d + residual + relu"
LEFT = "left to Inductor"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def became() -> list[str]:
    return [row.became for row in compile_report().rows]


def operands(device: torch.device, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of a convolution that keeps the image's size, and a residual."""
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 6, 6), "r": (2, 4, 6, 6), "w": (4, 3, 3, 3), "b": (4,)}
    return {name: torch.randn(shape, dtype=dtype).to(device) for name, shape in shapes.items()}


def check(function: Callable[..., Any], wanted: str, inputs: dict[str, Tensor]) -> list[str]:
    """Compare with eager mode; what became of the function's convolutions and poolings."""
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
    "sum with another memory format": (
        lambda x, r, w, b: (conv(x, w, b) + r.transpose(2, 3)).relu(),
        [SUMMED],
    ),
    "what is between changes nothing of it": (
        lambda x, r, w, b: _with_calm_neighbors(x, r, w, b),
        [SUMMED],
    ),
    "asked about": (lambda x, r, w, b: _asking(x, w, b), [FUSED]),
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


def _asking(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = conv(x, w, b)
    return y.relu() if y.is_cpu or y.is_cuda else y


def _without_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        return TF.max_pool2d(conv(x, w, b).relu(), 2)


@pytest.mark.parametrize("name", FUSING)
def test_fused(name, device):
    function, expected = FUSING[name]
    assert sorted(check(function, "xrwb", operands(device))) == sorted(expected)


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


def laid_out_as_the_other(x, r, w, b):
    y = r.to(memory_format=torch.channels_last) + conv(x, w, b)
    return y.relu().permute(0, 2, 3, 1).view(-1)


def laid_out_as_the_transposed(x, r, w, b):
    return (r.transpose(2, 3) + conv(x, w, b)).relu()


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
    laid_out_as_the_other: (
        "xrwb",
        ["conv2d"],
        "its sum has the memory format of the other tensor",
    ),
    laid_out_as_the_transposed: (
        "xrwb",
        ["conv2d"],
        "its sum has the memory format of the other tensor",
    ),
    pool_with_ceil_mode: ("xwb", [FUSED, *POOLING], "max_pool2d has dilation, ceil_mode"),
    pool_with_dilation: ("xwb", [FUSED, *POOLING], "max_pool2d has dilation, ceil_mode"),
    pool_without_relu: ("xwb", ["conv2d", *POOLING], "no ReLU stands between"),
    pool_twice: ("xwb", [FUSED, *POOLING, *POOLING], "its result has 2 readers"),
}


@pytest.mark.parametrize("function", NOT_FUSING, ids=lambda function: function.__name__)
def test_not_fused(function, device):
    wanted, expected, why = NOT_FUSING[function]
    assert check(function, wanted, operands(device)) == expected
    assert why in compile_report().rows[0].why


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["inside", "around"])
def test_under_autocast_operands_are_cast_as_torch_casts_them(dtype, where, device):
    def inside(x, r, w, b):
        with torch.autocast(device.type, dtype):
            return chain(x, r, w, b)

    def chain(x, r, w, b):
        y = TF.max_pool2d(conv(x, w, b).relu_(), 2)
        return y, TF.conv_transpose2d(y, w, None, 2)

    inputs = operands(device, torch.float32)
    function = inside if where == "inside" else chain
    with torch.autocast(device.type, dtype, enabled=where == "around"):
        expected = run(function, "xwb", **inputs)
        got = run(torch.compile(function, backend=rewritten, fullgraph=True), "xwb", **inputs)
    assert became() == [POOLED, "conv_transpose2d"]
    assert got["result0"].dtype == got["result1"].dtype == dtype
    for name, value in expected.items():
        if value is not None:
            assert got[name].dtype == value.dtype
            torch.testing.assert_close(got[name], value, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize("fused_part", ["convolution", "relu"])
def test_nothing_moves_over_the_edge_of_autocast(fused_part, device):
    def edge(x, r, w, b):
        with torch.autocast(device.type, torch.bfloat16, enabled=fused_part == "convolution"):
            y = conv(x, w, b)
        with torch.autocast(device.type, torch.bfloat16, enabled=fused_part == "relu"):
            return y.relu()

    inputs = operands(device, torch.float32)
    got = run(torch.compile(edge, backend=rewritten, fullgraph=True), "xwb", **inputs)
    expected = run(edge, "xwb", **inputs)
    (row,) = compile_report().rows
    assert row.became == "conv2d"
    assert "_exit_autocast stands between it and relu" in row.why
    assert got["result0"].dtype == expected["result0"].dtype
    torch.testing.assert_close(got["result0"], expected["result0"], rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone(device):
    def function(x, r, w, b):
        with torch.autocast(device.type, torch.bfloat16):
            return conv(x, w, b).relu()

    assert check(function, "xwb", operands(device)) == [FUSED]


def test_a_residual_of_another_dtype_is_added_by_torch(device):
    def function(x, r, w, b):
        with torch.autocast(device.type, torch.bfloat16):
            return (conv(x, w, b) + r).relu()

    inputs = operands(device, torch.float32)
    run(torch.compile(function, backend=rewritten, fullgraph=True), "xrwb", **inputs)
    assert became() == ["conv2d"]


# What is left to Inductor.


def _vectorized(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(lambda image: TF.conv2d(image[None], w).relu())(x)


X, W = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)
LEFT_ALONE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "integers": (TF.conv2d, (X.long(), W.long()), "its tensors have dtype torch.int64"),
    "complex": (TF.conv2d, (X * 1j, W * 1j), "its tensors have dtype torch.complex64"),
    "unbatched": (TF.conv2d, (X[0], W), "its input has no batch"),
    "without channels": (TF.conv2d, (X[:, :0], W[:, :0]), "its input or result is empty"),
    "in one dimension": (TF.conv1d, (X[..., 0], W[..., 0]), "only conv2d, conv_transpose2d"),
    "in three": (nn.MaxPool3d(2), (X[None],), "only conv2d, conv_transpose2d"),
    "in a transform": (_vectorized, (X, W), "in a transform of torch.func"),
}


def weight_transposed(x, r, w, b):
    w = TF.pad(w, (0, 0, 1, 1))
    y = TF.conv2d(x, w, padding="same").relu()
    w.transpose_(2, 3)
    return y


def weight_detached(x, r, w, b):
    w = w * 2
    y = TF.max_pool2d(w, 2)
    z = y * 2
    y.detach_()
    return z


def residual_unsqueezed(x, r, w, b):
    r = r * 1
    y = TF.relu(conv(x, w, b) + r)
    r.unsqueeze_(0)
    return y


@pytest.mark.parametrize("function", [weight_transposed, weight_detached, residual_unsqueezed])
def test_tensors_that_are_reshaped_in_place_are_left_alone(function, device):
    wanted = {weight_transposed: "", weight_detached: "w", residual_unsqueezed: "xrw"}[function]
    check(function, wanted, operands(device))
    (row,) = compile_report().rows
    if function is residual_unsqueezed:
        assert (row.became, row.why[:7]) == ("conv2d", "its sum")
    else:
        assert (row.became, "reshaped in place" in row.why) == (LEFT, True)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_the_operators_do_not_take_is_left_to_inductor(name):
    function, inputs, why = LEFT_ALONE[name]
    compiled = torch.compile(function, backend=rewritten, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    (row,) = compile_report().rows
    assert row.became == LEFT
    assert why in row.why


def test_arguments_that_vary_are_left_to_inductor():
    def function(x, w):
        return TF.conv2d(x, w, padding=x.shape[2] // 4)

    compiled = torch.compile(function, backend=rewritten, fullgraph=True, dynamic=True)
    x, w = torch.randn(1, 2, 9, 8), torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(compiled(x, w), function(x, w))
    assert [(row.became, row.why) for row in compile_report().rows] == [
        (LEFT, "its arguments vary")
    ]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_depend_on_data_are_left_to_inductor():
    def function(x, w):
        return TF.max_pool2d(TF.conv2d(x[x.sum((1, 2, 3)) > 0], w).relu(), 2)

    compiled = torch.compile(function, backend=rewritten, fullgraph=True)
    x, w = torch.randn(6, 2, 9, 8), torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(compiled(x, w), function(x, w))
    assert [row.why for row in compile_report().rows] == ["its sizes depend on data"] * 2


def test_on_a_cpu_without_the_interpreter_it_says_once_that_inductor_gets_the_graph(
    monkeypatch, caplog
):
    monkeypatch.setattr(kernels.device, "takes_cpu", lambda: False)
    compile_backend._warn_once.cache_clear()
    for _ in range(2):
        check(pool_with_ceil_mode, "xwb", operands(torch.device("cpu")))
        assert became() == [LEFT, LEFT]
        torch._dynamo.reset()
    messages = [r.message for r in caplog.records if r.name == compile_backend.__name__]
    (warning,) = [message for message in messages if "->" not in message]
    assert warning.startswith("a graph is left to Inductor, as its tensors are on the CPU")


# Sizes, graphs and reports.


def test_other_batches_and_images_compile_nothing_anew(device):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3, 2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(TF.max_pool2d(TF.relu(self.down(x)), 2))

    network = Network().to(device, torch.float64)
    compiled = torch.compile(network, backend=rewritten, fullgraph=True, dynamic=True)
    for sizes in ((2, 10, 11), (3, 10, 11), (4, 9, 12)):
        n, h, w = sizes
        x = torch.randn(n, 3, h, w, dtype=torch.float64, device=device)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-9, atol=1e-9)
    assert became() == [POOLED, "conv_transpose2d"]


def test_the_report_names_layer_line_graph_and_reason(device):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), cnn.Conv2d(2, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            torch._dynamo.graph_break()
            return TF.max_pool2d(x, 2)

    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        torch.compile(Network().to(device), backend=rewritten)(
            torch.randn(1, 1, 8, 8, device=device)
        )
    first, second, pool = compile_report().rows
    assert (first.layer, first.function, first.became) == ("stem.0", "conv2d", "conv2d")
    assert first.why == "conv2d follows it"
    assert (second.layer, second.became) == ("stem.1", FUSED)
    assert second.why == "its result leaves the graph"
    source = Path(first.line.rpartition(":")[0])
    assert {source, Path(second.line.rpartition(":")[0])} == {Path(__file__)}
    assert (pool.became, pool.why) == ("max_pool2d", "")
    assert first.graph == second.graph != pool.graph
    lines = str(compile_report()).splitlines()
    assert lines[0] == f"{first.graph}: stem.0 ({first.line}) conv2d -> conv2d; conv2d follows it"
    assert compile_report().counts == {"conv2d": 1, FUSED: 1, "max_pool2d": 1}
    assert torch._dynamo.utils.counters["triton_cnn"] == compile_report().counts
    torch._dynamo.reset()
    assert compile_report().rows == []


# Whole networks.


class Fire(nn.Module):
    """SqueezeNet's: two convolutions of one map, side by side."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.activation = nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)
        self.one, self.three = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.squeeze(x))
        return torch.cat([self.activation(self.one(x)), self.activation(self.three(x))], 1)


@pytest.mark.parametrize("make", [*MODELS, Fire])
def test_a_training_step_of_a_network_is_eager_modes(make, device):
    """Values, gradients and buffers; every convolution is one of this library's operators."""
    torch.manual_seed(0)
    network = make().to(device, torch.float64)
    twin = copy.deepcopy(network)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, device=device)
    compiled = torch.compile(network, backend=rewritten, fullgraph=True)
    got = run(lambda x: compiled(x), "x", x=x)
    expected = run(lambda x: twin(x), "x", x=x)
    tensors = [dict(got), dict(network.named_buffers()), _gradients(network)]
    others = [dict(expected), dict(twin.named_buffers()), _gradients(twin)]
    torch.testing.assert_close(tensors, others, rtol=1e-8, atol=1e-8)
    assert LEFT not in became()
    convolutions = [row for row in compile_report().rows if row.function.startswith("conv")]
    kinds = nn.Conv2d, nn.ConvTranspose2d
    assert len(convolutions) == sum(isinstance(layer, kinds) for layer in network.modules())


def _gradients(network: nn.Module) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def test_a_step_with_a_grad_scaler(device):
    torch.manual_seed(0)
    network = MODELS[0]().to(device)
    x = torch.randn(2, 3, 16, 16, device=device)

    def train(step: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scaler = torch.amp.GradScaler(device.type)
        for _ in range(2):
            with torch.autocast(device.type, torch.float16):
                loss = step(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return parameters

    twin = copy.deepcopy(network)
    compiled = torch.compile(network, backend=rewritten, fullgraph=True)
    got = train(compiled, list(network.parameters()))
    torch.testing.assert_close(got, train(twin, list(twin.parameters())), rtol=1e-2, atol=1e-3)
    assert sorted(became()) == [FUSED, POOLED, POOLED]


# Inductor, and other processes.


@pytest.fixture
def configs(monkeypatch) -> list[dict[str, Any]]:
    """What Inductor would be called with; the graph is run as it is."""
    seen = []

    def call(self: Any, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.append(self.config)
        return torch._dynamo.disable(gm.forward)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", call)
    return seen


def test_modes_and_options_are_inductors(configs):
    def function(x):
        return x + 1

    for how in ({"mode": "reduce-overhead"}, {"options": {"max-autotune": True}}, {}):
        torch._dynamo.reset()
        torch.compile(function, backend=triton_cnn, **how)(torch.ones(2))
    for config in configs:
        assert isinstance(config.pop("joint_custom_post_pass"), CustomGraphPass)
    assert configs == [{"triton.cudagraphs": True}, {"max_autotune": True}, {}]
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="Unexpected optimization option nothing"):
        torch.compile(function, backend=triton_cnn, options={"nothing": 1})(torch.ones(2))


class Counting(CustomGraphPass):
    calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "counting"


def test_a_pass_of_the_users_is_kept(configs):
    pass_of_users = Counting()
    options = {"joint_custom_post_pass": pass_of_users}
    torch.compile(lambda x: x + 1, backend=triton_cnn, options=options)(torch.ones(2))
    made = configs[0]["joint_custom_post_pass"]
    made(torch.fx.Graph())
    assert pass_of_users.calls == 1
    assert made.uuid() == (ChannelsLast().uuid()[0], "counting")
    assert ChannelsLast([pass_of_users, pass_of_users]).uuid()[1:] == ("counting", "counting")
    assert ChannelsLast(lambda graph: None).uuid() is None  # Inductor then caches nothing


def in_a_process(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A module of tests/ that has run in the interpreter, with the backend's entry point."""
    paths = [environment.pop("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    kept = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", name],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_it_is_found_by_name_and_a_second_process_finds_what_the_first_compiled(tmp_path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (group, points), *_ = declared.items()
    folder = tmp_path / "triton_cnn_of_a_test-0.dist-info"
    folder.mkdir()
    metadata = "Metadata-Version: 2.1\nName: triton-cnn-of-a-test\nVersion: 0\n"
    (folder / "METADATA").write_text(metadata)
    lines = [f"[{group}]", *(f"{name} = {where}" for name, where in points.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    where = {"PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    processes = [in_a_process("compiled_twice", **where) for _ in range(2)]
    first, second = (json.loads(process.stdout) for process in processes)
    assert first == {"hits": {}, "became": {POOLED: 1}}
    assert second == {
        "hits": {"fxgraph_cache_hit": 2, "autograd_cache_hit": 1},
        "became": {POOLED: 1},
    }


def test_under_ddp_fsdp_and_dtensor_with_its_log():
    process = in_a_process("compiled_distributed", TORCH_LOGS="+cnn.compile_backend")
    assert f"conv2d -> {POOLED}" in process.stderr
