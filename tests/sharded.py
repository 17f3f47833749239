"""One of two processes that share batches as DTensors: RANK FILE, through which they meet.

Results, gradients and placements, against torch's functions on whole tensors.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as TF
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

import cnn.functional as F

Function = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def relu(m: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    if m is F:
        return F.conv2d(x, w, b, padding=1, activation="relu", residual=x)
    return TF.relu(x + TF.conv2d(x, w, b, padding=1))


def pooled(m: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    if m is F:
        return F.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=2)
    return TF.max_pool2d(TF.relu(TF.conv2d(x, w, b)), 2)


FUNCTIONS: dict[str, Function] = {
    "conv2d": lambda m, x, w, b: m.conv2d(x, w, b, padding=1),
    "conv2d of another stride": lambda m, x, w, b: m.conv2d(x, w, b, 2, padding=1),
    "residual and ReLU": relu,
    "conv_transpose2d": lambda m, x, w, b: m.conv_transpose2d(x, w, b, stride=2),
    "max_pool2d": lambda m, x, w, b: m.max_pool2d(x, 3, 2, 1),
    "max_unpool2d": lambda m, x, w, b: m.max_unpool2d(
        *m.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape
    ),
    "conv2d_relu_max_pool2d": pooled,
}


def check(function: Function, images: int, of_x: Placement, mesh: Any) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = (images, 3, 6, 8), (3, 3, 3, 3), (3,)
    whole = [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]
    leaves = [t.clone().requires_grad_() for t in whole]
    y = function(TF, *leaves)
    dy = torch.randn(y.shape, generator=random, dtype=torch.float64)
    right = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    placements = (of_x, Replicate(), Replicate())
    parts = [
        distribute_tensor(t, mesh, [placement]).requires_grad_()
        for t, placement in zip(whole, placements, strict=True)
    ]
    found = function(F, *parts)
    sharded = Shard(0) if of_x == Shard(0) else Replicate()
    grads = torch.autograd.grad(
        found, parts, distribute_tensor(dy, mesh, [sharded]), allow_unused=True
    )
    assert found.placements == (sharded,)
    for t, of_weights in zip(grads[1:], right[1:], strict=True):
        if of_weights is not None:
            assert t.placements == ((Partial() if of_x == Shard(0) else Replicate()),)
    for ours, theirs in zip((found, *grads), (y, *right), strict=True):
        if theirs is not None:
            assert_close(ours.full_tensor(), theirs)


def compiled(mesh: Any) -> None:
    """Before any eager call has met a DTensor."""
    x, w = (
        distribute_tensor(torch.randn(shape), mesh, [placement])
        for shape, placement in (((4, 3, 6, 6), Shard(0)), ((4, 3, 3, 3), Replicate()))
    )
    convolve = torch.compile(F.conv2d, backend="aot_eager", fullgraph=True)
    y = convolve(x, w)
    assert y.placements == (Shard(0),)
    assert_close(y.full_tensor(), TF.conv2d(x.full_tensor(), w.full_tensor()))


def main() -> None:
    rank, meeting = sys.argv[1:]
    address = f"file://{meeting}"
    dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    compiled(mesh)
    # On each process as many images, or not, or none; and placements that are no sharded batch.
    for images, of_x in (
        (4, Shard(0)),
        (3, Shard(0)),
        (1, Shard(0)),
        (2, Replicate()),
        (2, Shard(1)),
    ):
        for name, function in FUNCTIONS.items():
            try:
                check(function, images, of_x, mesh)
            except Exception as error:
                raise RuntimeError(f"{name} of {images} images, {of_x}") from error
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
