"""Arguments as torch's functions read them: numbers made pairs, tensors checked.

What torch does not take either is Invalid here, and torch itself is asked to say why. Sizes may be
symbolic.
"""

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels._private import is_function_mode_enabled, is_watched
from kernels.geometry import Pair, conv_output_sizes, full_padding, same_padding

INT32, INT64 = 2**31 - 1, 2**63 - 1
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Invalid(Exception):
    """Raised for arguments that torch rejects; ``refused`` turns it into torch's exception."""


def require(condition: Any) -> None:
    """Raise Invalid unless what torch requires is so."""
    if not condition:
        raise Invalid


def refused(function: Callable[..., Any], **call: Any) -> Exception:
    """What torch's function raises of a call that is Invalid, with the arguments' names and values.

    It gets tensors of zeros on the CPU, where each error has the class that torch documents.
    """
    operands = "input", "weight", "bias", "indices"  # others may be tensors in place of numbers
    tensors = {name: t for name, t in call.items() if name in operands and isinstance(t, Tensor)}
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    texts = [f"{name} of {shape(t)}, {t.dtype}" for name, t in tensors.items()]
    texts += [f"{name}={value!r:.80}" for name, value in call.items() if name not in tensors]
    got = f"got {', '.join(texts)}"
    try:
        function(**call | zeros)
    except Exception as error:  # of whatever class torch has chosen
        return type(error)(f"{error}, {got}")
    return RuntimeError(f"these arguments are not supported, {got}")


# Whole signatures.


class Convolution(NamedTuple):
    """A convolution's numbers, normalized, with (P, Q) = ``size`` of its result."""

    numbers: dict[str, Any]  # as operators name them; padding is top, bottom, left, right
    size: Pair
    unbatched: bool


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Convolution:
    """The arguments of conv2d after its tensors' types were checked."""
    steps, spread, groups = pair(stride, 1), pair(dilation, 1), one_number(groups)
    unbatched = check_dimensions(input)
    K, channels, R, S = weight_sizes(weight, groups)
    check_channels(input, bias, channels * groups, K)
    pads = conv_padding(padding, (R, S), steps, spread)
    size = conv_output_sizes(input.shape[-2:], (R, S), steps, pads, spread)
    require(size[0] >= 1 and size[1] >= 1)
    numbers = {"stride": steps, "padding": pads, "dilation": spread, "groups": groups}
    return Convolution(numbers, size, unbatched)


