"""Convert any model to this library's layers, in place, and back."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.utils import _pair
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from kernels import library, planner
from kernels.device import INTERPRET, describe
from kernels.geometry import (
    Conv2dGeometry,
    Direction,
    Pool2dGeometry,
    is_channels_last,
    output_strides,
)

from . import layers
from .arguments import DTYPES, conv_padding
from .fusion import Flow, has_hooks

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: layers.Conv2d,
    nn.ConvTranspose2d: layers.ConvTranspose2d,
    nn.MaxPool2d: layers.MaxPool2d,
    nn.MaxUnpool2d: layers.MaxUnpool2d,
}
_LAZY = {nn.LazyConv2d: layers.Conv2d, nn.LazyConvTranspose2d: layers.ConvTranspose2d}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FusedReLU(nn.ReLU):
    """A ReLU that the convolution before it has taken over: it returns what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class FusedMaxPool2d(nn.MaxPool2d):
    """A pooling that the convolution before it has taken over: it returns what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return input


@dataclass(frozen=True)
class Line:
    """What became of one layer."""

    name: str
    kind: str
    became: str
    engine: str  # that the planner takes for the forward pass; "ATen" on a CPU
    note: str  # why it was not converted, or not fused


class Report(tuple[Line, ...]):
    """A Line for each layer that was converted or might have been; ``str`` gives a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("layer", "was", "is", "engine", "note")]
        rows += [(line.name, line.kind, line.became, line.engine, line.note) for line in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip()  # type: ignore[arg-type]
            for row in rows
        )


@overload
def convert(
    model: nn.Module,
    *,
    fuse: bool = True,
    fold_batch_norm: bool = False,
    report: Literal[False] = False,
) -> nn.Module: ...
@overload
def convert(
    model: nn.Module, *, fuse: bool = True, fold_batch_norm: bool = False, report: Literal[True]
) -> tuple[nn.Module, Report]: ...
def convert(
    model: nn.Module, *, fuse: bool = True, fold_batch_norm: bool = False, report: bool = False
) -> nn.Module | tuple[nn.Module, Report]:
    """Make torch's convolutions and max-poolings in a model this library's, in place.

    A layer changes its class and nothing else: parameters and buffers are the same objects, so
    optimizers made before stay valid and ``state_dict`` keeps its keys; hooks, parametrizations,
    memory format and modes stay. A subclass that does not override ``forward`` stays a subclass of
    its own class; one that does is left alone. Converting twice is harmless.

    Args:
        fuse: make one kernel of Conv2d and ReLU, or Conv2d, ReLU and MaxPool2d, where a trace by
            torch.fx proves that at every call the one reads the other's result and nothing else
            does (each forward runs a few times, on stand-ins for tensors). The convolution becomes
            a ConvReLU2d or ConvReLUMaxPool2d, the others return what they are given: they are a
            FusedReLU, which is still a ReLU to ``isinstance``, and a FusedMaxPool2d. Functions,
            such as ``F.relu``, are not fused, and nothing is that has hooks. It is taken for
            granted that the model is called as a whole, and that what its forward decides by,
            except ``training``, does not change any more: who calls fused layers one by one, or
            hooks them later, sees fused results.
        fold_batch_norm: for inference, put each BatchNorm2d that follows a convolution into its
            weight and bias, which then are new parameters; the norm becomes an Identity, its keys
            leave the ``state_dict`` and the bias is among them. It needs a model in eval mode.
        report: return also what became of each layer.

    Returns the model, or with ``report`` the model and a Report.
    """
    _check(model)
    if fold_batch_norm and model.training:
        raise ValueError("fold_batch_norm needs a model in eval mode, got one in training mode")
    kinds = {module: type_before_parametrizations(module).__name__ for module in model.modules()}
    notes: dict[nn.Module, str] = {}
    flow = Flow(model) if fuse or fold_batch_norm else None
    for module in kinds:
        notes |= _swap(module)
    groups: dict[nn.Module, nn.Module] = {}  # the convolution that has taken a layer over
    if flow is not None:
        for module in kinds:
            kind = type_before_parametrizations(module)
            if kind is layers.Conv2d:
                taken, notes[module] = _take_over(module, flow, fuse, fold_batch_norm)
                groups |= dict.fromkeys(taken, module)
            elif _is_mixed(kind) and issubclass(kind, nn.Conv2d):
                notes[module] = "not fused: its class is not torch's own"
    return (model, _report(model, kinds, notes, groups)) if report else model


