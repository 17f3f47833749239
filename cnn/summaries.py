"""A table of a network's layers, found without computing anything."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from kernels._private import TorchDispatchMode, defaults_of, pytree
from kernels.geometry import Pair, ReceptiveField

from .console import by, table


class Layer(NamedTuple):
    """One call of a layer: a module without children that is not an Identity.

    ``field`` is the receptive field of an output pixel in the network's input, None if unknown.
    ``parameters`` counts those that no earlier call used. ``flops`` counts a multiply-add as two,
    as FlopCounterMode does.
    """

    name: str
    kind: str
    output_size: tuple[int, ...]
    field: ReceptiveField | None
    parameters: int
    flops: int


class Summary(NamedTuple):
    """A network's layers in the order of their calls, and its totals. ``str`` gives a table."""

    layers: tuple[Layer, ...]
    parameters: int
    flops: int

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", "output", "field", "parameters", "FLOPs")]
        for name, kind, size, field, *numbers in self.layers:
            seen = by(field.size) if field else "-"
            rows.append((name, kind, by(size), seen, *(f"{number:,}" for number in numbers)))
        rows.append(("total", "", "", "", f"{self.parameters:,}", f"{self.flops:,}"))
        return table(rows, "<<>>>>")


def summary(
    model: nn.Module, input_size: tuple[int, ...], dtype: torch.dtype | None = None
) -> Summary:
    """A table of a network's layers, with output size, receptive field, parameters and FLOPs.

    It works for any network. The network runs on the meta device, in its current mode, so nothing
    is computed or kept.

    Args:
        input_size: shape of the input, including the batch: (1, 3, 224, 224).
        dtype: dtype of the input; by default that of the first parameter.

    A receptive field is the smallest rectangle of pixels on which an output depends, along any
    path. Convolutions and poolings enlarge it. It is unknown after layers that see everything, such
    as linear ones, after layers that change the map's size in other ways, such as transposed
    convolutions, and where branches with different strides meet.

    Example:
        >>> print(cnn.summary(cnn.models.lenet5().features, (1, 1, 32, 32)))
        layer  kind                  output  field  parameters    FLOPs
        0      ConvReLUMaxPool2d  1x6x14x14    6x6         156  235,200
        2      ConvReLUMaxPool2d   1x16x5x5  16x16       2,416  480,000
        total                                            2,572  715,200
    """
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    x = torch.empty(input_size, dtype=dtype or next(dtypes, None), device="meta")
    names = {layer: name for name, layer in model.named_modules() if _is_layer(name, layer)}
    uses = {layer: {id(p): p.numel() for p in layer.parameters()} for layer in names}
    rows, used, flops = [], set(), 0
    fields, counter = _Fields(x), FlopCounterMode(display=False)

    def begin(*_: Any) -> None:
        nonlocal flops
        flops = counter.get_total_flops()

    def end(layer: nn.Module, _: Any, output: Any) -> None:
        y = next(iter(_tensors(output)), None)
        if y is None:
            return
        parameters = sum(n for p, n in uses[layer].items() if p not in used)
        used.update(uses[layer])
        cost = counter.get_total_flops() - flops
        about = names[layer], type(layer).__name__, tuple(y.shape)
        rows.append(Layer(*about, fields.of(y), parameters, cost))

    hooks = [layer.register_forward_pre_hook(begin) for layer in names]
    hooks += [layer.register_forward_hook(end) for layer in names]
    state = [*model.named_parameters(), *model.named_buffers()]
    try:
        with torch.no_grad(), counter, fields:
            functional_call(model, {name: t.to("meta") for name, t in state}, x)
    finally:
        for hook in hooks:
            hook.remove()
    total = sum(p.numel() for p in model.parameters())
    return Summary(tuple(rows), total, counter.get_total_flops())


