"""Replace the layers of any model by this library's, in place, and back."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, overload

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from . import layers
from .arguments import DTYPES
from .console import table

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: layers.Conv2d,
    nn.ConvTranspose2d: layers.ConvTranspose2d,
    nn.MaxPool2d: layers.MaxPool2d,
    nn.MaxUnpool2d: layers.MaxUnpool2d,
}
_LAZY = {nn.LazyConv2d: layers.Conv2d, nn.LazyConvTranspose2d: layers.ConvTranspose2d}
# A layer's own members that a swap would bypass, and those that it would mistake for ours.
_REPLACED = ("forward", "_conv_forward", "__call__", "_call_impl", "__reduce__", "__reduce_ex__")
_ADDED = {base: sorted({"qconfig", *dir(ours)} - {*dir(base)}) for base, ours in SWAPS.items()}


@dataclass(frozen=True)
class Line:
    """The outcome for one layer."""

    name: str
    kind: str
    became: str
    note: str  # the reason, if it was not swapped


class Report(tuple[Line, ...]):
    """A Line for each layer that was or could have been swapped; ``str`` gives a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("layer", "was", "is", "note")]
        rows += [(line.name, line.kind, line.became, line.note) for line in self]
        return table(rows, "<<<<")


@overload
def convert(model: nn.Module, *, report: Literal[False] = False) -> nn.Module: ...
@overload
def convert(model: nn.Module, *, report: Literal[True]) -> tuple[nn.Module, Report]: ...
def convert(model: nn.Module, *, report: bool = False) -> nn.Module | tuple[nn.Module, Report]:
    """Replace torch's convolutions and max-poolings in a model by this library's, in place.

    Only a layer's class changes. Parameters and buffers are the same objects, so existing
    optimizers stay valid and ``state_dict`` keeps its keys; hooks, parametrizations, memory format
    and modes stay. A printed model shows the new class: ``cnn.Conv2d(...)``. A subclass that does
    not override ``forward`` stays a subclass of its own class, printed as ``Own[cnn.Conv2d](...)``;
    one that does is left alone. Nothing is fused, so layers can still be replaced, hooked or called
    one by one. Converting twice is harmless.

    Args:
        report: whether to return the outcome for each layer, too.

    Returns the model, or with ``report`` the model and a Report. Raises TypeError if ``model`` is
    not a module.

    Example:
        >>> cnn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)))
        Sequential(
          (0): cnn.Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): cnn.MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
        )
    """
    _check(model)
    was = {m: m._get_name() for m in model.modules() if isinstance(m, tuple(SWAPS))}
    notes = {module: _swap(module) for module in was}
    return (model, _report(model, was, notes)) if report else model


def revert(model: nn.Module) -> nn.Module:
    """Undo ``convert`` in place: restore torch's own classes, with the same parameters.

    Layers without an equivalent in torch stay: ConvReLU2d, ConvReLUMaxPool2d, and a Conv2d with
    ``normalize``. Returns the model.

    Example:
        >>> cnn.revert(nn.Sequential(cnn.Conv2d(3, 8, 3)))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    _check(model)
    theirs = {ours: base for base, ours in SWAPS.items()}
    for module in list(model.modules()):
        kind = type_before_parametrizations(module)
        if module.__dict__.get("cls_to_become") in theirs:
            del module.cls_to_become
        own = kind.__bases__[0] if _is_mixed(kind) else theirs.get(kind)
        if own is not None and getattr(module, "normalize", None) is None:
            _become(module, own)
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got model={model!r:.80}")


def _swap(module: nn.Module) -> str:
    """Give a torch layer our class; returns the reason if that is impossible, else ""."""
    kind = type_before_parametrizations(module)
    base = next(base for base in SWAPS if issubclass(kind, base))
    ours = SWAPS[base]
    if issubclass(kind, ours):
        return ""
    for name in _REPLACED:
        if getattr(kind, name, None) is not getattr(base, name, None) or name in module.__dict__:
            return f"left alone: {name} is overridden"
    for name in _ADDED[base]:
        if getattr(module, name, None) is not None:
            return f"left alone: it has {name} of its own"
    if isinstance(module, LazyModuleMixin):
        if kind not in _LAZY:
            return "left alone: it becomes a class of its own"
        module.cls_to_become = ours  # type: ignore[assignment]
        return f"becomes cnn.{ours.__name__} when it has seen its input"
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter:
            return f"left alone: its parameters are {type(parameter).__name__}s"
        if parameter.dtype not in DTYPES:
            return f"left alone: its parameters are {parameter.dtype}"
    _become(module, ours if kind is base else _mixed(kind, ours))
    return ""


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class, but keep the class that parametrizations put on top of it."""
    if is_parametrized(module):
        own: Any = type(module)  # copies of the module share it
        members = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
        kind = type(own)(own.__name__, (kind,), members)
    module.__class__ = kind


@cache
def _mixed(own: type[nn.Module], ours: type[nn.Module]) -> Any:
    """A user's class with our forward: anything that it does not define comes from ours."""
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type(own)
    return kind(own.__name__, (own, ours), {**names, "__reduce__": _reduce})


def _is_mixed(kind: type) -> bool:
    return vars(kind).get("__reduce__") is _reduce


def _reduce(module: nn.Module) -> tuple:
    """Support copies and pickles, which cannot find a class made here by its name."""
    kind = type_before_parametrizations(module)
    return _blank, kind.__bases__, module.__getstate__()  # type: ignore[attr-defined]


def _blank(own: type[nn.Module], ours: type[nn.Module]) -> nn.Module:
    kind = _mixed(own, ours)
    return kind.__new__(kind)


def _report(model: nn.Module, was: dict[nn.Module, str], notes: dict[nn.Module, str]) -> Report:
    names = {module: name for name, module in model.named_modules()}
    return Report(Line(names[m], kind, m._get_name(), notes[m]) for m, kind in was.items())