def revert(model: nn.Module) -> nn.Module:
    """Undo ``convert``, in place: torch's own classes again, with the same parameters.

    A BatchNorm2d that was folded stays an Identity, and layers that were built as this library's
    ConvReLU2d or ConvReLUMaxPool2d stay what they are. Returns the model. Raises ValueError where
    it holds only some of the layers that were fused into one.
    """
    _check(model)
    fused = defaultdict(list)
    for module in model.modules():
        if "_fusion" in module.__dict__:
            fused[id(module._fusion)].append(module)
    for group in fused.values():
        if len(group) != group[0]._fusion.layers:
            names = [name for name, module in model.named_modules() if module in group]
            raise ValueError(f"layers beyond this model were fused with its layers {names}")
    originals = {ours: theirs for theirs, ours in SWAPS.items()}
    originals |= {FusedReLU: nn.ReLU, FusedMaxPool2d: nn.MaxPool2d}
    for module in list(model.modules()):
        kind = type_before_parametrizations(module)
        if module.__dict__.pop("_fusion", None) and issubclass(kind, layers.Conv2d):
            kind = layers.Conv2d
            for name in ("pool_kernel_size", "pool_stride", "pool_padding"):
                module.__dict__.pop(name, None)
        if module.__dict__.get("cls_to_become") in originals:
            del module.cls_to_become
        if kind in originals:
            _become(module, originals[kind])
        elif _is_mixed(kind):
            _become(module, kind.__bases__[0])
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got model={model!r:.80}")


# One layer.


def _swap(module: nn.Module) -> dict[nn.Module, str]:
    """Give a layer our class; returns why not, if it is one of those that have one."""
    kind = type_before_parametrizations(module)
    base = next((base for base in SWAPS if issubclass(kind, base)), None)
    if base is None or isinstance(module, FusedMaxPool2d):
        return {}
    ours = SWAPS[base]
    if issubclass(kind, ours):
        return {}
    changed = [
        name
        for name in ("forward", "_conv_forward", "__call__", "_call_impl")
        if getattr(kind, name, None) is not getattr(base, name, None) or name in module.__dict__
    ]
    if changed:
        return {module: f"left alone: {changed[0]} is overridden"}
    if isinstance(module, LazyModuleMixin):
        if kind not in _LAZY:
            return {module: "left alone: it becomes a class of its own"}
        module.cls_to_become = ours  # type: ignore[assignment]
        return {module: f"is a {ours.__name__} when it has seen its input"}
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter:
            return {module: f"left alone: its parameters are {type(parameter).__name__}s"}
        if parameter.dtype not in DTYPES:
            return {module: f"left alone: its parameters are {parameter.dtype}"}
    _become(module, ours if kind is base else _mixed(kind, ours))
    return {}


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class, below the one that parametrizations have made for it."""
    if is_parametrized(module):
        own: Any = type(module)  # a copy of the module has the same
        members = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
        kind = type(own)(own.__name__, (kind,), members)
    module.__class__ = kind


@cache
def _mixed(own: type[nn.Module], ours: type[nn.Module]) -> Any:
    """A user's class with our forward: what it does not define itself comes from ours."""
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type(own)
    return kind(own.__name__, (own, ours), {**names, "__reduce__": _reduce})


def _is_mixed(kind: type) -> bool:
    return vars(kind).get("__reduce__") is _reduce


def _reduce(module: nn.Module) -> tuple:
    """For copies and pickles, which do not find a class that was made here by its name."""
    kind = type_before_parametrizations(module)
    return _blank, kind.__bases__, module.__getstate__()  # type: ignore[attr-defined]


def _blank(own: type[nn.Module], ours: type[nn.Module]) -> nn.Module:
    kind = _mixed(own, ours)
    return kind.__new__(kind)


# Fusion.


def _take_over(convolution: Any, flow: Flow, fuse: bool, fold: bool) -> tuple[list[nn.Module], str]:
    """Let a convolution do what the layers after it do; returns these, and why not more."""
    if has_hooks(convolution):
        return [], "not fused: it has hooks"
    following = _following(convolution, flow)
    taken: list[Any] = []
    found = next(following)
    if fold and isinstance(found, _NORMS):
        if reason := _objection_to_folding(convolution, found, flow):
            return [], f"not folded: {reason}"
        _fold(convolution, found)
        taken, found = [found], next(following)
    if not fuse:
        return taken, ""
    if type(found) is not nn.ReLU:
        reason = found if isinstance(found, str) else f"a {type(found).__name__} follows"
        return taken, f"not fused: {reason}"
    pool, note, kind = next(following), "", layers.ConvReLU2d
    group: list[Any] = [found]
    if type(pool) is layers.MaxPool2d:
        if pool.return_indices or pool.ceil_mode or _pair(pool.dilation) != (1, 1):
            note = "pooling not fused: it has return_indices, ceil_mode or dilation"
        elif convolution.groups == convolution.in_channels > 1:
            note = "pooling not fused: depthwise layers have kernels of their own"
        elif convolution.normalise is not None:
            note = "pooling not fused: its input has bytes"
        else:
            group, kind = [found, pool], layers.ConvReLUMaxPool2d
            convolution.pool_kernel_size = pool.kernel_size
            convolution.pool_stride = pool.stride
            convolution.pool_padding = pool.padding
    fusion = SimpleNamespace(layers=1 + len(group))
    _become(convolution, kind)
    for module, fused in zip(group, (FusedReLU, FusedMaxPool2d), strict=False):
        module.__class__ = fused
    for module in (convolution, *group):
        module._fusion = fusion
    return [*taken, *group], note


