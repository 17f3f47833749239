"""Arguments as torch's functions read them: numbers made pairs, tensors checked.

Each error is of the class that torch raises, and names the argument and its value. Types are
TypeErrors, values RuntimeErrors. Sizes may be symbolic.
"""

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels import library
from kernels._private import is_any_autocast_enabled, is_function_mode_enabled, is_watched
from kernels.geometry import Pair, conv_places, full_padding, same_padding

INT32, INT64 = 2**31 - 1, 2**63 - 1
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Calls that come again.

_PLAIN = {int, str, type(None)}
_TENSORS = {Tensor, Parameter}


def call_key(name: str, tensors: tuple, arguments: tuple) -> tuple | None:
    """All that the checks and plan look at, so that they are made once; None where it may not
    be kept.

    Numbers that are equal need not be alike: True and 1.0 are refused where 1 is not. So only
    calls with plain numbers are kept, and none that is traced or cast on the way.
    """
    if torch.compiler.is_compiling() or is_function_mode_enabled():
        return None
    if type(tensors[0]) not in _TENSORS or not library.runs_kernels(tensors[0]):
        return None
    for value in arguments:
        if type(value) not in _PLAIN:
            if type(value) is not tuple:
                return None
            for item in value:
                if type(item) is not int:
                    return None
    if is_any_autocast_enabled() or (setting := library.setting(tensors[0])) is None:
        return None
    key: list[Any] = [name, setting, arguments]
    try:
        for t in tensors:
            if t is None:
                key.append(None)
            elif type(t) in _TENSORS and not t.is_neg() and (start := t.data_ptr()):
                key += (t.shape, t.stride(), t.dtype, t.device, start % 16)
            else:
                return None  # its values are not what lies in its memory: see library.is_plain
    except RuntimeError:  # t is not strided, or has no memory
        return None
    return tuple(key)


def remember(calls: dict[tuple, Callable], key: tuple, call: Callable) -> None:
    """Keep a call that has passed its checks."""
    if len(calls) >= 4096:
        calls.clear()
    calls[key] = call


# Whole signatures.


class Convolution(NamedTuple):
    """A convolution's numbers, normalised, with (P, Q) = ``size`` of its result."""

    stride: Pair
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: Pair
    groups: int
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
    steps, spread = pair("stride", stride, 1), pair("dilation", dilation, 1)
    groups = one_number("groups", groups, 1)
    unbatched = check_dimensions(input)
    K, channels, R, S = weight_sizes(weight, groups)
    check_channels(input, weight, bias, groups, channels * groups, K)
    pads = conv_padding(padding, (R, S), stride, steps, spread)
    size = conv_places(input.shape[-2:], (R, S), steps, pads, spread)
    if size[0] < 1 or size[1] < 1:
        raise RuntimeError(
            f"weight must fit into the padded input, got input of {shape(input)}, weight of "
            f"{shape(weight)}, padding={padding!r} and dilation={dilation!r}"
        )
    return Convolution(steps, pads, spread, groups, size, unbatched)


def pooling(
    kernel_size: Any, stride: Any, padding: Any, prefix: str = ""
) -> tuple[Pair, Pair, Pair]:
    """(kernel, stride, padding) of a pooling, whose arguments' names begin with ``prefix``."""
    kernel = pair(f"{prefix}kernel_size", kernel_size, 1, INT32)
    default = stride is None or (isinstance(stride, list | tuple) and len(stride) == 0)
    steps = kernel if default else pair(f"{prefix}stride", stride, 1, INT32)
    pads = pair(f"{prefix}padding", padding, 0, INT32)
    if pads[0] > kernel[0] // 2 or pads[1] > kernel[1] // 2:
        raise RuntimeError(
            f"{prefix}padding must be at most half of {prefix}kernel_size, got "
            f"{prefix}padding={padding!r} and {prefix}kernel_size={kernel_size!r}"
        )
    return kernel, steps, pads


# Numbers.


