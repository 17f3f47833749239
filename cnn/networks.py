"""Networks by name: this library's, timm's, torchvision's, or those of one's own function."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from . import data, models
from .convert import convert
from .problem import Problem
from .text import meant

LIBRARIES = ("timm", "torchvision")

Source = str | nn.Module | Callable[..., Any]
"""A network's name, itself, or a function that makes it."""


def known_as(name: str) -> str:
    """What to say of a name that is none; nothing if it may be one."""
    library, colon, _ = name.partition(":")
    if name in models.list() or (colon and (library in LIBRARIES or data.is_code(name))):
        return ""
    known = f"{', '.join(models.list())}, and no MODULE:FUNCTION, timm:NAME or torchvision:NAME"
    return f"none of {known}{meant(name, models.list())}"


def runs_code(name: str) -> bool:
    """Whether to make the network ``name`` runs code that it names, and not that of a library."""
    return data.is_code(name) and name.partition(":")[0] not in LIBRARIES


def create(source: Source, **options: Any) -> nn.Module:
    """A network, newly initialised unless it is given itself, of this library's layers.

    ``options`` are num_classes, in_channels and image_size. A function gets those that it has
    parameters for. Raises Problem if there is no such network.
    """
    if isinstance(source, str) and source in models.list():
        with warnings.catch_warnings(action="ignore"):  # of an empty layer
            return models.create(source, **options)
    if isinstance(source, str):
        if unknown := known_as(source):
            raise Problem(f"--model: {source!r} is {unknown}")
        library, _, name = source.partition(":")
        if library in LIBRARIES:
            model = _MAKERS[library](_imported(library), name, options)
        else:
            model = data.call("model", source, **options)
    else:
        model = source if isinstance(source, nn.Module) else data.fitting(source, options)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise Problem(f"--model: {source} gives a {kind}, and no torch.nn.Module")
    if not any(True for _ in model.parameters()):
        raise Problem(f"--model: {source} gives a {type(model).__name__} without parameters")
    return convert(model)


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except Exception as error:  # one that was built for another torch raises anything
        raise Problem(f"--model: cannot import {library}: {error}") from None


def _check(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise Problem(f"--model: {library} has no {name!r}{meant(name, known)}")


def _timm(timm: Any, name: str, options: dict[str, Any]) -> nn.Module:
    _check("timm", name.partition(".")[0], timm.list_models())  # .TAG tells of trained weights
    names = {"num_classes": "num_classes", "in_channels": "in_chans"}
    taken = {names[option]: value for option, value in options.items() if option in names}
    return timm.create_model(name, pretrained=False, **taken)


def _torchvision(torchvision: Any, name: str, options: dict[str, Any]) -> nn.Module:
    _check("torchvision", name, torchvision.models.list_models(module=torchvision.models))
    taken = {"num_classes": options["num_classes"]} if "num_classes" in options else {}
    if name in ("googlenet", "inception_v3"):
        taken |= {"aux_logits": False, "init_weights": True}
    model = torchvision.models.get_model(name, weights=None, **taken)
    layer, first = first_convolution(model)
    channels = options.get("in_channels", first.in_channels)
    if channels != first.in_channels:
        settings = {key: getattr(first, key) for key in ("stride", "padding", "dilation", "groups")}
        kernel: Any = first.kernel_size
        bias = first.bias is not None
        new = nn.Conv2d(channels, first.out_channels, kernel, bias=bias, **settings)
        parent, _, own = layer.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    return model


_MAKERS = {"timm": _timm, "torchvision": _torchvision}


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that sees the image, and its name. Raises Problem if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise Problem(f"--model: {type(model).__name__} has no convolution")