def pooling(kernel_size: Any, stride: Any, padding: Any) -> tuple[Pair, Pair, Pair]:
    """(kernel, stride, padding) of a pooling."""
    kernel = pair(kernel_size, 1, INT32)
    default = stride is None or (isinstance(stride, list | tuple) and len(stride) == 0)
    steps = kernel if default else pair(stride, 1, INT32)
    pads = pair(padding, 0, INT32)
    require(pads[0] <= kernel[0] // 2 and pads[1] <= kernel[1] // 2)
    return kernel, steps, pads


# Numbers.


def pair(value: Any, least: int, most: int = INT64) -> Pair:
    """(height, width) from a number or a sequence of one or two, each in [least, most]."""
    if type(value) is int:
        numbers = (value, value)
    elif type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        numbers = value
    else:
        numbers = _parsed_pair(value)
    require(least <= numbers[0] <= most and least <= numbers[1] <= most)
    return numbers


def _parsed_pair(value: Any) -> Pair:
    """What torch takes besides plain ints: lists, NumPy's integers, integer tensors, SymInts.

    A bool is refused where it stands first, and only there: that is torch's rule.
    """
    items = value if isinstance(value, list | tuple) else [value]
    require(len(items) in (1, 2) and not isinstance(items[0], bool))
    try:
        numbers: Any = [v if _is_int(v) else operator.index(v) for v in items]
    except TypeError:
        raise Invalid from None
    return numbers[0], numbers[-1]


def _is_int(value: Any) -> bool:
    """Also of a symbolic int, which torch.compile shows as an int and other tracers as a SymInt."""
    return type(value) is int or isinstance(value, torch.SymInt)


def one_number(value: Any) -> int:
    require(not isinstance(value, list | tuple))
    return pair(value, 1)[0]


def conv_padding(
    padding: Any, kernel: Pair, stride: Pair, dilation: Pair
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) from numbers or a name."""
    if not isinstance(padding, str | bytes):
        height, width = pair(padding, 0)
        return height, height, width, width
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "full":
        return *full_padding(kernel[0], dilation[0]), *full_padding(kernel[1], dilation[1])
    require(padding == "same" and stride[0] == stride[1] == 1)
    return *same_padding(kernel[0], dilation[0]), *same_padding(kernel[1], dilation[1])


def unpool_size(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> Pair:
    """(H, W) that max_unpool2d gives, by rules that are not those of torch's pooling.

    Bools and negative padding pass, NumPy's integers do not, and items after the second are ignored
    except in kernel_size.
    """
    kernel, pads = _unpool_items(kernel_size), _unpool_items(padding)
    steps = kernel if stride is None else _unpool_items(stride)
    require(len(kernel) == 2 and len(steps) >= 2 and len(pads) >= 2)
    P, Q = input.shape[-2:]
    H = (P - 1) * steps[0] + kernel[0] - 2 * pads[0]
    W = (Q - 1) * steps[1] + kernel[1] - 2 * pads[1]
    if output_size is not None:
        require(isinstance(output_size, list | tuple) and len(output_size) in (2, 4))
        height, width = _unpool_items(output_size)[-2:]
        require(abs(height - H) < steps[0] and abs(width - W) < steps[1])
        H, W = height, width
    require(H >= 0 and W >= 0)
    return H, W


def _unpool_items(value: Any) -> Sequence[int]:
    items = tuple(value) if isinstance(value, Sequence) else (value, value)
    require(all(isinstance(v, int | torch.SymInt) for v in items))
    return items


# Tensors.


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def check_tensors(**tensors: Any) -> None:
    """That all are tensors; those may be None that an operator does without."""
    for name, value in tensors.items():
        optional = value is None and name not in ("input", "weight", "indices")
        if name in ("residual", "scale") and not optional and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {name}={value!r:.80}")
        require(optional or isinstance(value, Tensor))


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be None or one of {choices}, got {name}={value!r:.80}")


def check_dimensions(input: Tensor) -> bool:
    """Whether input is unbatched."""
    require(input.dim() in (3, 4))
    return input.dim() == 3


def weight_sizes(weight: Tensor, groups: int) -> tuple[int, int, int, int]:
    """K, C / groups, R and S."""
    require(weight.dim() == 4 and 0 not in weight.shape[2:])
    K, channels, R, S = weight.shape
    require(K % groups == 0 and groups <= K)
    return K, channels, R, S


def check_channels(input: Tensor, bias: Tensor | None, entering: int, leaving: int) -> None:
    require(input.shape[-3] == entering and (bias is None or bias.shape == (leaving,)))


def check_pixels(input: Tensor) -> None:
    """torch convolves images without a pixel only where there are no images or no channels."""
    require(0 not in input.shape[-2:] or 0 in input.shape[:-2])


def check_devices(input: Tensor, **others: Tensor | None) -> None:
    device, layout = input.device, input.layout
    for name, t in others.items():
        if t is not None and (t.device != device or t.layout != layout):
            raise RuntimeError(
                f"{name} must have input's device and layout, got {name} on {t.device}, "
                f"{t.layout}, and input on {device}, {layout}"
            )


def check_residual(residual: Tensor | None, input: Tensor, weight: Tensor, size: Pair) -> None:
    """That it has the shape of the result, whose rows and columns are ``size``."""
    if residual is None:
        return
    channels = weight.shape[0] if input.shape[-3] else 0
    expected = (*input.shape[:-3], channels, *size)
    if residual.shape != expected:
        raise ValueError(
            f"residual must have the result's shape {expected}, got residual of {shape(residual)}"
        )


def check_dtypes(input: Tensor, **others: Tensor | None) -> None:
    dtype = input.dtype
    for name, t in others.items():
        if t is not None and t.dtype != dtype:
            raise RuntimeError(
                f"{name} must have input's dtype, got {name} of {t.dtype} and input of {dtype}"
            )
    if dtype not in DTYPES:
        raise NotImplementedError(f"input must be one of {DTYPES}, got input of {dtype}")
    if input.layout != torch.strided:
        raise NotImplementedError(f"input must be strided, got input of {input.layout}")


def check_bytes(
    input: Tensor, weight: Tensor, groups: int, normalize: Any
) -> tuple[Tensor, Tensor]:
    """scale[C] and shift[C] of an input of bytes."""
    if not isinstance(normalize, tuple) or len(normalize) != 2:
        raise TypeError(f"normalize must be (scale, shift), got normalize={normalize!r:.80}")
    if input.dtype != torch.uint8:
        raise RuntimeError(f"with normalize, input must be torch.uint8, got {input.dtype}")
    C = input.shape[-3]
    if not 1 <= C // groups <= 4:
        raise NotImplementedError(
            "an input of bytes must have 1 to 4 channels to a group, got input of "
            f"{shape(input)} and groups={groups}"
        )
    scale, shift = (_constant(value, C, input.device) for value in normalize)
    return scale, shift


def _constant(value: Any, channels: int, where: torch.device) -> Tensor:
    """float32 [C] from a tensor, a number or a sequence; it gets no gradient."""
    if not isinstance(value, Tensor):
        value = tuple(value) if isinstance(value, list) else value
        value = (_new_on_device if _is_watched() else _on_device)(value, where)
    if value.device != where or not value.is_floating_point():
        raise RuntimeError(
            f"normalize must hold floats on {where}, got {value.dtype} on {value.device}"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("normalize gets no gradient, got a tensor that requires one")
    if value.shape not in ((), (1,), (channels,)):
        raise RuntimeError(
            f"normalize must hold scalars or [{channels}], got one of {shape(value)}"
        )
    return value.to(torch.float32).expand(channels)


def _is_watched() -> bool:
    """Whether a tensor that is made now may be another than it would be later: a fake one, say."""
    return torch.compiler.is_compiling() or is_watched() or is_function_mode_enabled()


def _new_on_device(value: float | tuple[float, ...], where: torch.device) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32, device=where)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"normalize must hold numbers, got {value!r:.80}") from None


@lru_cache(maxsize=256)
def _on_device(value: float | tuple[float, ...], where: torch.device) -> Tensor:
    """Made once, as a copy to a GPU waits for it; and for all modes of autograd."""
    with torch.inference_mode(False):
        return _new_on_device(value, where)


def check_scale(scale: Tensor, filters: int, *operands: Tensor | None) -> None:
    """That scale, input, weight, bias and residual suit a float8 convolution."""
    for name, t, dtype in zip(
        ("scale", "input", "weight", "bias", "residual"),
        (scale, *operands),
        (torch.float32, *[torch.float8_e4m3fn] * 2, *[torch.bfloat16] * 2),
        strict=True,
    ):
        if t is not None and t.dtype != dtype:
            raise RuntimeError(f"with scale, {name} must be {dtype}, got {name} of {t.dtype}")
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"a float8 convolution has no gradient, got {name} that requires one"
            )
    if scale.shape not in ((), (1,), (filters,)):
        raise RuntimeError(f"scale must be a scalar or [{filters}], got scale of {shape(scale)}")
