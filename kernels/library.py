"""The operators ``torch.ops.triton_cnn``: allocation, planning and launch, with fake versions.

All take batched N, C, H, W tensors and normalized arguments: pairs are (height, width), padding
is (top, bottom, left, right). A CUDA tensor always runs the kernels; a CPU tensor runs them in
Triton's interpreter (TRITON_INTERPRET=1 at import) or emulated (``device.emulate``), and is
otherwise refused.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import aten, autotune, device, planner, replay, vmap
from ._private import constant_while_traced, is_transformed, is_watched
from .conv import relu_backward
from .conv.engine import Call, Dgrad, Fprop, Normalization, Plan, PooledConv, Wgrad
from .device import describe
from .geometry import (
    Conv2dGeometry,
    Direction,
    Pool2dGeometry,
    conv_output_sizes,
    dense_strides,
    is_channels_last,
    output_strides,
)
from .lang.epilogue import Epilogue
from .pool import max_pool, max_unpool, pool_gradient
from .pool.pool_gradient import PoolGradient
from .problem import Problem, layout_of

_library = torch.library.Library("triton_cnn", "DEF")

_CONV = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str? precision"
_POOL = "SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode"


_implementations: dict[str, tuple[Callable, Callable]] = {}  # on a GPU, on the CPU
_operands: dict[str, int] = {}  # how many of an operator's arguments, the first, are tensors
_recordings: dict[tuple, replay.Recording] = {}  # of calls on kernels, by all they follow from
_PLAIN = {Tensor, Parameter}


def _define(schema: str, kernels: Callable, fake: Callable) -> None:
    name = schema.split("(")[0]
    _operands[name] = count = schema.split("->")[0].count("Tensor")
    kept = _kept(name, kernels, count)
    _library.define(schema)

    def on_cpu(*args: Any) -> Any:
        if device.takes_cpu():
            return kept(*args)
        raise NotImplementedError(
            f"triton_cnn::{name} takes CPU tensors only under TRITON_INTERPRET=1, to be set before "
            "Triton is imported; without it cnn.functional calls torch's operators"
        )

    _implementations[name] = kept, on_cpu
    for where, function in zip(("CUDA", "CPU"), _implementations[name], strict=True):
        _library.impl(name, _of_dispatcher(name, function, count), where)
    _library.impl(name, partial(_refuse_trace, name), "Tracer")
    torch.library.register_fake(f"triton_cnn::{name}", fake, lib=_library)


def _kept(name: str, kernels: Callable, count: int) -> Callable[..., Any]:
    """An implementation that replays a call which comes again; its first ``count`` arguments are
    tensors or None, the others can be hashed.
    """

    def call(*args: Any) -> Any:
        if not _may_replay():
            return kernels(*args)
        key = _key(name, args, count)
        if (recording := _recordings.get(key)) is not None:
            return recording(*args[:count])
        results, recording = replay.record(kernels, args[:count], *args[count:])
        if recording.complete:
            if len(_recordings) >= 4096:
                _recordings.clear()
            _recordings[key] = recording
        return results

    return call


def _may_replay() -> bool:
    return device.may_replay() and not autotune.is_enabled()


def _of_dispatcher(name: str, function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The implementation as the dispatcher calls it: with lists, and with whatever tensors."""

    def call(*args: Any) -> Any:
        for t in args[:count]:
            if t is not None and not t.data_ptr() and t.numel():
                raise RuntimeError(
                    f"{name} needs tensors whose memory is allocated, got one of {list(t.shape)} "
                    "whose storage is empty"
                )
        return function(*with_tuples(args))

    return call


def with_tuples(args: Sequence[Any]) -> tuple:
    """An operator's arguments, of which the dispatcher brings pairs as lists."""
    return tuple([tuple(value) if type(value) is list else value for value in args])