def pair(name: str, value: Any, least: int, most: int = INT64) -> Pair:
    """(height, width) from a number or a sequence of one or two, each in [least, most]."""
    if type(value) is int:
        numbers = (value, value)
    elif type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        numbers = value
    else:
        numbers = _parsed_pair(name, value)
    if least <= numbers[0] <= most and least <= numbers[1] <= most:
        return numbers
    if max(numbers) > INT64:
        kind = TypeError if isinstance(value, list | tuple) else ValueError
        raise kind(f"{name} must fit into 64 bits, got {name}={value!r}")
    bound = f"at least {least}" if min(numbers) < least else f"at most {most}"
    raise RuntimeError(f"{name} must be {bound}, got {name}={value!r}")


def _parsed_pair(name: str, value: Any) -> Pair:
    """What torch takes besides plain ints: lists, NumPy's integers, integer tensors, SymInts.

    A bool is refused where it stands first, and only there: that is torch's rule.
    """
    items = value if isinstance(value, list | tuple) else [value]
    try:
        numbers: Any = [v if _is_int(v) else operator.index(v) for v in items]
    except TypeError:
        numbers = None
    if numbers is None or (items and isinstance(items[0], bool)):
        raise TypeError(f"{name} must be an integer or a pair, got {name}={value!r:.80}")
    if len(numbers) not in (1, 2):
        raise RuntimeError(f"{name} must be an integer or a pair, got {name}={value!r:.80}")
    return numbers[0], numbers[-1]


def _is_int(value: Any) -> bool:
    """Also of a symbolic int, which torch.compile shows as an int and other tracers as a SymInt."""
    return type(value) is int or isinstance(value, torch.SymInt)


def one_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, list | tuple):
        raise TypeError(f"{name} must be an integer, got {name}={value!r:.80}")
    return pair(name, value, least)[0]


