"""cnn.functional against torch.nn.functional: errors, layouts, shapes, unbatched inputs.

What the kernels compute is tested with the operators; here it is what reaches them, and in which
shape, layout and dtype it comes back.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as TF
from calls import TENSORS, VALID, arguments
from torch.testing import assert_close

import cnn
import cnn.functional as F
from kernels.device import describe

DYNAMO = "ignore:.*should not be instantiated:DeprecationWarning"  # it makes a Function's ctx


def described(name: str, change) -> str:
    """How an error's message must show an argument."""
    return repr(change) if name in TENSORS else f"{name}={change!r}"


def table(rows: list[tuple[str, dict]]):
    """Parametrize over rows of (function, changes), with what is changed as the id."""

    def show(v) -> str:
        return str(v).replace(" ", "").replace("torch.", "")

    return pytest.mark.parametrize(
        ("function", "changes"),
        [
            pytest.param(f, c, id="-".join([f, *(f"{k}={show(v)}" for k, v in c.items())]))
            for f, c in rows
        ],
    )


def each(function: str, name: str, *values, **fixed) -> list[tuple[str, dict]]:
    return [(function, {name: value, **fixed}) for value in values]


NO_STRIDES = (1.0, True, "1", (1, 2, 3), (1.0, 1), (True, 1), (1, None), (1, "a"), [None], {1, 2})
NO_STRIDES += (np.float32(1), np.array([1, 2]), torch.tensor(1.0), torch.tensor([1, 2]))
NO_STRIDES += (1j, range(1, 3))
NO_PAIRS = (*NO_STRIDES, None, ())  # as strides max_pool2d takes these two
NO_POSITIVES = (0, -1, (1, 0), (0, 1), (1, -1), [0])
NO_COUNTS = (-1, (1, -1), (-1, 0))
NO_TENSORS = (None, 1.0, [[1.0]], np.zeros(2), "x")
NO_IMAGES = ((), (4,), (4, 9), (1, 2, 4, 9, 11))

