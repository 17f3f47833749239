"""The layer of a network that tells classes apart, and how another takes its place."""

from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def classifiers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of any network that give its classes, by name: one, or several in some.

    The last linear layer, or of a network without one the last 1x1 convolution, as in SqueezeNet;
    and those of auxiliary classifiers, as in GoogLeNet. timm's networks tell themselves.
    """
    named: dict[str, Any] = dict(model.named_modules())
    if callable(tell := getattr(model, "get_classifier", None)):
        told = tell()
        told = {*told} if isinstance(told, tuple | list) else {told}
        return {n: m for n, m in named.items() if m in told and hasattr(m, "weight")}
    linear = {n: m for n, m in named.items() if isinstance(m, nn.Linear)}
    pointwise = {
        n: m for n, m in named.items() if isinstance(m, nn.Conv2d) and {*m.kernel_size} == {1}
    }
    found = linear or pointwise
    *_, last = None, *(name for name in found if not _auxiliary(name))
    if last is None:
        return {}
    count = len(found[last].weight)
    return {
        name: layer
        for name, layer in found.items()
        if name == last or (_auxiliary(name) and len(layer.weight) == count)
    }


def _auxiliary(name: str) -> bool:
    return any(part.lower().startswith("aux") for part in name.split("."))


def reset_classifier(model: Model, num_classes: int) -> Model:
    """Replace the classifier of any network by a new one for other classes, in place.

    The classifier is the last linear layer, or of a network without one the last 1x1 convolution,
    as in SqueezeNet; auxiliary classifiers change with it. timm's networks do it by their own
    method. The new layers are initialised as torch does it, have a bias if the old ones had, and
    their dtype and device. Optimizers that were made before do not know their parameters.

    Returns the model. Raises TypeError for what is no module, ValueError if it has no such layer or
    ``num_classes`` is not a positive whole number.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got model={model!r:.80}")
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"num_classes must be a positive int, got num_classes={num_classes!r}")
    old = {name: layer for name, layer in classifiers(model).items() if name}
    if callable(reset := getattr(model, "reset_classifier", None)):
        reset(num_classes)
    elif not old:
        kind = type(model).__name__
        raise ValueError(f"model must have a linear layer or a 1x1 convolution, got {kind}")
    for name, layer in old.items():
        parent, _, own = name.rpartition(".")
        place = model.get_submodule(parent)
        new = getattr(place, own) if reset else _like(layer, num_classes)
        setattr(place, own, new.to(layer.weight.device, layer.weight.dtype).train(layer.training))
    if isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = num_classes  # type: ignore[assignment]
    return model


def _like(layer: nn.Linear | nn.Conv2d, count: int) -> nn.Linear | nn.Conv2d:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, count, bias)
    options = (layer.stride, layer.padding, layer.dilation, layer.groups, bias)
    return nn.Conv2d(layer.in_channels, count, 1, *options, layer.padding_mode)  # type: ignore[arg-type]
