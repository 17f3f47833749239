"""Casts that an operator owes to ``torch.autocast``, as torch's own operators make them."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All in the autocast dtype of x's device; as they are where autocast is not enabled."""
    kind = "cuda" if x.is_cuda else x.device.type  # is_cuda is the cheaper question
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None else cast(t, dtype) for t in (x, *others))


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers and float64 stay as they are; a float32 parameter is cast once in a region."""
    if t.dtype == dtype or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    if t.dtype == torch.float32 and t.requires_grad and t.is_leaf and _may_share(t):
        return _shared_cast(t, dtype)
    return t.to(dtype)


def _may_share(t: Tensor) -> bool:
    return (
        torch.is_autocast_cache_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_inference_mode_enabled()  # torch keeps nothing there
        and not torch._C._are_functorch_transforms_active()  # what they save is wrapped
        and t.dim() in (1, 4)
        and t.numel() > 0
    )


def _shared_cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast of a parameter that torch keeps until the outermost autocast region ends.

    Only torch's operators can reach it. So one is run on an empty batch, which launches nothing,
    and what it has saved for backward is taken: the cast, at its place in the autograd graph. The
    hooks keep a caller's own, such as a checkpoint's, from seeing this; where hooks are disabled
    there are none.
    """
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    hooks = saved_tensors_hooks(lambda t: t, lambda t: t) if enabled else nullcontext()
    with torch.enable_grad(), hooks:
        if t.dim() == 1:
            empty = t.new_empty((0, *t.shape), dtype=dtype, requires_grad=True)
            return torch.matmul(empty, t).grad_fn._saved_vec  # type: ignore[union-attr]
        empty = t.new_empty((0, *t.shape[1:]), dtype=dtype, requires_grad=True)
        return torch.conv2d(empty, t).grad_fn._saved_weight  # type: ignore[union-attr]
