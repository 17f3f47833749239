"""The cache of calls, and which calls may be kept or bypass PyTorch's dispatcher.

One dict maps a key to a function that repeats the call. The key has everything that the launches
depend on: all but the tensors' elements. There are two kinds of keys. ``function_key`` is of a call
as a user spells it, and saves the checks of its arguments: stride 1 and (1, 1) are two such keys,
and so are calls with and without recording for backward. ``operator_key`` is of an operator's final
arguments, from a backward pass, a compiled graph or a new call of a function, and saves the
planning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import autotune, device
from .._private import is_any_autocast_enabled, is_function_mode_enabled, is_watched
from ..device import describe
from .tensors import resolve_precision

_TENSORS = {Tensor, Parameter}
_NUMBERS = {int, str, type(None)}
_MOST = 8192

known: dict[tuple, Callable[..., Any]] = {}
"""What computes a call that comes again, from its tensors: by its key."""


def remember(key: tuple, call: Callable[..., Any]) -> None:
    """Keep what computes a call."""
    if len(known) >= _MOST:
        known.clear()
    known[key] = call


def may_replay() -> bool:
    """Whether a call that is known may be repeated: not while plans are measured or compiled."""
    return device.may_replay() and not autotune.is_enabled()


def runs_kernels(x: Tensor) -> bool:
    """Whether kernels compute what is called on x."""
    return x.is_cuda or (x.is_cpu and device.takes_cpu())


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on the tensors may pass PyTorch's dispatcher by: nothing watches it, and their
    values are what lies in their memory.

    That is not so of tensors of other classes, of lazily negated ones, and of all that have no
    memory: wrappers of a transform, also of one that has ended, zeros that are none but in name,
    functional tensors. To ask each tensor for its dispatch keys would take three times as long.
    """
    if is_watched():
        return False
    try:
        for t in tensors:
            if t is not None and (type(t) not in _TENSORS or t.is_neg() or not t.data_ptr()):
                return False
    except RuntimeError:  # wrappers do not tell where their memory is
        return False
    return True


def function_key(name: str, tensors: Sequence[Tensor | None], arguments: tuple) -> tuple | None:
    """The key of a function's call: all that its checks and its plan read. None if it may not be
    kept.

    Only ints, strings and None are keys: True == 1 == 1.0, but only 1 is a valid stride. Nor is a
    call that is traced or cast on the way.
    """
    if torch.compiler.is_compiling() or is_function_mode_enabled():
        return None
    x: Any = tensors[0]
    if type(x) not in _TENSORS or not runs_kernels(x):
        return None
    for value in arguments:
        if type(value) not in _NUMBERS:
            if type(value) is not tuple:
                return None
            for item in value:
                if type(item) is not int:
                    return None
    if is_any_autocast_enabled() or is_watched() or not may_replay():
        return None
    precision = x.dtype == torch.float32 and resolve_precision(None, x)
    key: list[Any] = [name, describe(x.device), precision, torch.is_grad_enabled(), arguments]
    try:
        for t in tensors:
            if t is None:
                key.append(None)
            elif type(t) in _TENSORS and not t.is_neg() and (start := t.data_ptr()):
                key += (t.shape, t.stride(), t.dtype, t.device, start % 16)
            else:
                return None  # its values are not what lies in its memory: see is_plain
    except RuntimeError:  # t is not strided, or has no memory
        return None
    return tuple(key)


def operator_key(operator: Any, tensors: Sequence[Tensor | None], numbers: tuple) -> tuple:
    """The key of an operator's call: all that its plan reads."""
    x: Any = tensors[0]
    key: list[Any] = [operator, describe(x.device)]
    single = None
    for t in tensors:
        if t is None:
            key.append(None)
        else:
            key += (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)
            if t.dtype == torch.float32:
                single = t
    key += numbers
    if single is not None:
        key.append(resolve_precision(None, single))
    return tuple(key)