# The argument named first is the one to blame.
REJECTED = [
    *each("conv2d", "input", *NO_TENSORS, *NO_IMAGES),
    *each("conv2d", "input", (2, 3, 9, 11), (3, 9, 11), (0, 3, 9, 11), (2, 0, 9, 11)),
    *each("conv2d", "input", (2, 4, 2, 11), (2, 4, 9, 2), (4, 2, 2), (0, 4, 2, 2)),
    *each("conv2d", "input", (2, 4, 0, 9), (4, 0, 9), padding=2),
    *each("conv2d", "input", torch.float64, torch.float16, torch.int64, torch.complex64),
    *each("conv2d", "weight", *NO_TENSORS, (), (6,), (6, 4), (6, 4, 3), (6, 4, 3, 3, 3)),
    *each("conv2d", "weight", (6, 3, 3, 3), (0, 4, 3, 3), (6, 4, 0, 3), (6, 4, 3, 0)),
    *each("conv2d", "weight", (6, 4, 10, 3), (6, 4, 3, 12), (6, 4, 10, 12)),
    *each("conv2d", "weight", (5, 2, 3, 3), (1, 2, 3, 3), (0, 2, 3, 3), groups=2),
    *each("conv2d", "weight", torch.float64, torch.float16, torch.bfloat16, torch.int64),
    *each("conv2d", "bias", 1.0, False, [1.0] * 6, np.zeros(6)),
    *each("conv2d", "bias", (), (5,), (1,), (0,), (6, 1), (1, 6), torch.float64, torch.float16),
    *each("conv2d", "stride", *NO_PAIRS, *NO_POSITIVES, "same"),
    *each("conv2d", "padding", *NO_PAIRS, *NO_COUNTS, "Same", "", "circular", b"1"),
    *each("conv2d", "stride", 2, (1, 2), (2, 1), 0, padding="same"),
    *each("conv2d", "dilation", *NO_PAIRS, *NO_POSITIVES, 10, (1, 6)),
    *each("conv2d", "dilation", 0, None, (1, 1, 1), padding="same"),
    *each("conv2d", "groups", 0, -1, 3, 5, 2**40, 1.0, True, None, "1", (1,), [1]),
    *each("conv_transpose2d", "input", *NO_TENSORS, *NO_IMAGES),
    *each("conv_transpose2d", "input", (2, 3, 5, 6), (3, 5, 6), (2, 0, 5, 6)),
    *each("conv_transpose2d", "input", (2, 4, 0, 6), (4, 5, 0), (2, 4, 0, 0)),
    *each("conv_transpose2d", "input", (2, 4, 1, 1), (0, 4, 1, 1), (4, 1, 9), padding=2),
    *each("conv_transpose2d", "input", (1, 4, 2, 6), (1, 4, 6, 2), (4, 2, 2), padding=2),
    *each("conv_transpose2d", "input", torch.float64, torch.float16, torch.int64),
    *each("conv_transpose2d", "weight", *NO_TENSORS, (), (4,), (4, 6, 3), (4, 6, 3, 3, 3)),
    *each("conv_transpose2d", "weight", (3, 6, 3, 3), (0, 6, 3, 3), (4, 0, 3, 3), (4, 6, 0, 3)),
    *each("conv_transpose2d", "weight", torch.float64, torch.float16, torch.bfloat16),
    *each("conv_transpose2d", "bias", 1.0, [1.0] * 6, (), (5,), (4,), (12,), (6, 1)),
    *each("conv_transpose2d", "bias", torch.float64, torch.float16),
    *each("conv_transpose2d", "bias", (6,), groups=2),
    *each("conv_transpose2d", "stride", *NO_PAIRS, *NO_POSITIVES),
    *each("conv_transpose2d", "padding", *NO_PAIRS, *NO_COUNTS, "same", 5, (0, 5)),
    *each("conv_transpose2d", "dilation", *NO_PAIRS, *NO_POSITIVES),
    *each("conv_transpose2d", "output_padding", *NO_PAIRS, *NO_COUNTS, 1, (0, 1), (1, 0), [1]),
    *each("conv_transpose2d", "output_padding", 2, 3, (0, 2), stride=2),
    *each("conv_transpose2d", "output_padding", 3, stride=2, dilation=3),
    *each("conv_transpose2d", "output_padding", (0, 1), stride=(2, 1)),
    *each("conv_transpose2d", "groups", 0, -1, 3, 8, 2**40, 1.0, True, None, [1]),
    *each("max_pool2d", "input", *NO_TENSORS, *NO_IMAGES),
    *each("max_pool2d", "input", (2, 0, 9, 11), (0, 9, 11), (2, 4, 0, 9), (4, 9, 0), (0, 0, 9, 9)),
    *each("max_pool2d", "input", (2, 4, 2, 2), (0, 4, 2, 2), (4, 9, 2), torch.bool),
    *each("max_pool2d", "kernel_size", *NO_PAIRS, *NO_POSITIVES, 10, (3, 12), 2**40),
    *each("max_pool2d", "kernel_size", 0, (0, 2), stride=1),
    *each("max_pool2d", "kernel_size", 5, (3, 7), stride=1, dilation=(3, 2), ceil_mode=True),
    *each("max_pool2d", "stride", *NO_STRIDES),
    *each("max_pool2d", "stride", *NO_POSITIVES, 2**31, 2**40),
    *each("max_pool2d", "padding", *NO_PAIRS, *NO_COUNTS, 2, (1, 2), (2, 1), 2**31),
    *each("max_pool2d", "padding", 2, dilation=2),
    *each("max_pool2d", "padding", 1, kernel_size=1),
    *each("max_pool2d", "dilation", *NO_PAIRS, *NO_POSITIVES, 5, (1, 6)),
    *each("max_pool2d", "dilation", -1, 2**31, kernel_size=1),
    *each("max_pool2d", "ceil_mode", None, 0, 1, "a", 1.0, np.True_, torch.tensor(True)),
    *each("max_unpool2d", "input", *NO_TENSORS, *NO_IMAGES),
    *each("max_unpool2d", "input", (2, 0, 4, 5), (2, 4, 0, 5), (4, 4, 0), (0, 0, 4, 5)),
    *each("max_unpool2d", "input", torch.int64, torch.complex64, torch.bool),
    *each("max_unpool2d", "indices", *NO_TENSORS, torch.int32, torch.float32, torch.uint8),
    *each("max_unpool2d", "indices", (2, 4, 4, 4), (4, 4, 5), (1, 4, 4, 5), (2, 4, 4, 5, 1)),
    *each("max_unpool2d", "kernel_size", 1.0, "1", None, (2, 1.0), (None, 2), torch.tensor(2)),
    *each("max_unpool2d", "kernel_size", (), (2,), [2], (2, 2, 2)),
    *each("max_unpool2d", "stride", 1.0, "1", (2, 1.0), (None, 2), torch.tensor(2), (), (2,), []),
    *each("max_unpool2d", "padding", 1.0, "1", None, (1, 1.0), (), (1,)),
    *each("max_unpool2d", "output_size", 8, "ab", {8, 10}, (None, 10), (8, "a"), (8.0, 10)),
    *each("max_unpool2d", "output_size", (), [], (9,), (8, 10, 1), (2, 4, 8, 10, 1), (4, 8, 10)),
    *each("max_unpool2d", "output_size", (10, 10), (6, 10), (8, 12), (8, 8), (0, 0), (2, 4, 8, 12)),
]


