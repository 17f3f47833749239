"""A network's layers by name, and their results."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels._private import pytree
from kernels.geometry import ReceptiveField

from ..summaries import Layer, summary


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context with the model in eval mode; afterwards each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def find(model: nn.Module, name: str) -> nn.Module:
    """The module ``name`` of a model. Raises ValueError that lists the existing ones."""
    known = dict(model.named_modules())
    if not name or name not in known:
        names = ", ".join(filter(None, known))
        raise ValueError(f"layer must be one of {names}, got layer={name!r}")
    return known[name]


def calls(model: nn.Module, x: Tensor) -> tuple[Layer, ...]:
    """The calls of layers on x[N, C, H, W], as ``cnn.summary`` finds them in eval mode."""
    with evaluating(model):
        return summary(model, tuple(x.shape), x.dtype).layers


def map_layers(model: nn.Module, x: Tensor) -> list[str]:
    """The names of the layers whose result on x is maps, in the order of their calls."""
    return list(dict.fromkeys(a.name for a in calls(model, x) if len(a.output_size) == x.dim()))


def field_of(model: nn.Module, name: str, x: Tensor) -> ReceptiveField:
    """The receptive field of a layer's outputs on x[N, C, H, W].

    Raises ValueError if the layer sees everything, or its field is unknown.
    """
    find(model, name)
    field = next((row.field for row in reversed(calls(model, x)) if row.name == name), None)
    if field is None:
        raise ValueError(f"layer must have a receptive field that is known, got layer={name!r}")
    return field


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Callable[..., Any]) -> Iterator[None]:
    """A context in which the model's layers ``names`` have a forward hook, which gets the name."""
    modules = {name: find(model, name) for name in names}
    hooks = [layer.register_forward_hook(partial(hook, name)) for name, layer in modules.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


class _Enough(Exception):
    """Every requested layer has been called."""


def run(
    model: nn.Module, x: Tensor, names: Sequence[str], *, stop: bool = False
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The first tensor in the model's result on x, and in the results of its layers ``names`` at
    their first call. With ``stop`` nothing after that is computed.

    The model runs as it is: in its mode, and with gradients if they are enabled. Raises ValueError
    if a layer does not exist, is not called or returns no tensor.
    """
    result, found = None, {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            found.setdefault(name, tensor.clone())  # before an in-place ReLU
        if stop and len(found) == len(set(names)):
            raise _Enough

    with hooked(model, names, keep), suppress(_Enough):
        result = first_tensor(model(x))
    for name in names:
        if name not in found:
            raise ValueError(f"layer must be called and give a tensor, got layer={name!r}")
    return result, found


def outputs(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The results of the layers ``names`` on x, as in ``run``. Nothing after that is computed."""
    return run(model, x, names, stop=True)[1]


def run_in_batches(
    model: nn.Module, images: Tensor, names: Sequence[str], batch: int
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The result of ``run``, computed for ``batch`` images at a time."""
    parts = [run(model, part, names) for part in images.split(batch)]
    results = [result for result, _ in parts if result is not None]
    found = {name: torch.cat([each[name] for _, each in parts]) for name in names}
    return torch.cat(results) if results else None, found


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in a module's result, such as a tuple or a dict."""
    return next((t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)), None)


def wide(t: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check_images(x: Tensor, name: str, axes: str = "[N, C, H, W]") -> None:
    """Raise ValueError if the argument ``name`` does not hold floats with the given axes."""
    count = axes.count(",") + 1
    if x.dim() != count or not x.is_floating_point() or not all(x.shape[count - 3 :]):
        raise ValueError(f"{name} must be floats {axes}, got {x.dtype} {list(x.shape)}")


def probabilities(result: Tensor | None) -> Tensor | None:
    """The probabilities of classes for logits [N, classes]; None for any other result."""
    return None if result is None or result.dim() != 2 else wide(result).softmax(1)


def class_names(given: Sequence[str], count: int) -> tuple[str, ...]:
    """The names of ``count`` classes: those given, or their numbers."""
    if given and len(given) != count:
        raise ValueError(f"classes must be {count} names, got {len(given)}")
    return tuple(given) or tuple(f"class {number}" for number in range(count))


def check_class(number: int, count: int, name: str) -> int:
    """Raise ValueError if the argument ``name`` is not one of a model's ``count`` classes."""
    if not 0 <= number < count:
        known = f"one of the {count} classes of the model, from 0 on"
        raise ValueError(f"{name} must be {known}, got {name}={number}")
    return number


def check_maps(y: Tensor, name: str) -> Tensor:
    """Raise ValueError if y, the result of the layer ``name``, is not [N, K, P, Q]."""
    if y.dim() != 4:
        size = list(y.shape)
        raise ValueError(f"layer must give maps [N, K, P, Q], got {size} of layer={name!r}")
    return y
