"""What PyTorch's dispatcher and its tools make of a call: lazy values, modes, transforms, traces.

A call on plain tensors passes the dispatcher by, so here are the tensors and moments that are not.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as TF
from cases import random
from test_autograd import TRANSFORMED, leaves, old_torch, operator_samples
from test_replay import CALLS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import hessian, jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import cnn.functional as F
from cnn import arguments
from kernels.ops.dispatch import operators

# Values that are not what lies in memory.


def negated_twice(t):
    """t in value, but in memory its negative: what the imaginary part of a conjugate is like."""
    return torch._neg_view(-t)


LAZY = {  # what a tensor is replaced by, and what that is in value
    "negated": (negated_twice, lambda t: t),
    "zero": (
        lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device),
        torch.zeros_like,
    ),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("name", [name for name, op in operators.items() if op.function])
def test_operators_read_values_and_not_memory(name, lazy, device):
    """Of each operand; gradients of any order are further operators."""
    replaced, in_value = LAZY[lazy]
    operator = operators[name]
    count = operator.tensors
    for given in operator_samples(device, torch.float32)[name]:
        tensors = [None if t is None else t.detach() for t in given[:count]]
        numbers = [tuple(n) if isinstance(n, list) else n for n in given[count:]]
        for i, t in enumerate(tensors):
            if t is None or t.dtype == torch.uint8:
                continue
            results, expected = (
                operator(*tensors[:i], change(t), *tensors[i + 1 :], *numbers)
                for change in (replaced, in_value)
            )
            assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_a_kept_call_is_not_for_lazy_values(name, device):
    call, shapes = CALLS[name]
    operands = [random(shape, torch.float32, device, i) for i, shape in enumerate(shapes)]
    with torch.no_grad():
        expected = call(*operands)
        assert call(*operands).equal(expected)
        for i, t in enumerate(operands):
            assert call(*operands[:i], negated_twice(t), *operands[i + 1 :]).equal(expected)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_that_arrive_lazily(name, device):
    """In backward and double backward: of a sum, say, whose parts a complex map has taken."""
    call, shapes = CALLS[name]
    operands = leaves(device, *shapes)

    def derivatives(lazy):
        y = call(*operands)
        dy = lazy(random(y.shape, y.dtype, device, 7)).requires_grad_()
        first = torch.autograd.grad(y, operands, dy, create_graph=True)
        more = [lazy(random(t.shape, t.dtype, device, 8)) for t in first]
        second = torch.autograd.grad(first, [dy, *operands], more, allow_unused=True)
        return [*first, *[t for t in second if t is not None]]

    assert_close(derivatives(negated_twice), derivatives(lambda t: t))


def test_parts_of_a_complex_map(device):
    z = torch.view_as_complex(random((1, 2, 6, 6, 2), torch.float32, device, 0)).conj()
    w = random((3, 2, 3, 3), torch.float32, device, 1)
    assert z.imag.is_neg()
    assert_close(F.conv2d(z.imag, w), TF.conv2d(z.imag, w))


def test_functional_tensors(device):
    x, w = (
        random((1, 2, 5, 5), torch.float32, device, 0),
        random((3, 2, 3, 3), torch.float32, device, 0),
    )
    expected = F.conv2d(x, w)
    y = F.conv2d(torch._to_functional_tensor(x), torch._to_functional_tensor(w))
    assert torch._from_functional_tensor(y).equal(expected)


@pytest.mark.parametrize("name", ["x", "w"])
def test_memory_that_was_given_back_is_not_read(name, device):
    """As parameters are between the steps of a sharded model."""
    tensors = {
        "x": random((1, 2, 5, 5), torch.float32, device, 0),
        "w": random((3, 2, 3, 3), torch.float32, device, 0),
    }
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory is allocated"):
        F.conv2d(*tensors.values())


# What is kept serves all modes.

NORMALIZE = (0.5, 0.25, 1.0), 2.0


def first(x, w):
    return F.conv2d(x, w, normalize=NORMALIZE)


def in_mode(mode):
    def use(x, w):
        with mode():
            first(x, w)

    return use


def fake(x, w):
    with FakeTensorMode() as mode:
        first(mode.from_tensor(x), mode.from_tensor(w))


MODES = {
    "inference": in_mode(torch.inference_mode),
    "no_grad": in_mode(torch.no_grad),
    "fake": fake,
    "traced": lambda x, w: make_fx(first, tracing_mode="fake")(x, w),
    "compiled": lambda x, w: torch.compile(first, backend="aot_eager")(x, w),
    "vmap": lambda x, w: torch.vmap(first, (None, 0))(x, torch.stack([w, w])),
    "func.grad": lambda x, w: torch.func.grad(lambda w: first(x, w).sum())(w),
    "functionalized": lambda x, w: torch.func.functionalize(first)(x, w),
}


@old_torch
@pytest.mark.parametrize("mode", MODES)
def test_constants_made_in_any_mode_serve_training(mode, device):
    x = torch.arange(192, device=device).to(torch.uint8).view(1, 3, 8, 8)
    w = random((4, 3, 3, 3), torch.float32, device, 0)
    arguments._on_device.cache_clear()
    MODES[mode](x, w)
    w.requires_grad_()
    scale = torch.tensor(NORMALIZE[0], device=device)[:, None, None]
    y, z = first(x, w), TF.conv2d(x * scale + NORMALIZE[1], w)
    assert type(y) is torch.Tensor
    assert_close(y, z)
    ours, theirs = (torch.autograd.grad(r.sum(), w) for r in (y, z))
    assert_close(ours, theirs)


@pytest.mark.parametrize("mapped", [(0, None, None), (1, 0, None), (None, None, 0), (0, 0, 0)])
def test_images_of_bytes_are_mapped(mapped, device):
    """Images, filters and the numbers that normalize, and the gradient of the filters."""
    shapes = (1, 3, 5, 4), (4, 3, 3, 3), (3,)
    x, w, scale = (
        random(s if dim is None else (*s[:dim], 2, *s[dim:]), torch.float32, device, i)
        for i, (s, dim) in enumerate(zip(shapes, mapped, strict=True))
    )
    x, scale = (x * 50 + 128).to(torch.uint8), scale / 64

    def ours(x, w, scale):
        return F.conv2d(x, w, normalize=(scale, 0.5))

    def theirs(x, w, scale):
        return TF.conv2d(x * scale[:, None, None] + 0.5, w)

    def gradient(function):
        return torch.func.grad(lambda w, x, scale: function(x, w, scale).pow(2).sum())

    assert_close(*(torch.vmap(f, mapped)(x, w, scale) for f in (ours, theirs)))
    dims = mapped[1], mapped[0], mapped[2]
    both = [torch.vmap(gradient(f), dims)(w, x, scale) for f in (ours, theirs)]
    assert_close(*both, rtol=1e-5, atol=1e-4)


# Transforms of transforms, and what is vectorised.


def losses(of, m):
    return lambda *a: of(m)(*a).pow(3).sum()


@old_torch
@pytest.mark.parametrize("name", TRANSFORMED)
def test_jacobians_are_vectorised(name, device):
    """``autograd.grad(is_grads_batched=True)``, on which they stand, has a vmap of its own."""
    of, *shapes = TRANSFORMED[name]
    x, *rest = (t.detach() for t in leaves(device, *shapes))
    inputs = (x[:1, :, :4, :4].clone(), *rest)
    ours, theirs = (jacobian(of(m), inputs, vectorize=True) for m in (F, TF))
    assert_close(ours, theirs)


@old_torch
@pytest.mark.parametrize("name", ["conv2d", "conv2d_relu_max_pool2d"])
def test_hessians_are_vectorised(name, device):
    of, *shapes = TRANSFORMED[name]
    x, *rest = (t.detach() for t in leaves(device, *shapes))

    def of_x(m):
        return hessian(lambda x: losses(of, m)(x, *rest), x[:1, :, :3, :3].clone(), vectorize=True)

    assert_close(of_x(F), of_x(TF))


@pytest.mark.parametrize("within", [nullcontext, torch.no_grad], ids=["recorded", "no_grad"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_grad_of_func_grad(name, within, device):
    """Each level records what its own grad mode tells it to."""
    of, *shapes = TRANSFORMED[name]
    inputs = tuple(t.detach() for t in leaves(device, *shapes))
    every = tuple(range(len(inputs)))

    def second(m):
        def loss(*a):
            with within():
                y = of(m)(*a)
            return (y * of(m)(*a)).sum()

        def slope(*a):
            return torch.func.grad(loss)(*a).pow(2).sum()

        return torch.func.grad(slope, every)(*inputs)

    assert_close(second(F), second(TF))


def test_autograd_beyond_func_grad(device):
    """What a transformed function takes from outside gets its gradient there."""
    x, w = leaves(device, (1, 2, 5, 5), (3, 2, 3, 3))

    def outside(m):
        slope = torch.func.grad(lambda s: m.conv2d(x * s, w * s).pow(2).sum())
        return torch.autograd.grad(slope(torch.ones_like(x[0, 0, 0, 0])), (x, w))

    assert_close(outside(F), outside(TF))


COMPILED = {
    "grad": lambda of, m, every: torch.func.grad(losses(of, m), every),
    "jacrev": lambda of, m, every: torch.func.jacrev(of(m)),
}


@old_torch
@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiled_transforms(name, transform, device):
    of, *shapes = TRANSFORMED[name]
    inputs = [t.detach() for t in leaves(device, *shapes)]
    ours, theirs = (COMPILED[transform](of, m, tuple(range(len(inputs)))) for m in (F, TF))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), theirs(*inputs))


@old_torch
@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiled_gradients_of_each(name, device):
    of, *shapes = TRANSFORMED[name]
    inputs = [t.detach() for t in leaves(device, *((2, *shape) for shape in shapes))]
    ours, theirs = (torch.func.grad(losses(of, m), tuple(range(len(inputs)))) for m in (F, TF))
    torch._dynamo.reset()
    compiled = torch.compile(torch.vmap(ours), backend="aot_eager", fullgraph=True)
    each = [theirs(*(t[i] for t in inputs)) for i in range(2)]
    assert_close(compiled(*inputs), tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("name", ["channel_sum", "conv2d_dgrad"])
def test_jit_trace_is_refused(name, device):
    (given, *_) = operator_samples(device, torch.float32)[name]
    operator = getattr(torch.ops.triton_cnn, name)
    with pytest.raises(NotImplementedError, match=f"triton_cnn::{name}: use torch.export"):
        torch.jit.trace(lambda x: operator(x, *given[1:]), given[0].detach())