@pytest.mark.parametrize("size", [(2, 2), (2, 6), (6, 2)])
def test_without_images_a_transposed_convolution_may_be_empty(size, device):
    changes = {"input": (0, 4, *size), "padding": 2}
    y = F.conv_transpose2d(**arguments("conv_transpose2d", changes, device))
    assert y.shape == TF.conv_transpose2d(**arguments("conv_transpose2d", changes)).shape
    assert 0 in y.shape[2:]


@table(REJECTED)
def test_what_torch_rejects(function, changes, device, monkeypatch):
    """The same class of exception, the blame on the right argument, and no operator is called."""
    with pytest.raises(Exception) as theirs:  # noqa: PT011  any that torch raises
        getattr(TF, function)(**arguments(function, changes))
    monkeypatch.setattr(F, "ops", SimpleNamespace())
    with pytest.raises(theirs.type) as ours:
        getattr(F, function)(**arguments(function, changes, device))
    assert ours.type is theirs.type
    name, change = next(iter(changes.items()))
    assert name in str(ours.value)
    assert described(name, change) in str(ours.value)


LISTS = {
    "conv2d": ("stride", "padding", "dilation"),
    "conv_transpose2d": ("stride", "padding", "dilation", "output_padding"),
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation"),
}

# Ours alone, or where torch takes on the CPU what the library does not.
REFUSED = [
    *(
        (f, {"input": d}, NotImplementedError)
        for f in VALID
        for d in (torch.int64, torch.complex64)
    ),
    *((f, {"input": torch.float8_e4m3fn}, NotImplementedError) for f in VALID),
    ("conv2d", {"activation": "gelu"}, ValueError),
    ("conv2d", {"activation": True}, ValueError),
    ("conv2d", {"precision": "bf16"}, ValueError),
    ("conv2d", {"precision": False}, ValueError),
    ("conv2d", {"residual": 1.0}, TypeError),
    ("conv2d", {"residual": (2, 6, 9, 11)}, ValueError),
    ("conv2d", {"residual": (6, 7, 9)}, ValueError),
    ("conv2d", {"residual": (1, 6, 7, 9)}, ValueError),
    ("conv2d", {"residual": (2, 6, 7, 9), "input": (4, 9, 11)}, ValueError),
    # As torch 2.13 has it; earlier ones have other classes, or take some of these.
    *((f, {name: 2**64}, ValueError) for f in LISTS for name in LISTS[f]),
    *((f, {name: (1, 2**64)}, TypeError) for f in LISTS for name in LISTS[f]),
    *((f, {"groups": 2**64}, ValueError) for f in ("conv2d", "conv_transpose2d")),
    ("max_unpool2d", {"kernel_size": np.int64(2)}, TypeError),
    ("max_unpool2d", {"stride": (np.int64(2), 2)}, TypeError),
    ("max_unpool2d", {"padding": np.int64(1)}, TypeError),
    ("max_unpool2d", {"output_size": torch.tensor([8, 10])}, TypeError),
    ("max_unpool2d", {"output_size": np.array([8, 10])}, TypeError),
    ("max_unpool2d", {"kernel_size": -1}, ValueError),
    ("max_unpool2d", {"kernel_size": (2, -1)}, ValueError),
    ("max_unpool2d", {"stride": -1}, ValueError),
    ("max_unpool2d", {"stride": (2, -1)}, ValueError),
    ("max_unpool2d", {"padding": 5}, ValueError),
    ("max_unpool2d", {"padding": (0, 6)}, ValueError),
]


