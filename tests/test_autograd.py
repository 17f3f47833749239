"""Derivatives, and the library's operators inside torch: compile, func, vmap, fake tensors, FLOPs.

Pooling and unpooling are here where they are differentiated or transformed; their values are in
``test_max_pool``.
"""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as TF
from cases import (
    CONV_CASES,
    DEPTHWISE,
    FIRST_LAYER,
    GROUPED,
    PLAIN,
    STRIDED,
    conv2d,
    conv_transpose2d,
    operands,
    params,
    random,
)
from tolerance import assert_close, double, evaluate, torch_conv2d
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import cnn
import cnn.functional as F
from kernels import device as kernel_device

ENGINES = (PLAIN, STRIDED, FIRST_LAYER, GROUPED, DEPTHWISE)


def leaves(device, *shapes, dtype=torch.float64):
    """Random tensors that require gradients; None stays None."""
    return tuple(
        None if shape is None else random(shape, dtype, device, seed).requires_grad_()
        for seed, shape in enumerate(shapes)
    )


def distinct(device, *shape):
    """Numbers that are all different by more than gradcheck's step, in random order."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (order.double() / 8 - count / 16).view(shape).to(device).requires_grad_()


def places(device, count, size):
    """int64 indices [1, 2, *count], different in each plane, into planes of ``size``."""
    generator = torch.Generator().manual_seed(0)
    area, number = size[0] * size[1], count[0] * count[1]
    planes = [torch.randperm(area, generator=generator)[:number].view(count) for _ in range(2)]
    return torch.stack(planes)[None].to(device)


# Each is a function of the shapes of its arguments, all of which are differentiated.
DIFFERENTIABLE = {
    "plain": (lambda x, w: F.conv2d(x, w), (2, 2, 4, 3), (3, 2, 2, 2)),
    "bias": (lambda x, w, b: F.conv2d(x, w, b, padding=1), (1, 2, 3, 3), (2, 2, 3, 3), (2,)),
    "unbatched": (lambda x, w, b: F.conv2d(x, w, b), (2, 4, 3), (3, 2, 2, 2), (3,)),
    "stride": (
        lambda x, w, b: F.conv2d(x, w, b, (3, 2), (2, 1)),
        *((2, 1, 6, 5), (2, 1, 2, 3), (2,)),
    ),
    "same": (lambda x, w: F.conv2d(x, w, padding="same"), (1, 5, 3, 4), (2, 5, 2, 4)),
    "full": (lambda x, w: F.conv2d(x, w, padding="full"), (1, 2, 2, 3), (2, 2, 3, 2)),
    "dilation": (
        lambda x, w: F.conv2d(x, w, stride=(1, 2), padding=(2, 1), dilation=(3, 2)),
        *((1, 2, 5, 6), (2, 2, 2, 3)),
    ),
    "groups": (lambda x, w, b: F.conv2d(x, w, b, groups=2), (1, 4, 3, 4), (6, 2, 2, 2), (6,)),
    "depthwise": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=3),
        *((1, 3, 4, 3), (6, 1, 3, 3), (6,)),
    ),
    "relu": (
        lambda x, w, b: F.conv2d(x, w, b, activation="relu"),
        *((2, 5, 3, 4), (3, 5, 2, 2), (3,)),
    ),
    "residual": (
        lambda x, w, b, z: F.conv2d(x, w, b, padding=1, activation="relu", residual=z),
        *((1, 2, 3, 4), (2, 2, 3, 3), (2,), (1, 2, 3, 4)),
    ),
    "residual alone": (
        lambda x, w, z: F.conv2d(x, w, residual=z),
        *((1, 5, 3, 3), (2, 5, 2, 2), (1, 2, 2, 2)),
    ),
    "transposed": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 3), (1, 0), (1, 0)),
        *((1, 3, 3, 2), (3, 2, 3, 2), (2,)),
    ),
    "transposed groups": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, dilation=(1, 2), groups=2),
        *((1, 4, 2, 3), (4, 3, 2, 2)),
    ),
    "pooled": (
        lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_kernel_size=2),
        *((2, 2, 4, 5), (3, 2, 3, 3), (3,)),
    ),
    "pooled, overlapping": (
        lambda x, w: F.conv2d_relu_max_pool2d(
            *(x, w, None, (1, 2), 0, 1, 2),
            pool_kernel_size=3,
            pool_stride=2,
            pool_padding=1,
        ),
        *((1, 4, 5, 8), (4, 2, 2, 1)),
    ),
    "same argument twice": (lambda x: F.conv2d(x, x), (2, 2, 3, 3)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name, device):
    function, *shapes = DIFFERENTIABLE[name]
    inputs = leaves(device, *shapes)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_gradients_element_by_element(device):
    inputs = leaves(device, (1, 1, 3, 2), (2, 1, 2, 2), (2,), (1, 2, 2, 2))

    def function(x, w, bias, residual):
        return F.conv2d(x, w, bias, (2, 1), 1, (1, 2), activation="relu", residual=residual)

    assert gradcheck(function, inputs)


POOLED = {
    "pool": lambda x: F.max_pool2d(x, 2),
    "pool overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "pool dilated": lambda x: F.max_pool2d(x, 2, (1, 2), dilation=(2, 1), ceil_mode=True),
    "pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "pool and unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
}


@pytest.mark.parametrize("name", POOLED)
def test_gradients_of_pooling(name, device):
    x = distinct(device, 1, 2, 6, 4)
    assert gradcheck(POOLED[name], (x,), fast_mode=True)
    assert gradgradcheck(POOLED[name], (x,), fast_mode=True)


def test_gradients_of_unpooling(device):
    indices = places(device, (3, 2), (5, 4))

    def unpool(x):
        return F.max_unpool2d(x, indices, 2, (2, 2), output_size=(5, 4))

    inputs = leaves(device, (1, 2, 3, 2))
    assert gradcheck(unpool, inputs, fast_mode=True)
    assert gradgradcheck(unpool, inputs, fast_mode=True)


def test_second_derivatives_of_a_network(device):
    """They pass through several operators at once."""
    inputs = leaves(device, (2, 3, 6, 6), (5, 3, 3, 3), (4, 5, 2, 2))
    along = leaves(device, (2, 3, 6, 6), (5, 3, 3, 3), (4, 5, 2, 2))

    def products(module):
        x, w, v = inputs
        y = module.conv2d(module.max_pool2d(module.conv2d(x, w, padding=1).relu(), 2), v)
        gradients = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(gradients, inputs, along)

    torch.testing.assert_close(products(F), products(TF))


# What is kept for backward, and how gradients arrive and leave.


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_nothing_but_operands_and_result_is_kept(relu, device):
    x, w, bias, residual = leaves(
        device, *(t.shape for t in operands(PLAIN, torch.float32, device).inputs)
    )
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = conv2d(PLAIN, relu)(x, w, bias, residual)
    expected = {t.data_ptr() for t in ((x, w, y) if relu else (x, w))}
    assert {t.data_ptr() for t in kept} == expected


def test_pooling_keeps_one_byte_an_output(device):
    x = distinct(device, 2, 3, 6, 6)
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = F.max_pool2d(x, 2)
    assert [(t.shape, t.dtype.itemsize) for t in kept] == [(y.shape, 1)]


@pytest.mark.parametrize("g", params(ENGINES))
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean], ids=["sum", "mean"])
def test_gradients_that_arrive_expanded(g, reduce, device):
    t = operands(g, torch.float64, device, "channels_last")

    def gradients(convolution, *inputs):
        _, found = evaluate(lambda *v: reduce(convolution(*v)), inputs, inputs[0].new_ones(()))
        return found

    x, w, bias = (double(v) for v in (t.x, t.w, t.bias))
    right = gradients(torch_conv2d(g), x, w, bias, None)
    magnitudes = gradients(torch_conv2d(g), x.abs(), w.abs(), bias.abs(), None)
    ours = gradients(conv2d(g), t.x, t.w, t.bias, None)
    for name, *values in zip(("dx", "dw", "db"), ours, right, right, magnitudes, strict=False):
        assert_close(*values, name=name)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2), (1, 0, 3, 2)])
def test_a_parameters_gradient_has_its_strides(order, device):
    """In any dense order of the axes, of which channels_last is one."""
    t = operands(PLAIN, torch.float32, device)
    back = [order.index(axis) for axis in range(4)]
    w = t.w.permute(order).contiguous().permute(back).requires_grad_()
    conv2d(PLAIN)(t.x, w, None, None).backward(t.dy)
    assert w.grad.stride() == w.stride()
    (dw,) = torch.autograd.grad(conv_transpose2d(PLAIN)(t.dy, w, None).sum(), w)
    assert dw.stride() == w.stride()


def test_gradients_accumulate_in_place(device):
    t = operands(PLAIN, torch.float64, device)
    w = t.w.detach().requires_grad_()
    conv2d(PLAIN)(t.x, w, None, None).backward(t.dy)
    once, place = w.grad.clone(), w.grad.data_ptr()
    conv2d(PLAIN)(t.x, w, None, None).backward(t.dy)
    assert w.grad.data_ptr() == place
    torch.testing.assert_close(w.grad, 2 * once)


def test_an_input_changed_in_place_is_noticed(device):
    t = operands(PLAIN, torch.float32, device)
    x, w = t.x.clone(), t.w.detach().requires_grad_()
    y = conv2d(PLAIN)(x, w, None, None)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(t.dy)


def test_the_result_may_be_changed_in_place(device):
    t = operands(PLAIN, torch.float64, device)
    x = t.x.detach().requires_grad_()
    y = conv2d(PLAIN)(x, t.w, None, None)
    y.mul_(2)
    (ours,) = torch.autograd.grad(y, x, t.dy)
    (right,) = torch.autograd.grad(conv2d(PLAIN)(x, t.w, None, None), x, 2 * t.dy)
    assert torch.equal(ours, right)


# The operators, each by itself.


def operator_samples(device, dtype):
    """Arguments of each operator of the namespace, by name; what is differentiable requires it."""
    x, w, bias, y, x_bias = leaves(
        device, (2, 6, 5, 7), (4, 3, 3, 2), (4,), (2, 4, 3, 7), (6,), dtype=dtype
    )
    wide_x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    conv = ([2, 1], [1, 1, 1, 0], [1, 1], 2, None)
    pool = ([2, 3], [2, 2], [1, 1], [1, 1], True)
    pooled, argmax, _ = torch.ops.triton_cnn.max_pool2d(x.detach(), *pool, True, False)
    pooled.requires_grad_()
    fused, won = torch.ops.triton_cnn.conv2d_relu_max_pool2d(
        *(t.detach() for t in (x, w, bias)), *conv, *pool[:3], True
    )
    fused.requires_grad_()
    about = [5, 7], w.shape, w.stride()
    (unpooled,) = leaves(device, (1, 2, 5, 7), dtype=dtype)
    (values,) = leaves(device, (1, 2, 3, 4), dtype=dtype)
    indices = places(device, (3, 4), (5, 7))
    eight = [
        random(shape, torch.float32, device, seed=1)
        .to(torch.float8_e4m3fn)
        .contiguous(memory_format=torch.channels_last)
        for shape in ((2, 32, 5, 6), (16, 32, 3, 3))
    ]
    scale = torch.rand(16, device=device)
    images = torch.arange(2 * 6 * 5 * 7, device=device).view(2, 6, 5, 7).to(torch.uint8)
    wide_images = images.contiguous(memory_format=torch.channels_last)
    normalize = torch.rand(6, device=device) / 64, torch.rand(6, device=device)
    return {
        "channel_sum": [(y,)],
        "conv2d": [
            (x, w, bias, None, *conv, False),
            (wide_x, w, bias, y, *conv, True),
            (x, w, None, None, *conv, True),
        ],
        "conv2d_bytes": [
            (images, w, bias, *normalize, *conv, False),
            (wide_images, w, None, *normalize, *conv, True),
        ],
        "conv2d_bytes_wgrad": [(images, y, *normalize, w.shape, w.stride(), *conv, True)],
        "conv2d_fp8": [
            (*eight, scale, None, None, *conv[:3], 1, False),
            (*eight, scale[0], scale.bfloat16(), None, *conv[:3], 1, True),
        ],
        "conv2d_dgrad": [
            (y, w, None, [5, 7], *conv, False),
            (y, w, x_bias, [5, 7], *conv, True),
        ],
        "conv2d_wgrad": [
            (x, y, w.shape, w.stride(), *conv, True),
            (wide_x, y, w.shape, (18, 1, 6, 3), *conv, False),
        ],
        "conv2d_relu_max_pool2d": [
            (x, w, bias, *conv, *pool[:3], True),
            (wide_x, w, None, *conv, *pool[:3], True),
            (x.detach(), w.detach(), None, *conv, *pool[:3], False),
        ],
        "conv2d_relu_max_pool2d_backward": [
            (fused, won, x, w, *about, *conv, *pool[:3], False, (True, True, True)),
            (fused, won, None, w, *about, *conv, *pool[:3], True, (True, False, False)),
            (fused, won, x, None, *about, *conv, *pool[:3], False, (False, True, False)),
        ],
        "max_pool2d": [
            (x, *pool, True, True),
            (wide_x, *pool, True, False),
            (x.detach(), *pool, False, False),
        ],
        "max_pool2d_backward": [(pooled, argmax, [5, 7], *pool, False)],
        "max_pool2d_gather": [(x, argmax, *pool)],
        "max_unpool2d": [(values, indices, [5, 7])],
        "max_unpool2d_backward": [(unpooled, indices)],
        "relu_backward": [(y, (y - 0.5).detach(), True), (y, (y - 0.5).detach(), False)],
    }


OPERATORS = sorted(operator_samples(torch.device("cpu"), torch.float32))


def test_all_operators_are_checked():
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    assert sorted(name for space, name in names if space == "triton_cnn") == OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, device):
    # The other checks multiply inputs, which torch does not do in float8.
    checks = {"test_utils": "test_faketensor"} if name == "conv2d_fp8" else {}
    for arguments in operator_samples(device, torch.float32)[name]:
        opcheck(getattr(torch.ops.triton_cnn, name).default, arguments, **checks)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_differentiable_by_themselves(name, device):
    """As the Functions are, which the library itself calls."""
    operator = getattr(torch.ops.triton_cnn, name).default

    def function(*arguments):
        results = operator(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r for r in results if r.is_floating_point() and r.numel())

    for arguments in operator_samples(device, torch.float64)[name]:
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            assert gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize(("g", "layout"), params(CONV_CASES, ("contiguous", "channels_last")))
def test_fake_results_have_the_real_strides(g, layout, device):
    t = operands(g, torch.float32, device, layout)

    def everything(mode=None):
        inputs = [mode.from_tensor(v) if mode else v for v in (*t.inputs, t.dy)]
        *inputs, dy = [v.detach().requires_grad_() for v in inputs]
        y = conv2d(g, relu=True)(*inputs)
        return (y, *torch.autograd.grad(y, inputs, dy))

    with FakeTensorMode() as mode:
        fake = everything(mode)
    for ours, real in zip(fake, everything(), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (real.shape, real.stride(), real.dtype)


# torch.compile.


def network(x, w, v, bias):
    """Every operator that has a place in a network, over a size that changes from call to call."""
    y = F.conv2d(x, w, bias, 2, 1, activation="relu")
    y = F.conv2d(y, v, padding="same", residual=y, activation="relu")
    y = F.conv2d_relu_max_pool2d(y, v, bias, padding=1, pool_kernel_size=2, pool_stride=1)
    y, indices = F.max_pool2d(y, 2, return_indices=True)
    y = F.max_unpool2d(y, indices, 2)
    return F.conv_transpose2d(y, w, None, 2, 1)


def network_inputs(device, n, size, dtype=torch.float32):
    return leaves(device, (n, 3, size, size), (8, 3, 3, 3), (8, 8, 2, 2), (8,), dtype=dtype)


# What torch itself loads for this is written in its own, deprecated TorchScript.
old_torch = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")


def compiles(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=backend)
    for n, size in ((5, 12), (3, 16)):
        inputs = network_inputs(device, n, size)
        y, right = compiled(*inputs), network(*inputs)
        torch.testing.assert_close(y, right)
        assert y.stride() == right.stride()
        dy = torch.randn_like(right)
        ours, theirs = (torch.autograd.grad(r, inputs, dy) for r in (y, right))
        torch.testing.assert_close(ours, theirs)
        assert [t.stride() for t in ours] == [t.stride() for t in theirs]


def test_compiles_whole(device):
    compiles("aot_eager", device)


@old_torch
@pytest.mark.skipif(
    shutil.which("g++") is None and not torch.cuda.is_available(),
    reason="on the CPU Inductor needs a C++ compiler",
)
def test_compiles_with_inductor(device):
    compiles("inductor", device)


def test_a_new_batch_size_compiles_nothing(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for n, size in ((5, 12), (3, 16), (7, 20)):
        compiled(*network_inputs(device, n, size))
    assert counter.frame_count == 1


def test_exports(device):
    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return network(*tensors)

    inputs = network_inputs(device, 5, 12)
    program = cnn.export(Model(), inputs, kernels=True)
    torch.testing.assert_close(program.module()(*inputs), network(*inputs))


def test_compiled_double_backward_raises_torchs_own_error(device):
    torch._dynamo.reset()
    compiled = torch.compile(F.conv2d, fullgraph=True, backend="aot_eager")
    x, w = leaves(device, (1, 2, 4, 4), (3, 2, 2, 2))
    (dx,) = torch.autograd.grad(compiled(x, w).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.sum().backward()


# torch.func.


def conv2d_relu_max_pool2d(m, x, w, b):
    """Of one module or another."""
    if m is F:
        return F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, pool_kernel_size=3, pool_stride=2)
    return m.max_pool2d(m.relu(m.conv2d(x, w, b, 1, 1, 1, 2)), 3, 2)


TRANSFORMED = {
    "conv2d": (
        lambda m: lambda x, w, b: m.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 2),
        *((2, 4, 6, 5), (6, 2, 3, 2), (6,)),
    ),
    "depthwise": (
        lambda m: lambda x, w, b: m.conv2d(x, w, b, 1, 1, 1, 3),
        *((2, 3, 4, 5), (3, 1, 3, 3), (3,)),
    ),
    "conv_transpose2d": (
        lambda m: lambda x, w, b: m.conv_transpose2d(x, w, b, (2, 1), 1, (1, 0)),
        *((2, 3, 4, 5), (3, 2, 3, 3), (2,)),
    ),
    "conv2d_relu_max_pool2d": (
        lambda m: lambda x, w, b: conv2d_relu_max_pool2d(m, x, w, b),
        *((2, 4, 6, 5), (6, 2, 3, 2), (6,)),
    ),
    "max_pool2d": (lambda m: lambda x: m.max_pool2d(x, 3, 2, 1), (2, 3, 7, 6)),
    "pool and unpool": (
        lambda m: lambda x: m.max_unpool2d(*m.max_pool2d(x, 2, return_indices=True), 2),
        (2, 3, 6, 6),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_grad(name, device):
    of, *shapes = TRANSFORMED[name]
    inputs = [t.detach() for t in leaves(device, *shapes)]
    every = tuple(range(len(inputs)))
    ours, right = (
        torch.func.grad(lambda *a, m=m: of(m)(*a).pow(3).sum(), argnums=every)(*inputs)
        for m in (F, TF)
    )
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_vjp(name, device):
    """The function it returns is called when the transform has ended, and again."""
    of, *shapes = TRANSFORMED[name]
    inputs = [t.detach() for t in leaves(device, *shapes)]
    pulled = {m: torch.func.vjp(of(m), *inputs) for m in (F, TF)}
    for scale in (1, -2):
        ours, right = (back(y.detach() * scale) for y, back in pulled.values())
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_vmap(name, device):
    """Over any of the arguments, and along any axis; and over the gradients of each."""
    of, *shapes = TRANSFORMED[name]
    single = leaves(device, *shapes)
    mapped = leaves(device, *((3, *shape) for shape in shapes))
    every = tuple(range(len(shapes)))
    gradients = {
        m: torch.func.grad(lambda *a, m=m: of(m)(*a).pow(3).sum(), argnums=every) for m in (F, TF)
    }
    for chosen in itertools.product([False, True], repeat=len(shapes)):
        if not any(chosen):
            continue
        in_dims = tuple(0 if c else None for c in chosen)
        arguments = [m if c else t for m, t, c in zip(mapped, single, chosen, strict=True)]
        for ours, theirs in ((of(F), of(TF)), (gradients[F], gradients[TF])):
            each = [
                theirs(*(a[i] if c else a for a, c in zip(arguments, chosen, strict=True)))
                for i in range(3)
            ]
            right = tree_map(lambda *t: torch.stack(t), *each)
            torch.testing.assert_close(torch.vmap(ours, in_dims)(*arguments), right)
    along = torch.vmap(of(F), (2, *[None] * (len(shapes) - 1)), out_dims=1)
    right = torch.stack([of(TF)(x, *single[1:]) for x in mapped[0]], 1)
    torch.testing.assert_close(along(mapped[0].movedim(0, 2), *single[1:]), right)


def test_gradients_of_each_sample(device):
    """vmap over grad: the use that per-sample gradients make of it."""
    x, w, bias = (t.detach() for t in leaves(device, (4, 3, 5, 5), (4, 3, 3, 3), (4,)))

    def loss(w, bias, image):
        return F.conv2d(image, w, bias, padding=1, activation="relu").pow(2).sum()

    ours = torch.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(w, bias, x)
    for i, image in enumerate(x):
        w_i, bias_i = w.clone().requires_grad_(), bias.clone().requires_grad_()
        y = TF.conv2d(image, w_i, bias_i, padding=1).relu().pow(2).sum()
        right = torch.autograd.grad(y, (w_i, bias_i))
        torch.testing.assert_close((ours[0][i], ours[1][i]), right)


@old_torch
@pytest.mark.parametrize("name", TRANSFORMED)
def test_forward_mode_raises_clearly(name, device):
    of, *shapes = TRANSFORMED[name]
    inputs = tuple(t.detach() for t in leaves(device, *shapes))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward mode|forward AD"):
        torch.func.jvp(of(F), inputs, inputs)


# What torch counts and refuses.


@pytest.mark.parametrize("g", params(ENGINES))
def test_flops(g, device):
    """Counted as torch counts its own, but for its wgrad of groups, which it takes for dense."""
    t = operands(g, torch.float32, device)
    padding = g.padding[0][0], g.padding[1][0]
    counts = {}
    for module in (TF, F):
        x, w = t.x.detach().requires_grad_(), t.w.detach().requires_grad_()
        with FlopCounterMode(display=False) as forward:
            y = module.conv2d(x, w, t.bias, g.stride, padding, g.dilation, g.groups)
            z = module.conv_transpose2d(y, w, None, g.stride, padding, 0, g.groups, g.dilation)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(z.sum(), (x, w))
        counts[module] = forward.get_total_flops(), backward.get_total_flops()
    transposed = counts[F][0] - g.flops
    assert counts[F][0] == counts[TF][0]
    assert counts[F][1] == 2 * (g.flops + transposed)
    assert counts[TF][1] == (1 + g.groups) * (g.flops + transposed)


@pytest.mark.parametrize("other", ["w", "bias", "residual"])
def test_tensors_on_different_devices_are_refused(other, device):
    t = operands(PLAIN, torch.float32, device)
    tensors = {"w": t.w, "bias": t.bias, "residual": t.residual}
    tensors[other] = tensors[other].to("meta")
    before = kernel_device.launches()
    with pytest.raises(RuntimeError):
        F.conv2d(t.x, tensors["w"], tensors["bias"], padding=1, residual=tensors["residual"])
    assert kernel_device.launches() == before


def test_meta_tensors_give_shapes():
    x, w = torch.empty((2, 3, 8, 8), device="meta"), torch.empty((4, 3, 3, 3), device="meta")
    y = F.max_pool2d(F.conv2d(x, w, padding="same", activation="relu"), 3, 2)
    assert y.device.type == "meta"
    assert y.shape == (2, 4, 3, 3)


@old_torch
def test_forward_mode_is_refused_without_gradients_too(device):
    """Rather than dropping the tangent."""
    x = torch.randn(1, 4, 5, 5, device=device)
    w = torch.randn(4, 4, 3, 3, device=device)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError)):
            F.conv2d(dual, w)