def _following(layer: nn.Module, flow: Flow) -> Iterator[Any]:
    """The layers that one after another alone read the result, Identities apart; at last why there
    is no other.
    """
    while True:
        found = flow.reader(layer)
        if isinstance(found, str):
            yield found
            return
        if has_hooks(found) or "forward" in found.__dict__:
            yield f"the {type(found).__name__} that follows has hooks"
            return
        if type(found) is not nn.Identity:
            yield found
        layer = found


def _objection_to_folding(convolution: nn.Module, norm: Any, flow: Flow) -> str | None:
    if type(norm) not in _NORMS:
        return f"{type(norm).__name__} is a class of its own"
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return f"its {type(norm).__name__} does not normalise by running statistics"
    if is_parametrized(convolution) or is_parametrized(norm):
        return "it is parametrized"
    if any(id(p) in flow.read for p in (*convolution.parameters(), *norm.parameters())):
        return "its parameters are used elsewhere"
    return None


def _fold(convolution: Any, norm: Any) -> None:
    wanted = convolution.weight.requires_grad
    weight, bias = layers.folded_parameters(convolution, norm)
    convolution.weight = nn.Parameter(weight, wanted)
    convolution.bias = nn.Parameter(bias, wanted)
    norm.__class__ = nn.Identity
    norm._parameters.clear()
    norm._buffers.clear()


# The report.


def _report(
    model: nn.Module,
    kinds: dict[nn.Module, str],
    notes: dict[nn.Module, str],
    groups: dict[nn.Module, nn.Module],
) -> Report:
    names = {module: name for name, module in model.named_modules()}
    weights = [p for p in model.parameters() if not is_lazy(p) and p.dim() == 4]
    last = any(is_channels_last(w.shape, w.stride()) for w in weights)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    lines = []
    for module, name in names.items():
        became = type_before_parametrizations(module)
        engine = ""
        if module in groups:
            note = f"part of {names[groups[module]]}"
        elif isinstance(module, tuple(SWAPS)):
            note = notes.get(module, "")
            if isinstance(module, tuple(SWAPS.values())):
                engine = _engine(module, place, last)
        else:
            continue
        lines.append(Line(name, kinds[module], became.__name__, engine, note))
    return Report(lines)


def _engine(layer: Any, place: torch.device, channels_last: bool) -> str:
    """The kernels of a layer's forward pass. They do not depend on the image's size; images are
    taken to have the weight's dtype, and to be channels_last if weights are.
    """
    here = describe(place)
    if here.backend == "interpreter" and not INTERPRET:
        return "ATen"
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return "max_pool"
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    dilation = _pair(layer.dilation)
    padding = conv_padding(layer.padding, kernel, layer.stride, stride, dilation)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    direction: Direction = "dgrad" if transposed else "fprop"
    C, K = layer.in_channels, layer.out_channels
    C, K = (K, C) if transposed else (C, K)
    size = [224 + d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    w_shape = (K, C // layer.groups, *kernel)
    g = Conv2dGeometry.of((1, C, *size), w_shape, stride, padding, dilation, layer.groups)
    dtype = next(layer.parameters()).dtype
    pool = None
    if isinstance(layer, layers.ConvReLUMaxPool2d):
        window: Any = layer.pool_kernel_size, layer.pool_stride, layer.pool_padding
        pool = Pool2dGeometry(*g.y_shape, *map(_pair, window))  # type: ignore[arg-type]
    x, y, w = (
        torch.empty_strided(shape, output_strides(shape, channels_last), dtype=dtype, device="meta")
        for shape in (g.x_shape, pool.y_shape if pool else g.y_shape, g.w_shape)
    )
    precision = library.resolve_precision(None, torch.empty(0, dtype=dtype, device=place))
    problem = dtype, precision, here, planner.layout_of((x, y), (w,))
    if pool:
        engine, _ = planner.plan_pooled(g, pool, *problem)
    else:
        engine = planner.plan(direction, g, *problem).engine
    return engine.__name__.rpartition(".")[2]
