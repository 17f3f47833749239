"""cnn's modules against torch.nn's: the same constructor, parameters, results and gradients."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cnn

DROP_INS = ("Conv2d", "ConvTranspose2d", "MaxPool2d", "MaxUnpool2d")


def convolution(*args, **kwargs):
    return pytest.param("Conv2d", args, kwargs, id=f"{args}-{kwargs}".replace(" ", ""))


def transposed(*args, **kwargs):
    return pytest.param("ConvTranspose2d", args, kwargs, id=f"T{args}-{kwargs}".replace(" ", ""))


def pair(name, args, kwargs, device, dtype=torch.float64):
    """torch's module on the CPU and ours on the device, from one seed."""
    torch.manual_seed(0)
    theirs = getattr(nn, name)(*args, **kwargs, dtype=dtype)
    torch.manual_seed(0)
    return theirs, getattr(cnn, name)(*args, **kwargs, dtype=dtype).to(device)


def outcome(module, *inputs, **kwargs):
    """The result and all gradients, on the CPU."""
    place = next(module.parameters()).device
    leaves = [t.to(place).requires_grad_() for t in inputs]
    y = module(*leaves, **kwargs)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=place).reshape(y.shape)
    return [t.cpu() for t in (y, *torch.autograd.grad(y, [*leaves, *module.parameters()], dy))]


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        convolution(4, 6, 3),
        convolution(4, 6, (3, 2), (2, 1), (1, 0), bias=False),
        convolution(4, 6, 3, 2, 1, 2, 2, True),
        convolution(4, 8, 3, groups=4, padding="same"),
        convolution(4, 6, (2, 4), padding="same", dilation=(3, 1)),
        convolution(4, 6, 3, padding="valid"),
        *(
            convolution(4, 6, 3, padding=padding, padding_mode=mode)
            for mode in ("reflect", "replicate", "circular")
            for padding in (0, (2, 1), "same", "valid")
        ),
        convolution(4, 6, (4, 2), padding="same", dilation=2, padding_mode="circular"),
        convolution(4, 6, 3, stride=2, padding=2, padding_mode="reflect", bias=False),
        transposed(4, 6, 3),
        transposed(4, 6, (3, 2), (2, 1), (1, 0), (1, 0), 2, False, (1, 2)),
        transposed(4, 6, 3, stride=2, output_padding=1, padding=1),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolutions(name, args, kwargs, batched, device):
    theirs, ours = pair(name, args, kwargs, device)
    assert ours.extra_repr() == theirs.extra_repr()
    assert_close(ours.state_dict(), theirs.state_dict(), check_device=False, rtol=0, atol=0)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    x = x if batched else x[0]
    assert_close(outcome(ours, x), outcome(theirs, x))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), ((2, 4), (3, 1))], ids=str)
def test_full_padding(kernel, dilation, mode, device):
    torch.manual_seed(0)
    options = {"dilation": dilation, "padding_mode": mode, "dtype": torch.float64}
    ours = cnn.Conv2d(4, 6, kernel, padding="full", **options)
    padding = (2, 2) if kernel == 3 else (3, 3)
    theirs = nn.Conv2d(4, 6, kernel, padding=padding, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    assert_close(outcome(ours.to(device), x), outcome(theirs, x))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_conv_relu(padding_mode, device):
    theirs, _ = pair("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": padding_mode}, device)
    ours = cnn.ConvReLU2d(4, 6, 3, padding=1, padding_mode=padding_mode, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    assert_close(outcome(ours.to(device), x), outcome(nn.Sequential(theirs, nn.ReLU()), x))


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("size", [(13, 15), (14, 16), (13, 16)], ids=str)
def test_output_size_of_a_transposed_convolution(size, batched, device):
    theirs, ours = pair("ConvTranspose2d", (4, 6, 3, 2), {"padding": 1}, device)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    x = x if batched else x[0]
    for output_size in (size, [*x.shape[:-2], *size]):
        y = outcome(ours, x, output_size=output_size)
        assert y[0].shape[-2:] == size
        assert_close(y, outcome(theirs, x, output_size=output_size))
    for wrong in ((12, 15), (13, 17), (13,), (2, 4, 6, 13, 15)):
        for module in (theirs, ours):
            with pytest.raises(ValueError, match=r"output.size"):
                module(x.to(module.weight.device), output_size=wrong)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((2,), {}),
        ((3, 2, 1), {"ceil_mode": True}),
        (((3, 2), (1, 2)), {"dilation": (2, 1), "padding": (1, 0)}),
        ((2, None, 0, 1, True), {}),
    ],
    ids=str,
)
def test_max_pool(args, kwargs, batched, device):
    theirs, ours = nn.MaxPool2d(*args, **kwargs), cnn.MaxPool2d(*args, **kwargs)
    assert ours.extra_repr() == theirs.extra_repr()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    x = x if batched else x[0]
    assert_close(ours(x.to(device)), theirs(x), check_device=False)


