"""Side effects of the nodes in Dynamo's graph: changes of tensors in place, or of global state.

Dynamo traces with fake tensors, which it keeps in each node's ``meta["example_value"]``. Their
storages tell which results are views of which.
"""

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kernels._private import (
    FUNCTION_MODULES,
    FakeTensor,
    OpOverloadPacket,
    is_mutable,
    namespace_of,
    pytree,
    storage_of,
)

_WRITING_OPERATORS = {
    *(operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul),
    *(operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    operator.iconcat,
}
_KEEPING_STATISTICS = ("batch_norm", "instance_norm", "embedding", "fake_quant")
"""Words in the names of functions that may also write to tensors after their first."""


_RESHAPING = {
    *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_"),
    *("resize_", "resize_as_", "set_", "detach_", "requires_grad_"),
}
"""Functions that change a tensor's layout, or whether it gets a gradient, in place."""


def forget_reshaped(gm: GraphModule) -> None:
    """Make ``value`` return None for tensors that are reshaped in place. For all nodes with such a
    tensor Dynamo keeps only its final layout.
    """
    graphs = [module.graph for module in gm.modules() if isinstance(module, GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    reshaped = {
        id(value(operand))
        for node in nodes
        if _name(node.target) in _RESHAPING
        for operand in node.all_input_nodes
    }
    for node in nodes:
        if any(id(leaf) in reshaped for leaf in pytree.tree_leaves(value(node))):
            node.meta["reshaped"] = True


def _name(target: Any) -> str:
    """The name of a function or method, without its overload."""
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", target))


def value(node: Node) -> Any:
    """Dynamo's fake value of a node's result, None if unknown."""
    return None if "reshaped" in node.meta else node.meta.get("example_value")


def storages(nodes: Iterable[Node]) -> set[int] | None:
    """The storages of the nodes' results, None if one is unknown."""
    found = set()
    for t in pytree.tree_leaves([value(node) for node in nodes]):
        if type(t) is not FakeTensor:
            return None
        found.add(storage_of(t))
    return found


def changed(node: Node) -> list[Node] | None:
    """The nodes whose tensors a node writes to, None if it may change anything else, too."""
    target = node.target
    if node.op in ("placeholder", "get_attr") or target is getattr:
        return []
    if namespace_of(target) is not None:
        return _written_by_operator(node)
    if getattr(target, "__module__", None) == "_operator":
        return _nodes(node.args[0]) if target in _WRITING_OPERATORS else []
    if not _gives_tensors(node):
        return None
    if node.op == "call_method":
        return _nodes(node.args[0]) if _writes_in_place(str(target)) else []
    if node.op != "call_function" or getattr(target, "__module__", None) not in FUNCTION_MODULES:
        return None  # functions in those modules change only what they are told to
    return _written_by_function(node)


def _written_by_operator(node: Node) -> list[Node] | None:
    target: Any = node.target
    if namespace_of(target) not in ("aten", "triton_cnn"):
        return None
    packet = isinstance(target, OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    mutable = any(map(is_mutable, overloads))
    return node.all_input_nodes if mutable or _keeps_statistics(target) else []


def _written_by_function(node: Node) -> list[Node]:
    target: Any = node.target
    written = _nodes(node.kwargs.get("out"))
    if _writes_in_place(target.__name__) or _is_told_to_write(node):
        written += _nodes(node.args[0] if node.args else node.kwargs)
    if _keeps_statistics(target):
        written += node.all_input_nodes[1:] if node.args else node.all_input_nodes
    return written


def _keeps_statistics(target: Any) -> bool:
    return any(word in target.__name__ for word in _KEEPING_STATISTICS)


def _writes_in_place(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith(("__i", "__set", "__del")) if dunder else name.endswith("_")


def _is_told_to_write(node: Node) -> bool:
    """Whether a function of torch.nn.functional is called with inplace=True."""
    if not inspect.isfunction(node.target):
        return bool(node.kwargs.get("inplace"))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except TypeError:
        return True
    return bool(bound.arguments.get("inplace"))


def _gives_tensors(node: Node) -> bool:
    """Whether the result consists of tensors, or for a method also of numbers. A change of state
    returns neither.
    """
    leaves = pytree.tree_leaves(value(node))
    kinds = (Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    if not all(isinstance(leaf, kinds) for leaf in leaves):
        return False
    return node.op == "call_method" or any(isinstance(leaf, Tensor) for leaf in leaves)


def _nodes(argument: Any) -> list[Node]:
    return [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, Node)]