def _key(name: str, args: tuple, count: int) -> tuple:
    key: list[Any] = [name, describe(args[0].device)]
    single = None
    for t in args[:count]:
        if t is None:
            key.append(None)
        else:
            key += (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)
            if t.dtype == torch.float32:
                single = t
    key += args[count:]
    if single is not None:
        key.append(resolve_precision(None, single))
    return tuple(key)


def operands(name: str) -> int:
    return _operands[name]


def launching(name: str) -> Callable[..., Any]:
    """The implementation of an operator that launches its kernels, whatever its tensors are on: for
    tensors of the meta device where launches only compile.
    """
    on_gpu, _ = _implementations[name]
    return on_gpu


def recording_of(name: str, operands: Sequence[Tensor | None], *rest: Any) -> Any:
    """What a call of an operator, which has been made, replays; None if it is not kept."""
    return _recordings.get(_key(name, (*operands, *rest), len(operands)))


def dispatched(name: str) -> Any:
    """``torch.ops.triton_cnn.NAME``."""
    return getattr(torch.ops.triton_cnn, name).default


@constant_while_traced
def meet_subclasses() -> None:
    """Tell DTensor of the operators, if it has been imported: before a call that it may be in."""
    if "torch.distributed.tensor" in sys.modules:
        _register_sharding()


@cache
def _register_sharding() -> None:
    from . import sharding

    sharding.register()


def direct(name: str) -> Callable[..., Any]:
    """An operator's implementation, for tensors that are plain and with nothing left to record."""
    (on_gpu, on_cpu), through = _implementations[name], dispatched(name)

    def call(*args: Any) -> Any:
        if args[0].is_cuda:
            return on_gpu(*args)
        return on_cpu(*args) if args[0].is_cpu else through(*args)

    return call


def operator(name: str) -> Callable[..., Any]:
    """An operator without gradients: past the dispatcher if nothing is left for it to do."""
    past, through, count = direct(name), dispatched(name), _operands[name]

    def call(*args: Any) -> Any:
        if is_plain(args[:count]):
            return past(*args)
        meet_subclasses()
        return through(*args)

    return call


def _refuse_trace(name: str, *args: Any) -> Any:
    raise NotImplementedError(f"torch.jit.trace does not take triton_cnn::{name}: use torch.export")


def register_autograd(name: str, kernel: Callable[..., Any]) -> None:
    """Of a kernel that is given the keys left to dispatch on and the operator's arguments."""
    _library.impl(name, kernel, "Autograd", with_keyset=True)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on the tensors may pass PyTorch's dispatcher by: nothing watches it, and their
    values are what lies in their memory.

    That is not so of tensors of other classes, of lazily negated ones, and of all that have no
    memory: wrappers of a transform, also of one that has ended, zeros that are none but in name,
    functional tensors. To ask each tensor for its dispatch keys would take three times as long.
    """
    if is_watched():
        return False
    try:
        for t in tensors:
            if t is not None and (type(t) not in _PLAIN or t.is_neg() or not t.data_ptr()):
                return False
    except RuntimeError:  # wrappers do not tell where their memory is
        return False
    return True


def is_recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd has something to do for a call: to record it, or to refuse it."""
    return (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ) or is_transformed()


def runs_kernels(x: Tensor) -> bool:
    return x.is_cuda or (x.is_cpu and device.takes_cpu())


def setting(x: Tensor) -> tuple | None:
    """What kernels called on x depend on besides arguments; None if the call may not be kept."""
    if is_watched() or not _may_replay():
        return None
    precision = x.dtype == torch.float32 and resolve_precision(None, x)
    return describe(x.device), precision, torch.is_grad_enabled()


