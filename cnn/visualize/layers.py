"""A network's layers by name, and what they give."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kernels.geometry import ReceptiveField

from ..summary import summary


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each of its modules gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def find(model: nn.Module, name: str) -> nn.Module:
    """The module ``name`` of a model. Raises ValueError that lists those that exist."""
    known = dict(model.named_modules())
    if not name or name not in known:
        names = ", ".join(filter(None, known))
        raise ValueError(f"layer must be one of {names}, got layer={name!r}")
    return known[name]


def map_layers(model: nn.Module, x: Tensor) -> list[str]:
    """The names of the layers whose result on x is maps, in the order of their calls."""
    layers = summary(model, tuple(x.shape), x.dtype).layers
    return list(dict.fromkeys(a.name for a in layers if len(a.output_size) == x.dim()))


def field_of(model: nn.Module, name: str, x: Tensor) -> ReceptiveField:
    """The receptive field of a layer's outputs on x[N, C, H, W].

    Raises ValueError where the layer sees everything, or what it sees is not known.
    """
    find(model, name)
    layers = summary(model, tuple(x.shape), x.dtype).layers
    field = next((row.field for row in reversed(layers) if row.name == name), None)
    if field is None:
        raise ValueError(f"layer must have a receptive field that is known, got layer={name!r}")
    return field


class _Enough(Exception):
    """Every layer that was asked for has been called."""


def outputs(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What the layers ``names`` give on x, at their first call. Nothing after that is computed.

    The model runs as it is: in its mode, and with gradients where they are enabled. Raises
    ValueError for a layer that does not exist, is not called or gives no tensor.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
            if tensor is not None:
                found.setdefault(name, tensor)
            if len(found) == len(set(names)):
                raise _Enough

        return hook

    hooks = [find(model, name).register_forward_hook(keep(name)) for name in names]
    try:
        model(x)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if name not in found:
            raise ValueError(f"layer must be called and give a tensor, got layer={name!r}")
    return found


def maps_of(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """The maps [N, K, P, Q] that the layer ``name`` gives on x, without gradients.

    Raises ValueError as ``outputs`` does, and where the layer gives no maps.
    """
    with evaluating(model), torch.no_grad():
        y = outputs(model, x, [name])[name]
    return check_maps(y, name)


def check_maps(y: Tensor, name: str) -> Tensor:
    """Raises ValueError where y, which the layer ``name`` gave, is not [N, K, P, Q]."""
    if y.dim() != 4:
        size = list(y.shape)
        raise ValueError(f"layer must give maps [N, K, P, Q], got {size} of layer={name!r}")
    return y
