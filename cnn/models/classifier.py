"""The layers of a network that depend on the number of classes or of image channels."""

from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def classifiers(model: nn.Module) -> dict[str, Any]:
    """The layers that output a network's classes, by name: one, in some networks several.

    They are the last linear layer, or without one the last 1x1 convolution, as in SqueezeNet, and
    those of auxiliary classifiers, as in GoogLeNet. timm's networks state theirs.
    """
    layers: dict[str, Any] = dict(model.named_modules())
    if (told := _told(model)) is not None:
        return dict(layer for head in told for layer in _last(head, layers))
    linear = {n: layer for n, layer in layers.items() if isinstance(layer, nn.Linear)}
    convolutions = {n: layer for n, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    found = linear or {n: m for n, m in convolutions.items() if {*m.kernel_size} == {1}}
    last = max((n for n in found if not auxiliary(n)), key=[*found].index, default=None)
    count = len(found[last].weight) if last is not None else 0
    also = (n for n, layer in found.items() if auxiliary(n) and len(layer.weight) == count)
    return {n: found[n] for n in (*also, last) if n is not None}


def _told(model: nn.Module) -> list[nn.Module] | None:
    """The classifiers that a network states, as timm's do: layers, or modules with one in them."""
    if not callable(tell := getattr(model, "get_classifier", None)):
        return None
    told: Any = tell()
    return [*told] if isinstance(told, tuple | list) else [told]


def _last(head: nn.Module, layers: dict[str, Any]) -> list[tuple[str, Any]]:
    """The last layer of a head that outputs classes, with its name in ``layers``; may be empty."""
    inside = {id(module) for module in head.modules()}
    kinds = nn.Linear, nn.Conv2d
    return [(n, m) for n, m in layers.items() if id(m) in inside and isinstance(m, kinds)][-1:]


def auxiliary(name: str) -> bool:
    """Whether a layer or parameter belongs, by its name, to a classifier used only in training."""
    return any(part.lower().startswith("aux") for part in name.split("."))


def renew(layer: Any, axis: int, count: int) -> None:
    """Give a linear layer or a convolution new parameters for ``count`` outputs, or inputs if axis
    is 1, initialized as in torch.
    """
    shape = [*layer.weight.shape]
    shape[axis] = count
    layer.weight = nn.Parameter(layer.weight.new_empty(shape))
    if axis == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(count))
    end = "features" if isinstance(layer, nn.Linear) else "channels"
    setattr(layer, f"{('out', 'in')[axis]}_{end}", count)
    layer.reset_parameters()


def reset_classifier(model: Model, num_classes: int) -> Model:
    """Replace the classifier of any network for another number of classes, in place.

    The classifier is the last linear layer, or without one the last 1x1 convolution, as in
    SqueezeNet; auxiliary classifiers change with it. The layer stays, but its parameters are new,
    initialized as in torch, with the same dtype and device: existing optimizers do not know them.
    timm's networks use their own method.

    Returns the model. Raises TypeError if ``model`` is not a module, ValueError if it has no such
    layer or ``num_classes`` is not a positive whole number.

    Example:
        >>> model = cnn.models.reset_classifier(cnn.models.lenet5(), 3)
        >>> model(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got model={model!r:.80}")
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"num_classes must be a positive int, got num_classes={num_classes!r}")
    if callable(reset := getattr(model, "reset_classifier", None)):
        like = next(model.parameters())
        reset(num_classes)
        for head in _told(model) or ():
            head.to(like.device, like.dtype)
        return model
    if not (found := classifiers(model)):
        kind = type(model).__name__
        raise ValueError(f"model must have a linear layer or a 1x1 convolution, got {kind}")
    for layer in found.values():
        renew(layer, 0, num_classes)
    if isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = num_classes  # type: ignore[assignment]
    return model