def _new(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return replay.new(like, shape, output_strides(shape, channels_last))


def _like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return replay.new(t, t.shape, dense_strides(t.shape, t.stride()), dtype)


def _vector(like: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    return replay.new(like, (size,), (1,), dtype)


def _channels_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


def _packed(w: Tensor, images: Sequence[Tensor | None], here: device.Device) -> Tensor:
    """w, copied with its channels side by side if the images have theirs so: it is small, and
    gathering it is not.
    """
    rows = all(t is None or t.stride(1) == 1 for t in images)
    if w.stride(1) == 1 or not rows or not here.descriptors:
        return w
    return replay.derive(w, partial(Tensor.contiguous, memory_format=torch.channels_last))


def resolve_precision(precision: str | None, x: Tensor) -> str:
    """How float32 products are made: as asked, else as torch's own convolution is set to.

    AMD's gfx942 has tf32 but no split of it: bf16x6, as accurate, stands for tf32x3 there.
    """
    if x.dtype != torch.float32 or describe(x.device).backend == "interpreter":
        return "ieee"
    if precision is None:
        cudnn: Any = torch.backends.cudnn  # its settings are not in the stubs
        setting = cudnn.conv.fp32_precision
        precision = "tf32" if setting == "tf32" else "ieee"
    if torch.version.hip:
        precision = "bf16x6" if precision == "tf32x3" else precision
        known = precision != "tf32" or describe(x.device).arch == "gfx942"
        return precision if known else "ieee"
    return precision


def _run(
    call: Call,
    images: tuple[Tensor | None, ...],
    filters: tuple[Tensor, ...],
    reference: Callable[..., tuple[Tensor, ...]],  # ATen's results from the operands
) -> None:
    """Launch the planned plan, the one that measuring chooses, or to warm up the whole family.

    Of fprop and dgrad the result is the first of ``images``.
    """
    like = next(t for t in call.results if t is not None)
    here, layout = describe(like.device), layout_of(images, filters)
    problem = Problem(call.direction, call.g, like.dtype, call.precision, here, layout)
    if device.is_warming_up():
        plans = planner.family(problem)
    elif autotune.is_enabled():
        plans = [_fastest(problem, call, reference)]
    else:
        plans = [planner.plan(problem)]
    for plan in plans:
        plan.engine.launch(call, plan.tile)


def _fastest(problem: Problem, call: Call, reference: Callable[..., Any]) -> Plan:
    def run(plan: Plan, *operands: Tensor | None) -> tuple[Tensor, ...]:
        fresh = [
            None if t is None else t.new_empty_strided(t.shape, t.stride()) for t in call.results
        ]
        plan.engine.launch(call.on(operands, fresh), plan.tile)
        return tuple(t for t in fresh if t is not None)

    fused = call.epilogue.relu if isinstance(call, Fprop) else len(call.results) > 1
    variant = "".join("01"[t is not None] for t in call.operands) + "-fused" * fused
    return autotune.choose(problem, call.operands, run, reference, variant)


# Convolution in its three directions.


def _conv2d_empty(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    size = conv_output_sizes(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return _new(x, (x.shape[0], w.shape[0], *size), _channels_last(x, w))


def _conv2d(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    y = _conv2d_empty(x, w, bias, residual, stride, padding, dilation, groups, precision, relu)
    arguments = stride, padding, dilation, groups
    g = Conv2dGeometry.of(x.shape, w.shape, *arguments)

    def reference(x, w, bias, residual):
        return (aten.conv2d(x, w, bias, residual, *arguments, None, relu),)

    w = _packed(w, (y, x, residual), describe(x.device))
    after = Epilogue(None if bias is None else replay.contiguous(bias), residual, relu)
    call = Fprop(x, w, y, g, resolve_precision(precision, x), after)
    _run(call, (y, x, residual), (w,), reference)
    return y


def _conv2d_fp8_empty(x, w, scale, bias, residual, stride, padding, dilation, groups, relu):
    y = _conv2d_empty(x, w, bias, residual, stride, padding, dilation, groups, None, relu)
    return _like(y, torch.bfloat16)


def _conv2d_fp8(x, w, scale, bias, residual, stride, padding, dilation, groups, relu):
    g = Conv2dGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    y = _conv2d_fp8_empty(x, w, scale, bias, residual, stride, padding, dilation, groups, relu)
    if 0 in y.shape:
        return y
    here, layout = describe(x.device), layout_of((x, y, residual), (w,))
    plan = planner.plan_fused("scale", Problem("fprop", g, x.dtype, "ieee", here, layout))
    if plan is None:
        raise NotImplementedError(
            "float8 needs a GPU with tensor descriptors, groups that fill blocks of channels, and "
            "channels_last operands whose rows are multiples of 16 bytes, got input of "
            f"{list(x.shape)} and weight of {list(w.shape)} with groups={groups} on {x.device}"
        )
    scale = replay.derive(scale, lambda scale: scale.expand(g.K).contiguous())
    bias = None if bias is None else replay.contiguous(bias)
    call = Fprop(x, w, y, g, epilogue=Epilogue(bias, residual, relu, scale))
    plan.engine.launch(call, plan.tile)
    return y


def _conv2d_bytes_empty(
    x, w, bias, scale, shift, stride, padding, dilation, groups, precision, relu
):
    size = conv_output_sizes(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return _new(w, (x.shape[0], w.shape[0], *size), _channels_last(x, w))


def _conv2d_bytes(x, w, bias, scale, shift, stride, padding, dilation, groups, precision, relu):
    arguments = stride, padding, dilation, groups
    y = _conv2d_bytes_empty(x, w, bias, scale, shift, *arguments, precision, relu)
    g = Conv2dGeometry.of(x.shape, w.shape, *arguments)
    bias = None if bias is None else replay.contiguous(bias)
    kind = resolve_precision(precision, w)
    values = Normalization(replay.contiguous(scale), replay.contiguous(shift))
    _launch_on_bytes(Fprop(x, w, y, g, kind, Epilogue(bias, relu=relu), values), w)
    return y


def _launch_on_bytes(call: Fprop | Wgrad, like: Tensor) -> None:
    """Launch a call whose x has bytes that count as values of like's dtype."""
    here = describe(like.device)
    problem = Problem(call.direction, call.g, like.dtype, call.precision, here)
    plan = planner.plan_fused("bytes", problem)
    assert plan is not None, call.g  # cnn.functional takes few channels only
    plan.engine.launch(call, plan.tile)


def _conv2d_bytes_wgrad_empty(
    x, dy, scale, shift, size, strides, stride, padding, dilation, groups, precision, bias
) -> tuple[Tensor, Tensor]:
    return _wgrad_empty(dy, dy, size, strides, stride, padding, dilation, groups, precision, bias)


def _conv2d_bytes_wgrad(
    x, dy, scale, shift, size, strides, stride, padding, dilation, groups, precision, bias
) -> tuple[Tensor, Tensor]:
    arguments = stride, padding, dilation, groups
    dw, db = _wgrad_empty(dy, dy, size, strides, *arguments, precision, bias)
    g = Conv2dGeometry.of(x.shape, size, *arguments)
    kind = resolve_precision(precision, dy)
    values = Normalization(replay.contiguous(scale), replay.contiguous(shift))
    _launch_on_bytes(Wgrad(x, dy, dw, db if bias else None, g, kind, values), dy)
    return dw, db


def _dgrad_empty(dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last):
    return _new(dy, (dy.shape[0], w.shape[1] * groups, *size), channels_last)


def _conv2d_dgrad(dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last):
    arguments = stride, padding, dilation, groups
    dx = _dgrad_empty(dy, w, bias, size, *arguments, precision, channels_last)
    g = Conv2dGeometry.of(dx.shape, w.shape, *arguments)

    def reference(dy, w, bias):
        return (aten.conv2d_dgrad(dy, w, bias, size, *arguments, None, channels_last),)

    w = _packed(w, (dx, dy), describe(dy.device))
    bias = None if bias is None else replay.contiguous(bias)
    call = Dgrad(dy, w, dx, g, resolve_precision(precision, dy), bias)
    _run(call, (dx, dy), (w,), reference)
    return dx


def _wgrad_empty(
    x, dy, size, strides, stride, padding, dilation, groups, precision, bias
) -> tuple[Tensor, Tensor]:
    return replay.new(x, size, dense_strides(size, strides)), _vector(x, size[0] if bias else 0)


def _conv2d_wgrad(x, dy, size, strides, stride, padding, dilation, groups, precision, bias):
    arguments = stride, padding, dilation, groups
    dw, db = _wgrad_empty(x, dy, size, strides, *arguments, precision, bias)
    g = Conv2dGeometry.of(x.shape, size, *arguments)

    def reference(x, dy):
        results = aten.conv2d_wgrad(x, dy, size, strides, *arguments, None, bias)
        return results if bias else results[:1]

    call = Wgrad(x, dy, dw, db if bias else None, g, resolve_precision(precision, x))
    _run(call, (x, dy), (), reference)
    return dw, db


def _channel_sum_empty(dy: Tensor) -> Tensor:
    return _vector(dy, dy.shape[1])


def _channel_sum(dy: Tensor) -> Tensor:
    db = _channel_sum_empty(dy)
    N, K, P, Q = dy.shape
    g = Conv2dGeometry(N, K, P, Q, K, 1, 1)
    here, layout = describe(dy.device), layout_of((dy,), ())
    plan = planner.plan(Problem("wgrad", g, dy.dtype, "ieee", here, layout))
    plan.engine.launch(Wgrad(dy, dy, None, db, g), plan.tile)
    return db


def _relu_backward_empty(dy: Tensor, y: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return _like(y), _vector(y, y.shape[1] if bias else 0)


def _relu_backward(dy: Tensor, y: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    dz, db = _relu_backward_empty(dy, y, bias)
    relu_backward.relu_backward(dy, y, dz, db if bias else None)
    return dz, db


_define(
    f"conv2d(Tensor x, Tensor w, Tensor? bias, Tensor? residual, {_CONV}, bool relu) -> Tensor",
    _conv2d,
    _conv2d_empty,
)
_define(
    f"conv2d_dgrad(Tensor dy, Tensor w, Tensor? bias, SymInt[2] size, {_CONV}, bool channels_last)"
    " -> Tensor",
    _conv2d_dgrad,
    _dgrad_empty,
)
_define(
    f"conv2d_wgrad(Tensor x, Tensor dy, SymInt[4] size, SymInt[4] strides, {_CONV}, bool bias)"
    " -> (Tensor, Tensor)",
    _conv2d_wgrad,
    _wgrad_empty,
)
_define(
    "conv2d_fp8(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor? residual, SymInt[2] stride,"
    " SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool relu) -> Tensor",
    _conv2d_fp8,
    _conv2d_fp8_empty,
)
_define(
    f"conv2d_bytes(Tensor x, Tensor w, Tensor? bias, Tensor scale, Tensor shift, {_CONV}, bool"
    " relu) -> Tensor",
    _conv2d_bytes,
    _conv2d_bytes_empty,
)
_define(
    "conv2d_bytes_wgrad(Tensor x, Tensor dy, Tensor scale, Tensor shift, SymInt[4] size, SymInt[4]"
    f" strides, {_CONV}, bool bias) -> (Tensor, Tensor)",
    _conv2d_bytes_wgrad,
    _conv2d_bytes_wgrad_empty,
)
_define("channel_sum(Tensor dy) -> Tensor", _channel_sum, _channel_sum_empty)
_define(
    "relu_backward(Tensor dy, Tensor y, bool bias) -> (Tensor, Tensor)",
    _relu_backward,
    _relu_backward_empty,
)


# Max-pooling: its argmax is the tap that won in each window.


def _pool(x_shape, kernel, stride, padding, dilation, ceil_mode) -> Pool2dGeometry:
    pairs = (tuple(pair) for pair in (kernel, stride, padding, dilation))
    return Pool2dGeometry(*x_shape, *pairs, ceil_mode)  # type: ignore[arg-type]


def _max_pool2d_empty(x, kernel, stride, padding, dilation, ceil_mode, argmax, indices):
    g = _pool(x.shape, kernel, stride, padding, dilation, ceil_mode)
    y = _new(x, g.y_shape, _channels_last(x))
    argmax_dtype = max_pool.argmax_dtype(g)
    kept = _like(y, argmax_dtype) if argmax else _vector(y, 0, argmax_dtype)
    return y, kept, _like(y, torch.int64) if indices else _vector(y, 0, torch.int64)


def _max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, argmax, indices):
    results = _max_pool2d_empty(x, kernel, stride, padding, dilation, ceil_mode, argmax, indices)
    g = _pool(x.shape, kernel, stride, padding, dilation, ceil_mode)
    y, kept, flat = results
    tile = max_pool.choose_tile("forward", g, _channels_last(x), describe(x.device))
    max_pool.max_pool2d(x, g, y, kept if argmax else None, flat if indices else None, tile)
    return results


def _max_pool2d_backward_empty(
    dy, argmax, size, kernel, stride, padding, dilation, ceil_mode, channels_last
):
    return _new(dy, (*dy.shape[:2], *size), channels_last)


def _max_pool2d_backward(
    dy, argmax, size, kernel, stride, padding, dilation, ceil_mode, channels_last
):
    dx = _new(dy, (*dy.shape[:2], *size), channels_last)
    g = _pool(dx.shape, kernel, stride, padding, dilation, ceil_mode)
    tile = max_pool.choose_tile("backward", g, channels_last, describe(dy.device))
    max_pool.max_pool2d_backward(dy, argmax, dx, g, tile)
    return dx


def _max_pool2d_gather_empty(ddx, argmax, kernel, stride, padding, dilation, ceil_mode):
    return _like(argmax, ddx.dtype)


def _max_pool2d_gather(ddx, argmax, kernel, stride, padding, dilation, ceil_mode):
    ddy = _like(argmax, ddx.dtype)
    g = _pool(ddx.shape, kernel, stride, padding, dilation, ceil_mode)
    tile = max_pool.choose_tile("forward", g, _channels_last(ddy), describe(ddx.device))
    max_pool.max_pool2d_gather(ddx, argmax, ddy, g, tile)
    return ddy


def _max_unpool2d_empty(x, indices, size):
    return _new(x, (*x.shape[:2], *size), _channels_last(x))


def _max_unpool2d(x, indices, size):
    y = _max_unpool2d_empty(x, indices, size)
    max_unpool.max_unpool2d(x, indices, y)
    return y


def _max_unpool2d_backward_empty(dy, indices):
    return _new(dy, indices.shape, _channels_last(indices))


def _max_unpool2d_backward(dy, indices):
    dx = _max_unpool2d_backward_empty(dy, indices)
    max_unpool.max_unpool2d_backward(dy, indices, dx)
    return dx


_define(
    f"max_pool2d(Tensor x, {_POOL}, bool argmax, bool indices) -> (Tensor, Tensor, Tensor)",
    _max_pool2d,
    _max_pool2d_empty,
)
_define(
    f"max_pool2d_backward(Tensor dy, Tensor argmax, SymInt[2] size, {_POOL}, bool channels_last)"
    " -> Tensor",
    _max_pool2d_backward,
    _max_pool2d_backward_empty,
)
_define(
    f"max_pool2d_gather(Tensor ddx, Tensor argmax, {_POOL}) -> Tensor",
    _max_pool2d_gather,
    _max_pool2d_gather_empty,
)
_define(
    "max_unpool2d(Tensor x, Tensor indices, SymInt[2] size) -> Tensor",
    _max_unpool2d,
    _max_unpool2d_empty,
)
_define(
    "max_unpool2d_backward(Tensor dy, Tensor indices) -> Tensor",
    _max_unpool2d_backward,
    _max_unpool2d_backward_empty,
)

# Convolution, ReLU and max-pooling as one: the map between them is never stored.


def _conv_pool_geometries(
    x_shape, w_shape, stride, padding, dilation, groups, kernel, step, margin
) -> tuple[Conv2dGeometry, Pool2dGeometry]:
    pairs = tuple(stride), tuple(padding), tuple(dilation)
    g = Conv2dGeometry.of(x_shape, w_shape, *pairs, groups)
    return g, Pool2dGeometry(*g.y_shape, tuple(kernel), tuple(step), tuple(margin))


def _conv_pool_empty(
    x, w, bias, stride, padding, dilation, groups, precision, kernel, step, margin, argmax
) -> tuple[Tensor, Tensor]:
    size = conv_output_sizes(x.shape[2:], w.shape[2:], stride, padding, dilation)
    pool = _pool((x.shape[0], w.shape[0], *size), kernel, step, margin, (1, 1), False)
    y = _new(x, pool.y_shape, _channels_last(x, w))
    dtype = max_pool.argmax_dtype(pool)
    return y, _like(y, dtype) if argmax else _vector(y, 0, dtype)


def _conv_pool(
    x, w, bias, stride, padding, dilation, groups, precision, kernel, step, margin, argmax
) -> tuple[Tensor, Tensor]:
    geometry = stride, padding, dilation, groups
    window = kernel, step, margin
    y, kept = _conv_pool_empty(x, w, bias, *geometry, precision, *window, argmax)
    g, pool = _conv_pool_geometries(x.shape, w.shape, *geometry, *window)
    precision, here = resolve_precision(precision, x), describe(x.device)
    if 0 in y.shape:
        return y, kept
    w = _packed(w, (x,), here)
    bias = None if bias is None else replay.contiguous(bias)
    call = PooledConv(x, w, bias, y, kept if argmax else None, g, pool, precision)
    problem = Problem("fprop", g, x.dtype, precision, here, layout_of((x, y), (w,)))
    warm = device.is_warming_up()
    plans = planner.pooled_family(problem, pool) if warm else [planner.plan_pooled(problem, pool)]
    for engine, tile in plans:
        engine.launch(call, tile)
    return y, kept


def _conv_pool_backward_empty(
    dy, argmax, x, w, size, w_size, w_strides, *arguments
) -> tuple[Tensor, Tensor, Tensor]:
    *_, groups, _, _, _, _, channels_last, (need_dx, need_dw, need_db) = arguments
    shape = dy.shape[0], w_size[1] * groups, *size
    return (
        _new(dy, shape, channels_last) if need_dx else _vector(dy, 0),
        replay.new(dy, w_size, dense_strides(w_size, w_strides)) if need_dw else _vector(dy, 0),
        _vector(dy, w_size[0] if need_db else 0),
    )


def _conv_pool_backward(
    dy, argmax, x, w, size, w_size, w_strides, *arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """The map's gradient is read from dy and argmax, or if that is dearer written out once."""
    stride, padding, dilation, groups, precision, *window, channels_last, wanted = arguments
    geometry, (kernel, step, margin) = (stride, padding, dilation, groups), window
    need_dx, need_dw, need_db = wanted
    x_shape = dy.shape[0], w_size[1] * groups, *size
    g, pool = _conv_pool_geometries(x_shape, w_size, *geometry, kernel, step, margin)
    dx, dw, db = _conv_pool_backward_empty(dy, argmax, x, w, size, w_size, w_strides, *arguments)
    here, kind = describe(dy.device), resolve_precision(precision, dy)
    directions: list[Direction] = ["dgrad"] * need_dx + ["wgrad"] * (need_dw or need_db)
    plans = {
        direction: planner.plan_pool_gradient(Problem(direction, g, dy.dtype, kind, here), pool)
        for direction in directions
    }
    if 0 not in dy.shape and 0 not in x_shape and all(plans.values()):
        won = PoolGradient(pool, argmax)
        if (plan := plans.get("dgrad")) is not None:
            plan.engine.launch(Dgrad(dy, w, dx, g, kind, pooled=won), plan.tile)
        if (plan := plans.get("wgrad")) is not None:
            results = dw if need_dw else None, db if need_db else None
            call = Wgrad(dy if x is None else x, dy, *results, g, kind, pooled=won)
            plan.engine.launch(call, plan.tile)
        return dx, dw, db
    dz = _new(dy, g.y_shape, channels_last)
    pool_gradient.write(dy, argmax, dz, db if need_db else None, pool)
    if need_dx:
        dx = _conv2d_dgrad(dz, w, None, size, *geometry, precision, channels_last)
    if need_dw:
        dw, _ = _conv2d_wgrad(x, dz, w_size, w_strides, *geometry, precision, False)
    return dx, dw, db


_define(
    f"conv2d_relu_max_pool2d(Tensor x, Tensor w, Tensor? bias, {_CONV}, SymInt[2] pool_kernel,"
    " SymInt[2] pool_stride, SymInt[2] pool_padding, bool argmax) -> (Tensor, Tensor)",
    _conv_pool,
    _conv_pool_empty,
)
_define(
    "conv2d_relu_max_pool2d_backward(Tensor dy, Tensor argmax, Tensor? x, Tensor? w, SymInt[2]"
    f" size, SymInt[4] w_size, SymInt[4] w_strides, {_CONV}, SymInt[2] pool_kernel, SymInt[2]"
    " pool_stride, SymInt[2] pool_padding, bool channels_last, bool[3] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    _conv_pool_backward,
    _conv_pool_backward_empty,
)

vmap.register(_library)


# What FlopCounterMode counts: as for torch's own convolutions. It passes shapes for tensors.


def _flops(x, w, stride, padding, dilation, groups) -> int:
    return Conv2dGeometry.of(x, w, stride, padding, dilation, groups).flops


@register_flop_formula(torch.ops.triton_cnn.conv2d)
def _conv2d_flops(x, w, bias, residual, stride, padding, dilation, groups, *_, **__) -> int:
    return _flops(x, w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_bytes)
def _conv2d_bytes_flops(x, w, bias, scale, shift, stride, padding, dilation, groups, *_, **__):
    return _flops(x, w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_bytes_wgrad)
def _conv2d_bytes_wgrad_flops(
    x, dy, scale, shift, size, strides, stride, padding, dilation, groups, *_, **__
) -> int:
    return _flops(x, size, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_fp8)
def _conv2d_fp8_flops(x, w, scale, bias, residual, stride, padding, dilation, groups, *_, **__):
    return _flops(x, w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_relu_max_pool2d)
def _conv_pool_flops(x, w, bias, stride, padding, dilation, groups, *_, **__) -> int:
    return _flops(x, w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_relu_max_pool2d_backward)
def _conv_pool_backward_flops(
    dy, argmax, x, w, size, w_size, w_strides, stride, padding, dilation, groups, *rest, **__
) -> int:
    need_dx, need_dw, _ = rest[-1]
    x_size = dy[0], w_size[1] * groups, *size
    once = _flops(x_size, w_size, stride, padding, dilation, groups)
    return (need_dx + need_dw) * once


@register_flop_formula(torch.ops.triton_cnn.conv2d_dgrad)
def _dgrad_flops(dy, w, bias, size, stride, padding, dilation, groups, *_, **__) -> int:
    return _flops((dy[0], w[1] * groups, *size), w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_wgrad)
def _wgrad_flops(x, dy, size, strides, stride, padding, dilation, groups, *_, **__) -> int:
    return _flops(x, size, stride, padding, dilation, groups)
