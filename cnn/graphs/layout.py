"""Run NCHW networks in channels_last, as Inductor does with torch's convolutions.

Inductor does this only for ``aten.convolution``, so this pass does it for our operators. It works
on AOTAutograd's joint graph of forward and backward, which has no side effects and in which nothing
depends on a tensor's layout. Each operand is copied once, the gradients' operators are told to
keep the layout, and outputs get their original layout back.
"""

import hashlib
import operator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

import kernels
from kernels._private import (
    OpOverload,
    defaults_of,
    enable_python_dispatcher,
    graph_pass,
    is_mutable,
    moves_layouts,
    namespace_of,
    pytree,
)

_aten, _ops = torch.ops.aten, torch.ops.triton_cnn
_CONVOLUTIONS = {
    *(_ops.conv2d.default, _ops.conv2d_dgrad.default, _ops.conv2d_wgrad.default),
    *(_ops.conv2d_bytes.default, _ops.conv2d_bytes_wgrad.default, _ops.conv2d_fp8.default),
    *(_ops.conv2d_relu_max_pool2d.default, _ops.conv2d_relu_max_pool2d_backward.default),
}
_Pass = graph_pass()


class ChannelsLast(_Pass):
    """The pass, which runs after the user's own.

    Its id includes a digest of this library's sources, because the caches of Inductor and
    AOTAutograd depend on the operators' fake implementations and gradients.
    """

    def __init__(self, before: Any = None):
        self.before = before if isinstance(before, list | tuple) else [before] if before else []

    def __call__(self, graph: Graph) -> None:
        for custom_pass in self.before:
            custom_pass(graph)
        if moves_layouts() and any(node.target in _CONVOLUTIONS for node in graph.nodes):
            move(graph)

    def uuid(self) -> Any:
        ids = [p.uuid() if isinstance(p, _Pass) else None for p in self.before]
        return None if None in ids else (_digest_of_sources(), *ids)


@cache
def _digest_of_sources() -> bytes:
    digest = hashlib.sha256()
    for folder in (Path(kernels.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.digest()


def move(graph: Graph) -> None:
    """Put the operands of convolutions, and everything computed from them, into channels_last."""
    mover = _Mover()
    for node in list(graph.nodes):
        mover.visit(node)


class _Mover:
    def __init__(self) -> None:
        self.before: dict[Node, Any] = {}  # original values of results whose layout has changed
        self.copies: dict[tuple[Node, tuple[int, ...]], Node] = {}

    def visit(self, node: Node) -> None:
        if _is_own(node):
            self._give_channels_last(node)
        moved = [operand for operand in node.all_input_nodes if operand in self.before]
        if not moved and not _is_own(node):
            return
        result = _evaluated(node)
        if result is None:  # it gets operands in their original layout
            for operand in moved:
                self._give_copy(node, operand, _order(self.before[operand]))
        elif _strides(result) != _strides(node.meta["val"]):
            self.before[node] = node.meta["val"]
            node.meta["val"] = result

    def _give_channels_last(self, node: Node) -> None:
        """Move a convolution's images; for other operators only if one image has moved already."""
        values = {operand: _value(operand) for operand in node.all_input_nodes}
        images = {n: t for n, t in values.items() if isinstance(t, Tensor) and t.dim() == 4}
        last = torch.channels_last
        moved = [n for n, t in images.items() if t.is_contiguous(memory_format=last)]
        if node.target not in _CONVOLUTIONS and not moved:
            return
        for image, t in images.items():
            if image not in moved and t.is_contiguous():
                self._give_copy(node, image, (0, 2, 3, 1))
        target: Any = node.target
        node.args = tuple(
            True if name == "channels_last" else argument
            for name, argument in zip(defaults_of(target), node.args, strict=True)
        )
        node.meta.pop("eager_input_vals", None)  # Inductor would restore the old layouts by it

    def _give_copy(self, node: Node, operand: Node, order: tuple[int, ...]) -> None:
        """Replace a node's operand by a copy with its axes in an order, longest strides first."""
        if (operand, order) not in self.copies:
            axes = list(range(len(order)))
            with node.graph.inserting_before(node):
                copy = operand
                if list(order) != axes:
                    copy = _call(node, _aten.permute.default, copy, list(order))
                copy = _call(node, _aten.clone.default, copy, memory_format=torch.contiguous_format)
                if list(order) != axes:
                    copy = _call(node, _aten.permute.default, copy, [*map(order.index, axes)])
            self.copies[operand, order] = copy
        node.replace_input_with(operand, self.copies[operand, order])


def _call(node: Node, target: Any, *arguments: Any, **options: Any) -> Node:
    """A new call in the same part of the graph as ``node``."""
    made = node.graph.call_function(target, arguments, options)
    made.meta = {key: item for key, item in node.meta.items() if key != "eager_input_vals"}
    made.meta["val"] = _evaluated(made)
    return made


def _order(t: Tensor) -> tuple[int, ...]:
    if t.is_contiguous():
        return tuple(range(t.dim()))
    return tuple(sorted(range(t.dim()), key=t.stride, reverse=True))


def _is_own(node: Node) -> bool:
    return namespace_of(node.target) == "triton_cnn"


def _value(node: Node) -> Tensor:
    return node.meta["val"]


def _strides(value: Any) -> list[tuple]:
    return [tuple(t.stride()) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _evaluated(node: Node) -> Any:
    """A node's result for the operands' new layouts; None if it may depend on the layout."""
    target: Any = node.target
    if target is not operator.getitem and (
        not isinstance(target, OpOverload)
        or target.namespace not in ("aten", "prims", "triton_cnn")
        or "as_strided" in target.name()
        or is_mutable(target)
        or "unbacked_bindings" in node.meta
    ):
        return None
    arguments = pytree.tree_map_only(Node, _value, (node.args, node.kwargs))
    try:
        with torch.no_grad(), enable_python_dispatcher():
            return target(*arguments[0], **arguments[1])
    except (RuntimeError, ValueError):  # a view that only the old strides allow
        return None
