"""The deconvnet: projects what made a map respond in an image back to the image's pixels.

Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014), section 2.1. Their
network runs each step backward: pooling by its switches, a ReLU by a ReLU, a convolution by the
transposed filters. Except for the ReLU, a gradient does the same, through the same kernels:
pooling's gradient places values by the one-byte switches of the forward pass, and a convolution's
is the transposed convolution with the same weights. So a projection is a gradient with one rule
changed, as Springenberg, Dosovitskiy, Brox and Riedmiller, "Striving for simplicity" (2015, section
3.4), observe, and it exists for any network.
"""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from kernels.geometry import ReceptiveField

from .. import functional as F
from ..console import Progress
from .layers import check_images, evaluating, field_of, outputs
from .pictures import panels, pixels, signed, tiles

BATCH = 16
"""The number of images that are projected at once."""


class _Rectify(Function):
    """y = relu(x); backward dx = relu(dy) for any x, or, if ``guided``, only where y > 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relu: Any, guided: bool) -> Tensor:
        y = relu(x)
        ctx.save_for_backward(y > 0 if guided else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (passed,) = ctx.saved_tensors
        dx = torch.relu(dy)
        return dx if passed is None else dx * passed, None, None


_IN_PLACE = (torch.relu_, Tensor.relu_)
_RELUS = (TF.relu, torch.relu, Tensor.relu, *_IN_PLACE)


def _relu_of(func: Any, kwargs: dict[str, Any]) -> Any:
    """The ReLU that a function is, perhaps with an upper limit; None for any other function."""
    if func in _RELUS:
        return torch.relu
    if func is TF.hardtanh and kwargs["min_val"] == 0:  # of nn.ReLU6
        return partial(torch.clamp, min=0, max=kwargs["max_val"])
    return TF.relu6 if func is TF.relu6 else None


class Deconvnet(TorchFunctionMode):
    """A context in which a network's gradients are the deconvnet's projections.

    Each ReLU, whether a module, a function or a part of this library's fused operators, is also a
    ReLU of the gradient. Other steps keep their own gradients: where pooling windows overlap, the
    values that they place at one pixel add up; a normalization scales.

    If ``guided``, a ReLU also stops the gradient where its own result was zero, as a plain gradient
    does (Springenberg et al., section 3.4): sharper in deep layers.

    Example:
        >>> model, x = cnn.models.lenet5(), torch.rand(1, 1, 32, 32, requires_grad=True)
        >>> with visualize.Deconvnet():
        ...     peak = model.features(x)[0, 3].max()
        ...     (projection,) = torch.autograd.grad(peak, x, peak.detach())
    """

    def __init__(self, guided: bool = False):
        super().__init__()
        self._guided = guided

    def _rectify(self, x: Tensor, relu: Any = torch.relu) -> Tensor:
        return _Rectify.apply(x, relu, self._guided)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if relu := _relu_of(func, kwargs):
            x = args[0] if args else kwargs["input"]
            y = self._rectify(x, relu)
            return x.copy_(y) if kwargs.get("inplace", func in _IN_PLACE) else y
        if func is F.conv2d and kwargs.get("activation"):
            return self._rectify(func(*args, **{**kwargs, "activation": None}))
        if func is F.conv2d_relu_max_pool2d:
            window = {name: kwargs.pop(name) for name in [*kwargs] if name.startswith("pool_")}
            y = self._rectify(F.conv2d(*args, **kwargs))
            return F.max_pool2d(y, **{n.removeprefix("pool_"): v for n, v in window.items()})
        return func(*args, **kwargs)


def project(
    model: nn.Module,
    x: Tensor,
    layer: str,
    numbers: Tensor,
    places: Tensor | None = None,
    *,
    guided: bool = False,
) -> Tensor:
    """Project one map of a layer's result on x[N, C, H, W] per image back to pixels.

    Args:
        layer: a layer with maps [N, K, P, Q], or units [N, K], which are maps of one pixel.
        numbers: the map of each image, [N]; all others are set to zero.
        places: the only pixel (p, q) to keep of each map, [N, 2]; by default all are kept.
        guided: see ``Deconvnet``.

    Returns [N, C, H, W]. Raises ValueError if the layer does not exist, is not called or has
    another kind of result, if it lacks a map, and for another kind of x.
    """
    check_images(x, "x")
    if numbers.shape != x.shape[:1]:
        raise ValueError(f"numbers must be {len(x)} maps, got {list(numbers.shape)}")
    pieces = [x.new_empty(0, *x.shape[1:])]
    bar = Progress(f"projections from {layer}", len(x), 0, "image")
    with closing(bar), evaluating(model), torch.enable_grad():
        for start in range(0, len(x), BATCH):
            part = slice(start, start + BATCH)
            image = x[part].detach().requires_grad_()
            with Deconvnet(guided):
                y = _as_maps(outputs(model, image, [layer])[layer], layer)
            _check_numbers(numbers[part], y, layer)
            where = [torch.arange(len(y)), numbers[part]]
            where += [] if places is None else places[part].unbind(1)
            where = tuple(index.to(y.device) for index in where)
            seed = torch.zeros_like(y)
            seed[where] = y.detach()[where]
            pieces += torch.autograd.grad(y, image, seed)
            bar.tick(len(y))
    return torch.cat(pieces)


def _as_maps(y: Tensor, layer: str) -> Tensor:
    if y.dim() not in (2, 4):
        size = list(y.shape)
        raise ValueError(f"layer must give maps or units, got {size} of layer={layer!r}")
    return y if y.dim() == 4 else y[:, :, None, None]


def _check_numbers(numbers: Tensor, y: Tensor, layer: str) -> None:
    """Raise ValueError unless all numbers are those of maps in y[N, K, P, Q]."""
    count = y.shape[1]
    if wrong := [k for k in numbers.tolist() if not 0 <= k < count]:
        raise ValueError(f"numbers must be of the {count} maps of {layer}, got {wrong[0]}")


@dataclass(frozen=True)
class Projections:
    """The ``top`` strongest activations of each of M maps of a layer, no two in one image.

    Attributes:
        numbers: the maps' numbers, [M].
        values: the activations, [M, top], the strongest first.
        sources: the images that hold them, [M, top], by their position among all images.
        places: their pixels (p, q), [M, top, 2].
        images: the input images, [M, top, C, H, W].
        projections: the activations, or the whole maps, projected to pixels, [M, top, C, H, W].
        field: receptive field of a map's pixel in the image; None if it is everything, unknown, or
            whole maps were projected.
    """

    layer: str
    numbers: Tensor
    values: Tensor
    sources: Tensor
    places: Tensor
    images: Tensor
    projections: Tensor
    field: ReceptiveField | None

    def patches(self) -> tuple[Tensor, Tensor]:
        """Projections and images, cropped to what each activation saw: [M, top, C, h, w] both.

        A crop has the size of the receptive field. If it would exceed the image, it is moved
        inside, and is the whole image if that is smaller.
        """
        if self.field is None:
            return self.projections, self.images
        size = torch.tensor(self.images.shape[-2:])
        field, stride, offset = map(torch.tensor, self.field)
        field = field.minimum(size)
        starts = (self.places.cpu() * stride + offset).clamp(min=0).minimum(size - field)
        corners, (h, w) = starts.flatten(0, 1).tolist(), field.tolist()

        def cut(images: Tensor) -> Tensor:
            pairs = zip(images.flatten(0, 1), corners, strict=True)
            pieces = [image[:, top : top + h, left : left + w] for image, (top, left) in pairs]
            return torch.stack(pieces).unflatten(0, images.shape[:2])

        return cut(self.projections), cut(self.images)

    def figure(self) -> Any:
        """Each map's projections, with 0 as grey, and to their right the same parts of images."""
        projections, images = self.patches()
        gap = max(1, images.shape[-1] // 12)
        pictures = []
        for pair in zip(projections, images, strict=True):
            left, right = (
                tiles(shown(part), gap=max(1, gap // 2))
                for shown, part in zip((signed, pixels), pair, strict=True)
            )
            between = torch.ones_like(left[:, :, : 2 * gap])
            pictures.append(torch.cat([left, between, right], 2))
        titles = [f"{number}" for number in self.numbers.tolist()]
        return panels(pictures, titles, 4 if self.values.shape[1] == 1 else 3, "projections")


def deconvnet(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    layer: str,
    numbers: list[int] | None = None,
    *,
    count: int = 9,
    top: int = 9,
    whole: bool = False,
    guided: bool = False,
) -> Projections:
    """The strongest activations of a layer's maps, projected back to the pixels.

    For each map it finds the ``top`` images that excite it most, and in each projects the strongest
    activation, with all others of the layer set to zero, as in figure 2 of the paper.

    Args:
        images: one image [C, H, W], several [N, C, H, W], or batches of these, as the model takes
            them. They pass through the model once; only the strongest are kept.
        layer: a layer with maps [N, K, P, Q], or units [N, K].
        numbers: the maps; by default the ``count`` with the strongest activations in the first
            batch, the strongest first.
        whole: whether to project all activations of a map, not only the strongest.
        guided: see ``Deconvnet``.

    Raises ValueError if the layer does not exist or has another kind of result, if it lacks a map,
    and for another kind of images.

    Example:
        >>> model, images = cnn.models.lenet5(), torch.rand(4, 1, 32, 32)
        >>> found = visualize.deconvnet(model, images, "features.2", numbers=[3, 7], top=2)
        >>> found.projections.shape  # two maps, two images each
        torch.Size([2, 2, 1, 32, 32])
        >>> found.figure().savefig("deconvnet.png")
    """
    if numbers is not None and not numbers:
        raise ValueError(f"numbers must not be empty, got numbers={numbers}")
    for name, value in (("count", count), ("top", top)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {name}={value}")
    batches = [images[None] if images.dim() == 3 else images] if torch.is_tensor(images) else images
    found = _strongest(model, batches, layer, numbers, count, top)
    kept, places, chosen = found["images"], found["places"], found["numbers"]
    flat = kept.flatten(0, 1), layer, chosen.repeat_interleave(kept.shape[1])
    projections = project(model, *flat, None if whole else places.flatten(0, 1), guided=guided)
    try:
        field = None if whole else field_of(model, layer, kept[0])
    except (ValueError, RuntimeError):  # also from a network whose control flow depends on values
        field = None
    return Projections(layer, **found, projections=projections.view_as(kept), field=field)


def _strongest(
    model: nn.Module,
    batches: Iterable[Tensor],
    layer: str,
    numbers: list[int] | None,
    count: int,
    top: int,
) -> dict[str, Tensor]:
    """All fields of Projections that one pass over the images determines."""
    best: dict[str, Tensor] = {}
    chosen, seen = None if numbers is None else torch.tensor(numbers), 0
    with closing(Progress(f"strongest of {layer}", None, 0, "image")) as bar:
        for x in batches:
            check_images(x, "images")
            if not len(x):
                continue
            with evaluating(model), torch.no_grad():
                y = _as_maps(outputs(model, x, [layer])[layer], layer)
            if chosen is None:
                peaks = y.amax((0, 2, 3))
                chosen = peaks.argsort(descending=True, stable=True)[:count].cpu()
            _check_numbers(chosen, y, layer)
            values, pixels = y[:, chosen.to(y.device)].flatten(2).max(2)  # [N, M]
            order = values.T.argsort(dim=1, descending=True, stable=True)[:, :top]
            pixels = pixels.T.gather(1, order)
            here = {
                "values": values.T.gather(1, order),
                "sources": seen + order,
                "places": torch.stack([pixels // y.shape[3], pixels % y.shape[3]], 2),
                "images": x[order.to(x.device)],
            }
            best = _merged(best, here, top)
            seen += len(x)
            bar.tick(len(x))
    if chosen is None or not seen:
        raise ValueError("images must hold at least one image, got none")
    return {"numbers": chosen, **best}


def _merged(best: dict[str, Tensor], more: dict[str, Tensor], top: int) -> dict[str, Tensor]:
    """The ``top`` of both for each map; ties go to the earlier ones."""
    both = {name: torch.cat([best[name], t], 1) if best else t for name, t in more.items()}
    order = both["values"].argsort(dim=1, descending=True, stable=True)[:, :top]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return {name: t[rows, order] for name, t in both.items()}