@pytest.mark.parametrize(
    ("function", "changes", "error"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}".replace(" ", "")) for row in REFUSED],
)
def test_what_this_library_refuses(function, changes, error, device, monkeypatch):
    if "input" in changes and function.startswith("conv") and "residual" not in changes:
        changes = {**changes, "weight": changes["input"]}
    monkeypatch.setattr(F, "ops", SimpleNamespace())
    with pytest.raises(error) as raised:
        getattr(F, function)(**arguments(function, changes, device))
    name, change = next(iter(changes.items()))
    assert name in str(raised.value)
    assert described(name, change) in str(raised.value)


@pytest.mark.parametrize(
    ("function", "name"),
    [("conv2d", n) for n in ("weight", "bias", "residual")]
    + [("conv_transpose2d", n) for n in ("weight", "bias")]
    + [("max_unpool2d", "indices")],
)
def test_tensors_on_two_devices(function, name, device):
    shapes = {"bias": (6,), "residual": (2, 6, 7, 9)}
    call = arguments(function, {name: shapes.get(name, VALID[function].get(name))}, device)
    elsewhere = "cpu" if device.type == "cuda" else "meta"
    call[name] = call[name].to(elsewhere)
    with pytest.raises(RuntimeError, match=f"{name} must have .* device.* on {elsewhere}"):
        getattr(F, function)(**call)


@pytest.mark.parametrize("function", VALID)
def test_sparse_tensors(function, device):
    call = arguments(function, {}, device)
    call["input"] = call["input"].to_sparse()
    with pytest.raises(RuntimeError, match=r"layout|strided"):
        getattr(F, function)(**call)


@pytest.mark.parametrize("index", [80, 1000, -1, -1000])
def test_an_index_outside_the_result(index):
    call = arguments("max_unpool2d", {})
    call["indices"][1, 2, 3, 4] = index
    with pytest.raises(RuntimeError):
        TF.max_unpool2d(**call)
    with pytest.raises(RuntimeError):
        F.max_unpool2d(**call)


