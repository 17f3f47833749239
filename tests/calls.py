"""Calls of cnn.functional's functions by keyword, which torch.nn.functional's take alike."""

from math import prod

import torch

TENSORS = ("input", "weight", "bias", "residual", "indices")

# A valid call of each function: the tables below replace some of its arguments. For a tensor,
# a tuple is its shape and a dtype its dtype.
VALID = {
    "conv2d": {"input": (2, 4, 9, 11), "weight": (6, 4, 3, 3)},
    "conv_transpose2d": {"input": (2, 4, 5, 6), "weight": (4, 6, 3, 3)},
    "max_pool2d": {"input": (2, 4, 9, 11), "kernel_size": 3},
    "max_unpool2d": {"input": (2, 4, 4, 5), "indices": (2, 4, 4, 5), "kernel_size": 2},
}


def arguments(function: str, changes: dict, device="cpu", dtype=torch.float32) -> dict:
    """The keyword arguments of a call: ``function``'s valid ones with these changes."""
    random = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple, kind: torch.dtype) -> torch.Tensor:
        if name == "indices":  # all different in each plane, and inside of it
            flat = torch.arange(prod(shape)) % max(1, prod(shape[-2:]))
            return flat.reshape(shape).to(device, kind)
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device, kind)

    def value(name: str, change):
        if name not in TENSORS or not isinstance(change, tuple | torch.dtype):
            return change
        kind = torch.int64 if name == "indices" else dtype
        if isinstance(change, tuple):
            return tensor(name, change, kind)
        return tensor(name, VALID[function].get(name, (6,)), change)

    return {name: value(name, change) for name, change in {**VALID[function], **changes}.items()}
