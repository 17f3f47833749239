"""Networks by name: this library's, timm's, torchvision's, or from a user's function."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .. import data, models
from ..conversion import convert
from ..errors import UsageError
from ..models.classifier import renew
from ..summaries import summary
from ..text import meant

LIBRARIES = ("timm", "torchvision")

Source = str | nn.Module | Callable[..., Any]
"""A network, its name, or a function that makes it."""


def known_as(name: str) -> str:
    """The end of an error message about an unknown name; "" if the name may be valid."""
    library, colon, _ = name.partition(":")
    if name in models.list() or (colon and (library in LIBRARIES or data.is_code(name))):
        return ""
    known = f"{', '.join(models.list())}, and no MODULE:FUNCTION, timm:NAME or torchvision:NAME"
    return f"none of {known}{meant(name, models.list())}"


def runs_code(name: str) -> bool:
    """Whether creating the network ``name`` runs code that the name chooses, not a library's."""
    return data.is_code(name) and name.partition(":")[0] not in LIBRARIES


def create(source: Source, **options: Any) -> nn.Module:
    """A network with this library's layers, newly initialized unless ``source`` is a module.

    ``options`` are num_classes, in_channels and image_size; a function gets those that it has
    parameters for. Raises UsageError if there is no such network.
    """
    if isinstance(source, str) and source in models.list():
        with warnings.catch_warnings(action="ignore"):  # about an empty layer
            return models.create(source, **options)
    if isinstance(source, str):
        if unknown := known_as(source):
            raise UsageError(f"--model: {source!r} is {unknown}")
        library, _, name = source.partition(":")
        if library in LIBRARIES:
            model = _of_library(library, name, options)
        else:
            model = data.call("model", source, **options)
    else:
        model = source if isinstance(source, nn.Module) else data.fitting(source, options)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise UsageError(f"--model: {source} returns a {kind}, not a torch.nn.Module")
    if not any(True for _ in model.parameters()):
        raise UsageError(f"--model: {source} returns a {type(model).__name__} without parameters")
    if odd := [name for name, value in model.state_dict().items() if not torch.is_tensor(value)]:
        raise UsageError(f"--model: {source} keeps {odd[0]}, not a tensor: no file can hold it")
    return convert(model)


def _of_library(library: str, name: str, options: dict[str, Any]) -> nn.Module:
    """A network that timm or torchvision lists, without weights, which would be downloaded."""
    try:
        package: Any = import_module(library)
    except Exception as error:  # a build for another torch can raise anything
        raise UsageError(f"--model: cannot import {library}: {error}") from None
    timm, zoo = library == "timm", package if library == "timm" else package.models
    known = zoo.list_models() if timm else zoo.list_models(module=zoo)
    if (name.partition(".")[0] if timm else name) not in known:  # timm's may end in a weights' tag
        raise UsageError(f"--model: {library} has no {name!r}{meant(name, known)}")
    taken = {key: value for key, value in options.items() if key == "num_classes"}
    channels = options.get("in_channels", 3)
    if timm:
        return zoo.create_model(name, pretrained=False, in_chans=channels, **taken)
    if name in ("googlenet", "inception_v3"):
        taken |= {"aux_logits": False, "init_weights": True}
    model = zoo.get_model(name, weights=None, **taken)
    if channels != 3:
        if not (first := first_convolution(model)):
            raise UsageError(f"--model: {name} has no convolution and takes only 3 channels")
        renew(first[1], 1, channels)
    return model


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """The name and module of the convolution that sees the image."""
    found = ((n, module) for n, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(found, None)


def described(model: nn.Module, known: data.Description) -> data.Description:
    """``known`` with a network's own mean and standard deviation for photographs.

    timm's networks state them. torchvision's GoogLeNet and Inception, whose files need other values
    than ImageNet's, convert images themselves if torchvision loads the files.
    """
    if (known.mean, known.std) != data.IMAGENET:
        return known
    told: Any = getattr(model, "pretrained_cfg", None)
    if getattr(model, "transform_input", None) is False:
        told = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    if not isinstance(told, Mapping):
        return known
    mean, std = (tuple(map(float, told.get(name) or ())) for name in ("mean", "std"))
    return replace(known, mean=mean, std=std) if len(mean) == len(std) == 3 else known


def check_size(model: nn.Module, name: str, known: data.Description) -> None:
    """Raise UsageError unless the model outputs one number per class for images like ``known``."""
    shape, given = (1, known.channels, known.size, known.size), []
    hook = model.register_forward_hook(lambda *call: given.append(call[-1]))
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # about an empty layer
            if runs_code(name):
                model(torch.zeros(shape))
            else:
                summary(model, shape)
    except Exception as error:  # user code can raise anything
        why = f"{type(error).__name__}: {error}"
        size = f"{known.size}x{known.size} pixels"
        raise UsageError(f"--size: {name} does not take {size}: {why}") from None
    finally:
        hook.remove()
    count, size = len(known.classes), getattr(given[0], "shape", None)
    if count and size != (1, count):
        gives = type(given[0]).__name__ if size is None else [*size]
        raise UsageError(f"--model: {name} returns {gives} for an image, not [1, {count}]")
