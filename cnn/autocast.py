"""The casts of ``torch.autocast``, as torch's own operators make them."""

from typing import Any

import torch
from torch import Tensor

from kernels._private import autocasts_copy, is_transformed


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All tensors in the autocast dtype of x's device; unchanged if autocast is off."""
    kind = "cuda" if x.is_cuda else x.device.type  # is_cuda is the cheaper question
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None else cast(t, dtype) for t in (x, *others))


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``, but integers and float64 unchanged; float32 parameters are cast only once
    per region.
    """
    if t.dtype == dtype or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    if t.dtype == torch.float32 and t.requires_grad and t.is_leaf and _may_share(t):
        return autocasts_copy(t, dtype)
    return t.to(dtype)


def _may_share(t: Tensor) -> bool:
    return (
        torch.is_autocast_cache_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_inference_mode_enabled()  # torch caches nothing there
        and not is_transformed()  # saved tensors are wrapped there
        and t.dim() in (1, 4)
        and t.numel() > 0
    )