TAKEN = [
    *each("conv2d", "stride", 2, (2, 1), [1, 2], [2], (2,), torch.Size([1, 2]), np.int64(2)),
    *each("conv2d", "stride", torch.tensor(2), (np.int64(2), torch.tensor(1)), (2, True), 2**40),
    *each("conv2d", "padding", 1, (1, 0), [2], "valid", "same", (np.int32(1), 2), 7),
    *each("conv2d", "padding", "same", weight=(6, 4, 2, 4)),
    *each("conv2d", "padding", "same", weight=(6, 4, 4, 3), dilation=(3, 2)),
    *each("conv2d", "padding", "same", weight=(6, 4, 1, 2), dilation=[2], input=(4, 9, 11)),
    *each("conv2d", "padding", "valid", stride=2),
    *each("conv2d", "dilation", 2, (1, 3), [4, 2], np.int64(2)),
    *each("conv2d", "groups", 2, np.int64(2), torch.tensor(2), weight=(6, 2, 3, 3), bias=(6,)),
    *each("conv2d", "groups", 4, weight=(8, 1, 3, 3), input=(4, 9, 11)),
    *each("conv2d", "input", (4, 9, 11), (2, 4, 3, 3), (4, 3, 3), bias=(6,)),
    *each("conv2d", "input", (0, 4, 9, 11), (0, 4, 3, 3), bias=(6,)),
    *each("conv2d", "input", (2, 0, 9, 11), (0, 0, 9, 11), (0, 9, 11), weight=(6, 0, 3, 3)),
    *each("conv2d", "input", (2, 0, 9, 11), weight=(6, 0, 3, 3), bias=(6,), groups=3, padding=1),
    *each("conv_transpose2d", "stride", 2, (2, 1), [3], np.int64(2), (2, True), torch.tensor(3)),
    *each("conv_transpose2d", "padding", 1, (1, 0), [2], 3, np.int64(1)),
    *each("conv_transpose2d", "output_padding", 1, (1, 0), [1], np.int64(1), stride=2),
    *each("conv_transpose2d", "output_padding", 2, (1, 2), stride=2, dilation=3, padding=1),
    *each("conv_transpose2d", "output_padding", (0, 1), stride=(2, 1), dilation=(1, 2)),
    *each("conv_transpose2d", "output_padding", 2, dilation=(4, 3), bias=(6,)),
    *each("conv_transpose2d", "dilation", 2, (1, 3), [2], np.int64(2)),
    *each("conv_transpose2d", "groups", 2, np.int64(2), bias=(12,)),
    *each("conv_transpose2d", "groups", 4, weight=(4, 2, 2, 3), stride=(1, 2)),
    *each("conv_transpose2d", "input", (4, 5, 6), (4, 1, 1), (0, 4, 5, 6), bias=(6,)),
    *each("max_pool2d", "stride", None, [], (), 1, 2, (1, 2), [2], 4, np.int64(2), 2**31 - 1),
    *each("max_pool2d", "kernel_size", 1, (2, 3), [2], (3,), np.int64(2), (2, True)),
    *each("max_pool2d", "padding", 1, (1, 0), [1], np.int64(1), stride=2),
    *each("max_pool2d", "padding", (1, 2), kernel_size=(2, 4), stride=1),
    *each("max_pool2d", "dilation", 2, (1, 3), [2], np.int64(2), stride=1, padding=1),
    *each("max_pool2d", "dilation", 2**31 - 1, kernel_size=1),
    *each("max_pool2d", "ceil_mode", True, False, stride=2, padding=1),
    *each("max_pool2d", "ceil_mode", True, input=(4, 2, 2)),
    *each("max_pool2d", "return_indices", True, 1, "yes", 0, None),
    *each("max_pool2d", "return_indices", True, input=(4, 9, 11), stride=2, ceil_mode=True),
    *each("max_pool2d", "input", (0, 4, 9, 11), (0, 4, 3, 3), (4, 9, 11), return_indices=True),
    *each("max_unpool2d", "kernel_size", 2, (2, 3), [2, 2], (3, 2)),
    *each("max_unpool2d", "stride", None, 2, (3, 2), [2, 2], (2, 2, 9)),
    *each("max_unpool2d", "padding", 0, 1, (0, 1), [1, 0], -1, True, kernel_size=3),
    *each("max_unpool2d", "output_size", (8, 10), [9, 11], (7, 9), (2, 4, 9, 10), (1, 1, 8, 11)),
    *each("max_unpool2d", "output_size", torch.Size([9, 9]), torch.Size([2, 4, 8, 10])),
    *each("max_unpool2d", "input", (4, 4, 5), indices=(4, 4, 5), output_size=(9, 10)),
    *each("max_unpool2d", "input", (0, 4, 4, 5), indices=(0, 4, 4, 5)),
]


def results(value) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def gradients(call: dict, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [v for v in call.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    dy = torch.arange(1.0, outputs[0].numel() + 1, dtype=outputs[0].dtype)
    dy = dy.reshape(outputs[0].shape).to(outputs[0].device)
    return list(torch.autograd.grad(outputs[0], leaves, dy))


@table(TAKEN)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_torch_takes(function, changes, device):
    """Results, indices and gradients are torch's, in shape and value."""
    found = []
    for module, place in ((TF, "cpu"), (F, device)):
        call = arguments(function, changes, place, torch.float64)
        for v in call.values():
            if isinstance(v, torch.Tensor) and v.is_floating_point():
                v.requires_grad_()
        outputs = results(getattr(module, function)(**call))
        found.append([t.cpu() for t in outputs + gradients(call, outputs)])
    assert_close(*reversed(found))


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 3), 1), ((2, 5), (3, 1)), ((1, 4), 2)], ids=str
)
def test_full_padding(kernel, dilation, batched, device):
    call = arguments(
        "conv2d", {"weight": (6, 4, *kernel), "dilation": dilation}, device, torch.float64
    )
    if not batched:
        call["input"] = call["input"][0]
    d = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    padding = tuple(step * (size - 1) for step, size in zip(d, kernel, strict=True))
    assert_close(F.conv2d(**call, padding="full"), TF.conv2d(**call, padding=padding))


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_residual_and_activation(activation, batched, device):
    call = arguments("conv2d", {"bias": (6,)}, device, torch.float64)
    residual = torch.randn(2, 6, 7, 9, dtype=torch.float64, device=device)
    if not batched:
        call["input"], residual = call["input"][0], residual[0]
    expected = TF.conv2d(**call) + residual
    expected = expected.relu() if activation else expected
    assert_close(F.conv2d(**call, residual=residual, activation=activation), expected)