def _is_layer(name: str, module: nn.Module) -> bool:
    """Whether a module does something itself and has no children but parametrizations."""
    if isinstance(module, nn.Identity) or "parametrizations" in name.split("."):
        return False
    return all(child == "parametrizations" for child, _ in module.named_children())


class _Fields(TorchDispatchMode):
    """Tracks the receptive field of each map in ``x``, operator by operator."""

    def __init__(self, x: Tensor):
        super().__init__()
        self._fields: Any = WeakTensorKeyDictionary()
        self._fields[x] = ReceptiveField()

    def of(self, t: Tensor) -> ReceptiveField | None:
        """The receptive field of a tensor's pixels, None if unknown."""
        return self._fields.get(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [t for t in _tensors((args, kwargs)) if t in self._fields]
        if sources:
            windows = _windows(func, args, kwargs or {})
            for y in _tensors(result):
                fields = [self._passed(t, y, windows if t is args[0] else []) for t in sources]
                self._fields[y] = reduce(_both, fields)
        return result

    def _passed(self, t: Tensor, y: Tensor, windows: "Windows") -> ReceptiveField | None:
        """The receptive field of y through t, on which the operator moves ``windows``."""
        field = self._fields[t]
        if field is None or windows is None:
            return None
        if windows:
            return reduce(ReceptiveField.through, windows, field)
        one_pixel = t.shape[-2:] == (1, 1)
        return field if one_pixel or t.shape[-2:] == y.shape[-2:] else None


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _both(one: ReceptiveField | None, other: ReceptiveField | None) -> ReceptiveField | None:
    return one | other if one and other and one.stride == other.stride else None


class _Window(NamedTuple):
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


Windows = list[_Window] | None


def _windows(func: Any, args: Any, kwargs: dict[str, Any]) -> Windows:
    """The windows that an operator moves over its first tensor, in order; empty if it works pixel
    by pixel, None if unknown.
    """
    values = defaults_of(func)
    values |= dict(zip(values, args, strict=False)) | kwargs
    match str(func.overloadpacket):
        case "aten.convolution":
            kernel = values["weight"].shape[2:]
            window = _Window(kernel, values["stride"], values["padding"], values["dilation"])
            return None if values["transposed"] else [window]
        case "aten.max_pool2d_with_indices":
            kernel, padding, dilation = (values[n] for n in ("kernel_size", "padding", "dilation"))
            return [_Window(kernel, values["stride"] or kernel, padding, dilation)]
        case "aten.avg_pool2d":
            kernel = values["kernel_size"]
            return [_Window(kernel, values["stride"] or kernel, values["padding"])]
        case "aten._adaptive_avg_pool2d" | "aten.adaptive_max_pool2d":
            sizes = zip(args[0].shape[-2:], values["output_size"], strict=True)
            (height, top), (width, left) = (divmod(*pair) for pair in sizes)
            kernel = height, width
            return [_Window(kernel, kernel)] if top == left == 0 else None
        case "aten.mean" | "aten.amax":
            axes = {axis % args[0].dim() - args[0].dim() for axis in values.get("dim") or (-2, -1)}
            return [_Window(args[0].shape[-2:], (1, 1))] if {-2, -1} <= axes else []
        case (
            "triton_cnn.conv2d"
            | "triton_cnn.conv2d_bytes"
            | "triton_cnn.conv2d_fp8"
            | "triton_cnn.conv2d_relu_max_pool2d"
        ):
            top, _, left, _ = values["padding"]
            kernel = values["w"].shape[2:]
            windows = [_Window(kernel, values["stride"], (top, left), values["dilation"])]
            if "pool_kernel" in values:
                pool = (values[f"pool_{part}"] for part in ("kernel", "stride", "padding"))
                windows.append(_Window(*pool))
            return windows
        case "triton_cnn.max_pool2d":
            parts = (values[part] for part in ("kernel", "stride", "padding", "dilation"))
            return [_Window(*parts)]
        case _:
            return None if func.overloadpacket in flop_registry else []
