"""Under torch.autocast the functions give torch's dtypes, with torch's own shared casts."""

import pytest
import torch
import torch.nn.functional as TF
from calls import VALID, arguments
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnn.functional as F


class Casts(TorchDispatchMode):
    """Counts the casts made within it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def parameters(device, function="conv2d") -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    call = arguments(function, {"bias": (6,)}, device)
    return torch.nn.Parameter(call["weight"]), torch.nn.Parameter(call["bias"])


def half(device, **options):
    return torch.autocast(device.type, torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", VALID)
def test_dtype_under_autocast(function, dtype, device):
    call = arguments(function, {}, device, dtype)
    with half(device):
        ours, theirs = getattr(F, function)(**call), getattr(TF, function)(**call)
    assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_autocast_mends_mixed_dtypes_but_float64(name, device):
    shapes = {"bias": (6,), "residual": (2, 6, 7, 9), "weight": (6, 4, 3, 3)}
    call = arguments("conv2d", {name: shapes[name]}, device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        with half(device):
            assert F.conv2d(**{**call, name: call[name].to(dtype)}).dtype == torch.bfloat16
    with half(device), pytest.raises(RuntimeError, match=f"{name} of torch.float64"):
        F.conv2d(**{**call, name: call[name].double()})


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_a_parameter_is_cast_once_in_a_region(function, mode, cache, device):
    counts = []
    for module in (TF, F):
        w, bias = parameters(device, function)
        x = arguments(function, {}, device)["input"]
        with mode(), half(device, cache_enabled=cache), Casts() as casts:
            for _ in range(3):
                getattr(module, function)(x, w, bias)
        counts.append(casts.count)
    assert counts == ([5, 5] if cache else [9, 9])


def test_gradients_pass_through_a_shared_cast(device):
    """Also where it was first made without gradients, and by torch's own layer."""
    w, bias = parameters(device)
    x = arguments("conv2d", {}, device)["input"]
    with half(device):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                F.conv2d(x, w, bias)
        ys = [m.conv2d(x, w, bias) for m in (TF, F, TF, F)]
    ys[1].sum().backward()
    once = w.grad.clone(), bias.grad.clone()
    ys[3].sum().backward()
    assert_close((w.grad, bias.grad), (2 * once[0], 2 * once[1]))
    expected = TF.conv2d(x.double(), w.double(), bias.double()).sum()
    exact = torch.autograd.grad(expected, (w, bias))
    assert_close(once, exact, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("images", [0, 2])
def test_an_input_that_is_a_leaf_under_autocast(images, device):
    call = arguments("conv2d", {"input": (images, 4, 9, 11)}, device)
    x = call["input"].requires_grad_()
    with half(device):
        F.conv2d(**call).sum().backward()
    assert x.grad.shape == x.shape
    assert x.grad.dtype == torch.float32


def test_a_new_region_casts_anew(device):
    w, _ = parameters(device)
    x = arguments("conv2d", {}, device)["input"]
    with half(device):
        F.conv2d(x, w)
    with torch.no_grad():
        w.zero_()
    with half(device):
        assert (F.conv2d(x, w) == 0).all()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_autocast_within_a_checkpoint(reentrant, device):
    """A checkpoint's saved-tensor hooks must not see how the shared cast is had."""
    w, bias = parameters(device)
    x = arguments("conv2d", {}, device)["input"].requires_grad_()
    found = []
    for wrap in (lambda f, x: checkpoint(f, x, use_reentrant=reentrant), lambda f, x: f(x)):
        with half(device):
            y = wrap(lambda x: F.conv2d(x, w, bias, activation="relu").float().square(), x)
        found.append(torch.autograd.grad(y.sum(), (x, w, bias)) if not reentrant else None)
        if reentrant:
            y.sum().backward()
            found[-1] = [t.grad for t in (x, w, bias)]
            x.grad = w.grad = bias.grad = None
    assert_close(list(found[0]), list(found[1]))


@pytest.mark.parametrize("images", [1, 2])
def test_autocast_while_saved_tensor_hooks_are_disabled(images, device):
    """With the parameter's cast still shared, and its gradient torch's."""
    w, bias = parameters(device)
    x = arguments("conv2d", {"input": (images, 4, 9, 11)}, device)["input"]
    found = []
    for module in (TF, F):
        disabled = torch.autograd.graph.disable_saved_tensors_hooks("not here")
        with disabled, half(device), Casts() as casts:
            y = module.conv2d(x, w, bias) + module.conv2d(x, w, bias)
        found.append((casts.count, torch.autograd.grad(y.float().sum(), (w, bias))))
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1])


def test_autocast_within_a_function_transform(device):
    w, bias = parameters(device)
    x = arguments("conv2d", {}, device)["input"]

    def loss(w):
        return F.conv2d(x, w, bias).float().square().sum()

    with half(device):
        (expected,) = torch.autograd.grad(loss(w), w)
        assert_close(torch.func.grad(loss)(w), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_under_autocast(device):
    w, bias = parameters(device)
    x = arguments("conv2d", {}, device)["input"]
    compiled = torch.compile(F.conv2d, backend="eager", fullgraph=True)
    with half(device):
        assert_close(compiled(x, w, bias), F.conv2d(x, w, bias))