def conv_padding(
    padding: Any, kernel: Pair, stride: Any, steps: Pair, dilation: Pair
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) from numbers or a name; ``steps`` is the pair from ``stride``."""
    if not isinstance(padding, str | bytes):
        height, width = pair("padding", padding, 0)
        return height, height, width, width
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "full":
        return *full_padding(kernel[0], dilation[0]), *full_padding(kernel[1], dilation[1])
    if padding != "same":
        raise RuntimeError(
            f"padding must be numbers, 'valid', 'same' or 'full', got padding={padding!r}"
        )
    if steps[0] != 1 or steps[1] != 1:
        raise RuntimeError(f"padding='same' needs a stride of 1, got stride={stride!r}")
    return *same_padding(kernel[0], dilation[0]), *same_padding(kernel[1], dilation[1])


def unpool_size(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> Pair:
    """(H, W) that max_unpool2d gives, by rules that are not those of torch's pooling.

    Bools and negative padding pass, NumPy's integers do not, items after the second are ignored
    except in kernel_size, and what is too short is an IndexError.
    """
    kernel = _unpool_items("kernel_size", kernel_size)
    steps = kernel if stride is None else _unpool_items("stride", stride)
    pads = _unpool_items("padding", padding)
    got = f"got kernel_size={kernel_size!r}, stride={stride!r}, padding={padding!r}"
    if len(kernel) < 2:
        raise RuntimeError(f"kernel_size must be an integer or a pair, {got}")
    if len(kernel) > 2 or len(steps) < 2 or len(pads) < 2 or input.dim() < 2:
        raise IndexError(f"pairs and an image are needed, {got} and input of {shape(input)}")
    P, Q = input.shape[-2:]
    H = (P - 1) * steps[0] + kernel[0] - 2 * pads[0]
    W = (Q - 1) * steps[1] + kernel[1] - 2 * pads[1]
    if output_size is None:
        if H < 0 or W < 0:
            raise ValueError(f"{(H, W)} is no output_size, {got} and input of {shape(input)}")
        return H, W
    if not isinstance(output_size, list | tuple):
        raise TypeError(f"output_size must be a tuple, got output_size={output_size!r:.80}")
    sizes = _unpool_items("output_size", output_size)
    if len(sizes) not in (2, 4):
        raise ValueError(f"output_size must be (H, W) or 4-D, got output_size={output_size!r}")
    height, width = sizes[-2:]
    if abs(height - H) >= steps[0] or abs(width - W) >= steps[1] or height < 0 or width < 0:
        raise ValueError(
            f"output_size must be within a stride of {(H, W)}, got output_size={output_size!r}"
        )
    return height, width


def _unpool_items(name: str, value: Any) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, Sequence) else (value, value)
    if not all(isinstance(v, int | torch.SymInt) for v in items):
        raise TypeError(f"{name} must be integers, got {name}={value!r:.80}")
    return items


# Tensors.


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def check_tensor(name: str, value: Any, optional: bool = False) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(f"{name} must be a Tensor, got {name}={value!r:.80}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be None or one of {choices}, got {name}={value!r:.80}")


def check_dimensions(input: Tensor) -> bool:
    """Whether input is unbatched."""
    if input.dim() not in (3, 4):
        raise RuntimeError(f"input must be 3-D (unbatched) or 4-D, got input of {shape(input)}")
    return input.dim() == 3


def weight_sizes(weight: Tensor, groups: int) -> tuple[int, int, int, int]:
    """K, C / groups, R and S."""
    if weight.dim() != 4 or 0 in weight.shape[2:]:
        raise RuntimeError(f"weight must be 4-D and have taps, got weight of {shape(weight)}")
    K, channels, R, S = weight.shape
    if K % groups != 0 or groups > K:
        raise RuntimeError(
            "weight's first size must be a multiple of groups, got "
            f"weight of {shape(weight)} and groups={groups}"
        )
    return K, channels, R, S


def check_channels(
    input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, entering: int, leaving: int
) -> None:
    if input.shape[-3] != entering:
        raise RuntimeError(
            f"input must have {entering} channels, got input of {shape(input)}, "
            f"weight of {shape(weight)} and groups={groups}"
        )
    if bias is not None and bias.shape != (leaving,):
        raise RuntimeError(f"bias must have shape ({leaving},), got bias of {shape(bias)}")


def check_pixels(input: Tensor) -> None:
    """torch convolves images without a pixel only where there are no images or no channels."""
    if 0 in input.shape[-2:] and 0 not in input.shape[:-2]:
        raise RuntimeError(f"input must have pixels, got input of {shape(input)}")


def check_not_empty(input: Tensor, sizes: Sequence[int]) -> None:
    if 0 in sizes:
        raise RuntimeError(f"only input's batch may be empty, got input of {shape(input)}")


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
    input: Tensor, weight: Tensor, groups: int, normalise: Any
) -> tuple[Tensor, Tensor]:
    """scale[C] and shift[C] of an input of bytes."""
    if not isinstance(normalise, tuple) or len(normalise) != 2:
        raise TypeError(f"normalise must be (scale, shift), got normalise={normalise!r:.80}")
    if input.dtype != torch.uint8:
        raise RuntimeError(f"with normalise, input must be torch.uint8, got {input.dtype}")
    C = input.shape[-3]
    if not 1 <= C // groups <= 4:
        raise NotImplementedError(
            "an input of bytes must have 1 to 4 channels to a group, got input of "
            f"{shape(input)} and groups={groups}"
        )
    scale, shift = (_constant(value, C, input.device) for value in normalise)
    return scale, shift


def _constant(value: Any, channels: int, where: torch.device) -> Tensor:
    """float32 [C] from a tensor, a number or a sequence; it gets no gradient."""
    if not isinstance(value, Tensor):
        value = tuple(value) if isinstance(value, list) else value
        value = (_new_on_device if _is_watched() else _on_device)(value, where)
    if value.device != where or not value.is_floating_point():
        raise RuntimeError(
            f"normalise must hold floats on {where}, got {value.dtype} on {value.device}"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("normalise gets no gradient, got a tensor that requires one")
    if value.shape not in ((), (1,), (channels,)):
        raise RuntimeError(
            f"normalise must hold scalars or [{channels}], got one of {shape(value)}"
        )
    return value.to(torch.float32).expand(channels)


def _is_watched() -> bool:
    """Whether a tensor that is made now may be another than it would be later: a fake one, say."""
    return torch.compiler.is_compiling() or is_watched() or is_function_mode_enabled()


def _new_on_device(value: float | tuple[float, ...], where: torch.device) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32, device=where)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"normalise must hold numbers, got {value!r:.80}") from None


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
