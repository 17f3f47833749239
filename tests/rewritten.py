"""A training step of a function, in eager mode or as cnn.compile_backend rewrites its graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from cnn.compile_backend import fuse, triton_cnn


def rewritten(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend that goes no further than AOTAutograd, as Inductor takes its time."""
    return aot_eager(fuse(gm), inputs)


rewritten.reset = triton_cnn.reset


def run(function: Callable[..., Any], wanted: str, **inputs: Tensor) -> dict[str, Any]:
    """Results, gradients of the inputs in ``wanted``, and the inputs as they are afterwards."""
    given = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in inputs.items()}
    results = pytree.tree_leaves(function(**given))
    differentiable = [y for y in results if y.requires_grad]
    if differentiable:
        weights = [torch.linspace(0.5, 1.5, y.numel()).to(y).view(y.shape) for y in differentiable]
        torch.autograd.backward(differentiable, weights)
    gradients = {f"d{name}": given[name].grad for name in wanted}
    return {f"result{i}": y for i, y in enumerate(results)} | gradients | given