@pytest.mark.parametrize(
    ("args", "image", "size"),
    [((2,), (6, 8), None), ((3, 2), (7, 9), None), ((2, 2, 0), (7, 9), (7, 9))],
    ids=str,
)
def test_max_unpool(args, image, size, device):
    theirs, ours = nn.MaxUnpool2d(*args), cnn.MaxUnpool2d(*args)
    assert ours.extra_repr() == theirs.extra_repr()
    x = torch.randn(2, 4, *image, dtype=torch.float64)
    y, indices = nn.functional.max_pool2d(x, *args[:2], return_indices=True)
    found = ours(y.to(device), indices.to(device), size)
    assert_close(found, theirs(y, indices, size), check_device=False)


@pytest.mark.parametrize("name", DROP_INS)
def test_constructors_are_torchs(name):
    def parameters(cls):
        return [(p.name, p.default, p.kind) for p in inspect.signature(cls).parameters.values()]

    assert issubclass(getattr(cnn, name), getattr(nn, name))
    assert parameters(getattr(cnn, name)) == parameters(getattr(nn, name))
    assert issubclass(cnn.ConvReLU2d, cnn.Conv2d)
    assert parameters(cnn.ConvReLU2d) == parameters(nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Conv2d", {"padding": "Full"}),
        ("Conv2d", {"padding": "same", "stride": 2}),
        ("Conv2d", {"padding_mode": "edge"}),
        ("Conv2d", {"groups": 0}),
        ("Conv2d", {"groups": 3}),
        ("ConvTranspose2d", {"padding_mode": "circular"}),
        ("ConvTranspose2d", {"groups": 5}),
    ],
    ids=str,
)
def test_constructors_reject_what_torchs_do(name, kwargs):
    for module in (nn, cnn):
        with pytest.raises(ValueError, match=next(iter(kwargs)).replace("_", ".")):
            getattr(module, name)(4, 6, 3, **kwargs)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone, device):
    net = nn.Sequential(
        cnn.ConvReLU2d(4, 6, 3, padding="full"),
        cnn.MaxPool2d(2),
        cnn.Conv2d(6, 6, 3, padding="same", padding_mode="circular"),
        cnn.ConvTranspose2d(6, 2, 2, 2),
    ).to(device)
    x = torch.randn(2, 4, 6, 8, device=device)
    copied = clone(net)
    assert str(copied) == str(net)
    assert_close(copied(x), net(x), rtol=0, atol=0)


def test_printed_names():
    """They tell the library's layers from torch's, and a subclass's own name from both."""

    class Own(cnn.ConvReLU2d):
        pass

    layers = (cnn.Conv2d(1, 2, 3), cnn.ConvReLU2d(1, 2, 3), cnn.MaxPool2d(2), Own(1, 2, 3))
    names = [str(layer).partition("(")[0] for layer in layers]
    assert names == ["cnn.Conv2d", "cnn.ConvReLU2d", "cnn.MaxPool2d", "Own[cnn.ConvReLU2d]"]


def test_torch_folds_batch_norm_into_a_layer(device):
    torch.manual_seed(0)
    layer, norm = cnn.Conv2d(4, 6, 3, groups=2, bias=False).double(), nn.BatchNorm2d(6).double()
    for t in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(t)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    chain = nn.Sequential(layer, norm).to(device).eval()
    folded = nn.utils.fuse_conv_bn_eval(*chain)
    assert type(folded) is cnn.Conv2d
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64, device=device)
    assert_close(folded(x), chain(x))


def test_a_pooling_layer_takes_no_bytes(device):
    block = cnn.ConvReLUMaxPool2d(3, 6, 3, pool_kernel_size=2, device=device)
    block.normalize = 1 / 64, -2.0
    with pytest.raises(NotImplementedError, match="bytes"):
        block(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device))