# Layouts.

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(("of_input", "of_weight"), [*itertools.product(LAYOUTS, LAYOUTS)])
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_layout_of_a_convolution(function, of_input, of_weight, batched, device):
    """channels_last if input or weight is; one image alone never is, by torch's rule."""
    strides = []
    for module, place in ((TF, "cpu"), (F, device)):
        call = arguments(function, {}, place)
        call["input"] = call["input"].contiguous(memory_format=LAYOUTS[of_input])
        call["weight"] = call["weight"].contiguous(memory_format=LAYOUTS[of_weight])
        if not batched:
            call["input"] = call["input"][0]
        strides.append(getattr(module, function)(**call).stride())
    assert strides[1] == strides[0]


@pytest.mark.parametrize("view", ["whole", "image", "channel", "channels", "columns", "batch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_pooling(layout, view, device):
    views = {
        "whole": lambda x: x,
        "image": lambda x: x[0],
        "channel": lambda x: x[:, :1],
        "channels": lambda x: x[:, ::2],
        "columns": lambda x: x[..., ::2],
        "batch": lambda x: x.expand(2, -1, -1, -1),
    }
    found = []
    for module, place in ((TF, "cpu"), (F, device)):
        x = arguments("max_pool2d", {"input": (1 if view == "batch" else 2, 4, 8, 8)}, place)[
            "input"
        ]
        x = views[view](x.contiguous(memory_format=LAYOUTS[layout]))
        y, indices = module.max_pool2d(x, 2, return_indices=True)
        unpooled = module.max_unpool2d(y, indices, 2)
        found.append([t.stride() for t in (module.max_pool2d(x, 2), y, indices, unpooled)])
    assert found[1] == found[0]


# What else torch's functions do.


def test_fx_traces_through(device):
    def block(x, w):
        return F.max_pool2d(F.conv2d(x, w, activation="relu"), kernel_size=2)

    traced = torch.fx.symbolic_trace(block)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
        F.conv2d,
        F.max_pool2d,
    ]
    call = arguments("conv2d", {}, device)
    assert_close(traced(*call.values()), block(*call.values()))


def test_subclasses_of_tensor(device):
    class Tagged(torch.Tensor):
        pass

    call = arguments("conv2d", {}, device)
    y = F.conv2d(call["input"].as_subclass(Tagged), weight=call["weight"])
    assert type(y) is Tagged
    assert_close(y.as_subclass(torch.Tensor), F.conv2d(**call))


def test_meta_tensors():
    x = torch.empty(2, 4, 9, 11, device="meta")
    y, indices = F.max_pool2d(F.conv2d(x, x.new_empty(6, 4, 3, 3)), 2, return_indices=True)
    assert y.shape == (2, 6, 3, 4)
    assert F.max_unpool2d(y, indices, 2).shape == (2, 6, 6, 8)
    assert F.conv_transpose2d(y, x.new_empty(6, 4, 2, 2), stride=2).shape == (2, 4, 6, 8)


@pytest.mark.filterwarnings(DYNAMO)
def test_compiles_once_for_all_sizes(device):
    """No graph break, and nothing but arithmetic on sizes; arguments may be symbolic too."""

    def everything(x, w, step):
        y = F.conv2d(x, w, None, step, (step, 1), activation="relu", residual=None)
        y = F.conv2d(y, w, padding="same", residual=y)
        pooled, indices = F.max_pool2d(y, [2], stride=[], return_indices=True)
        y = F.max_unpool2d(pooled, indices, 2, output_size=y.shape)
        return F.conv_transpose2d(y, w, None, [step], 1, (step - 1, 0), dilation=step)

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    w = torch.randn(4, 4, 3, 2, device=device)
    for shape, step in (((5, 4, 9, 11), 2), ((6, 4, 14, 10), 3), ((7, 4, 21, 16), 4)):
        x = torch.randn(shape, device=device)
        assert_close(compiled(x, w, step), everything(x, w, step))
    assert counter.frame_count == 1


# Calls that come again, whose checks were made before.


def test_a_kept_call_admits_nothing_that_is_only_equal(device):
    """1.0 and True equal 1, and hash alike; torch takes neither for a stride."""
    call = arguments("conv2d", {"stride": 1, "padding": (1, 0), "dilation": 1}, device)
    for _ in range(2):
        assert F.conv2d(**call).shape == TF.conv2d(**call).shape
    for name, values in {
        "stride": (1.0, True, (True, 1), (1.0, 1)),
        "padding": ((True, 0), (1.0, 0)),
        "groups": (1.0, True),
    }.items():
        for value in values:
            with pytest.raises(TypeError, match=name):
                F.conv2d(**{**call, name: value})


def test_a_kept_call_notices_what_else_changes(device):
    call = arguments("conv2d", {}, device)
    for _ in range(2):
        F.conv2d(**call)
    with pytest.raises(RuntimeError, match="weight"):
        F.conv2d(**{**call, "weight": call["weight"].double()})
    with pytest.raises(RuntimeError, match="bias"):
        F.conv2d(**call, bias=torch.zeros(5, device=device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert F.conv2d(**call).dtype == torch.bfloat16
    assert F.conv2d(**call, activation="relu").min() == 0


# float8, which has a scale and no gradient.


def float8(*shape: int, device, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = values.contiguous(memory_format=torch.channels_last)
    return values.to(device=device, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("scale", [(), (1,), (24,)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_float8(stride, scale, device):
    """Against float64: the result is rounded once, to bfloat16."""
    x, w = float8(2, 32, 9, 8, device=device, seed=0), float8(24, 32, 3, 3, device=device, seed=1)
    scale = torch.rand(scale, generator=torch.Generator().manual_seed(2)).to(device)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    here = describe(device)
    if here.backend == "cuda" and not here.descriptors:
        with pytest.raises(NotImplementedError, match="tensor descriptors"):
            F.conv2d(x, w, bias, stride, 1, scale=scale, activation="relu")
        return
    y = F.conv2d(x, w, bias, stride, 1, scale=scale, activation="relu")
    products = TF.conv2d(x.double(), w.double(), None, stride, 1)
    right = products * scale.double().expand(24)[:, None, None] + bias.double()[:, None, None]
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Hopper's tensor cores keep about 14 bits of a sum of float8 products.
    magnitude = TF.conv2d(x.double().abs(), w.double().abs(), None, stride, 1) * scale.max()
    error = (y.double() - right.relu()).abs()
    assert (error <= 2**-8 * right.abs() + 2**-13 * magnitude).all()
    assert (y == 0).any()


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"scale": None}, NotImplementedError, "float8"),
        ({"scale": torch.ones(5)}, RuntimeError, "scale"),
        ({"scale": torch.ones(24, dtype=torch.float64)}, RuntimeError, "scale"),
        ({"weight": torch.ones(24, 32, 3, 3)}, RuntimeError, "weight"),
        ({"bias": torch.ones(24)}, RuntimeError, "bias"),
        ({"bias": torch.ones(24, dtype=torch.bfloat16, requires_grad=True)}, RuntimeError, "bias"),
    ],
    ids=["no-scale", "5-scales", "float64-scale", "float32-weight", "float32-bias", "gradient"],
)
def test_what_float8_refuses(changes, error, named, device):
    call = {
        "input": float8(2, 32, 5, 5, device=device, seed=0),
        "weight": float8(24, 32, 3, 3, device=device, seed=1),
        "scale": torch.ones(24),
    } | changes
    call = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(error, match=named):
        F.conv2d(**call)


@pytest.mark.parametrize(
    ("channels", "groups"), [(3, 1), (32, 32), (8, 4)], ids=["few", "depthwise", "few-of-a-group"]
)
def test_float8_of_channels_that_fill_no_block_is_refused(channels, groups, device):
    x = float8(2, channels, 5, 5, device=device, seed=0)
    w = float8(32, channels // groups, 3, 3, device=device, seed=1)
    got = rf"got input of \[2, {channels}, 5, 5\] and weight of .* with groups={groups} on"
    with pytest.raises(NotImplementedError, match=f"float8 needs .*, {got}"):
        F.conv2d(x, w, groups=groups, scale=torch.ones(32, device=device))


# Images in bytes.

SCALE, SHIFT = (1 / 64, 1 / 32, 1 / 128), (-2, -1.5, 0.25)  # exact in every dtype, as their sums


def bytes_and_operands(device, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2, 3, 9, 8), generator=generator, dtype=torch.uint8).to(device)
    scale, shift = (torch.tensor(v, device=device)[:, None, None] for v in (SCALE, SHIFT))
    values = (x * scale + shift).to(dtype)
    w, b = (torch.randn(s, generator=generator).to(device, dtype) for s in ((8, 3, 3, 3), (8,)))
    return x, values, w.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_images_that_were_normalized_before(dtype, layout, device):
    """In value, bit for bit, and in all gradients of any order."""
    x, values, w, b = bytes_and_operands(device, dtype)
    x, values = x.contiguous(memory_format=layout), values.contiguous(memory_format=layout)
    options = {"stride": 2, "padding": 1, "activation": "relu"}

    def everything(input, **normalize):
        y = F.conv2d(input, w, b, **options, **normalize)
        (dw, db), dy = torch.autograd.grad(y.sum(), (w, b), create_graph=True), y.detach()
        (dw_again,) = torch.autograd.grad((dw * w).sum(), w, retain_graph=True)
        return y, dw, db, dw_again, dy

    ours = everything(x, normalize=(SCALE, list(SHIFT)))
    for got, right in zip(ours, everything(values), strict=True):
        assert got.equal(right)
        assert got.stride() == right.stride()
    with torch.no_grad():
        one = F.conv2d(x[0], w, b, **options, normalize=(torch.tensor(SCALE, device=device), SHIFT))
    assert one.equal(ours[0][0])


@pytest.mark.filterwarnings(DYNAMO)
def test_bytes_compile_map_and_cast(device):
    x, values, w, b = bytes_and_operands(device, torch.float32)
    w, b = w.detach(), b.detach()

    def first(x, w):
        return F.conv2d(x, w, b, normalize=(SCALE, SHIFT))

    assert torch.compile(first, backend="aot_eager", fullgraph=True)(x, w).equal(first(x, w))
    weights = torch.stack([w, -w])
    mapped = torch.vmap(first, (None, 0))(x, weights)
    assert_close(mapped, torch.stack([F.conv2d(values, each, b) for each in weights]))
    with torch.autocast(device.type, torch.bfloat16):
        y = first(x, w)
    assert y.equal(F.conv2d(values.bfloat16(), w.bfloat16(), b.bfloat16()))
    layer = cnn.ConvReLU2d(3, 8, 3, device=device)
    layer.normalize = SCALE, SHIFT
    assert layer(x).equal(F.conv2d(values, layer.weight, layer.bias, activation="relu"))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"normalize": None}, RuntimeError, "weight"),
        ({"normalize": (1.0,)}, TypeError, "scale, shift"),
        ({"normalize": (1.0, "0")}, TypeError, "numbers"),
        ({"normalize": ((1.0, 2.0), 0.0)}, RuntimeError, r"\[3\]"),
        ({"normalize": (torch.ones(3, dtype=torch.int64), 0.0)}, RuntimeError, "floats"),
        ({"normalize": (torch.ones(3, requires_grad=True), 0.0)}, RuntimeError, "gradient"),
        ({"input": torch.ones(1, 3, 5, 5)}, RuntimeError, "uint8"),
        (
            {"input": torch.ones(1, 5, 5, 5, dtype=torch.uint8), "weight": torch.ones(2, 5, 3, 3)},
            NotImplementedError,
            "1 to 4",
        ),
        ({"residual": torch.ones(1, 2, 3, 3)}, NotImplementedError, "residual"),
    ],
    ids=["none", "one", "word", "two", "integers", "gradient", "float", "channels", "residual"],
)
def test_what_bytes_refuse(changes, error, named, device):
    call = {
        "input": torch.ones(1, 3, 5, 5, dtype=torch.uint8),
        "weight": torch.ones(2, 3, 3, 3),
        "normalize": (1.0, 0.0),
    } | changes
    call = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(error, match=named):
        F.conv2d(**call)
