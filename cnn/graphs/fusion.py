"""Replace convolutions and poolings in Dynamo's graphs by this library's operators, and fuse them.

First each call becomes an operator in place. Then each convolution absorbs its reader, and the
reader of that, as long as one of ``FUSIONS`` can. The fused operator runs at the reader's place. So
the convolution must have no other reader, and nothing between the two may change its operands or
the state that it depends on.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as TF
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kernels._private import FakeTensor

from .effects import changed, storages, value
from .lowering import Outcome, Refusal, bound, given, lower, name_of

_ops = torch.ops.triton_cnn
_Fused = tuple[Any, dict[str, Any]] | None  # an operator and its arguments


def rewrite(graph: Graph) -> list[Outcome]:
    """Put the operators into a graph; returns the outcome for each convolution and pooling."""
    for node in list(graph.nodes):
        if node.target is getattr and not node.users:  # read only by tracing, as is_cpu is
            graph.erase_node(node)
    outcomes = lower(graph)
    for outcome in list(outcomes):
        if outcome.became:
            _fuse_readers(outcome)
    erased = {outcome.node for outcome in outcomes} - set(graph.nodes)
    return [outcome for outcome in outcomes if outcome.node not in erased]


def _fuse_readers(outcome: Outcome) -> None:
    while outcome.node.target is _ops.conv2d.default:
        try:
            outcome.node = _fused(outcome.node)
        except Refusal as refusal:
            outcome.why = str(refusal)
            return


def _fused(conv: Node) -> Node:
    """The node that replaces a convolution and its reader, at the reader's place."""
    if len(conv.users) != 1:
        raise Refusal(f"its result has {len(conv.users)} readers")
    (reader,) = conv.users
    if reader.op == "output":
        raise Refusal("its result leaves the graph")
    for fusion in FUSIONS:
        if (fused := fusion(conv, reader)) is not None:
            break
    else:
        raise Refusal(f"{name_of(reader)} follows it")
    target, arguments = fused
    _check_way(conv, reader, arguments)
    with conv.graph.inserting_before(reader):
        made = conv.graph.call_function(target, tuple(arguments.values()))
    made.meta = dict(reader.meta)
    reader.replace_all_uses_with(made)
    conv.graph.erase_node(reader)
    conv.graph.erase_node(conv)
    return made


def _check_way(conv: Node, reader: Node, arguments: dict[str, Any]) -> None:
    """Check that the convolution may run at its reader's place: nothing between the two changes its
    operands, or a state such as autocast's.
    """
    read = storages(node for node in arguments.values() if isinstance(node, Node))
    node = conv.next
    while node is not reader:
        changes = changed(node)
        written = None if changes is None else storages(changes)
        if written is None or (written and read is None):
            raise Refusal(f"{name_of(node)} stands between it and {name_of(reader)}")
        if read and written & read:
            raise Refusal(f"{name_of(node)} changes what it reads before {name_of(reader)}")
        node = node.next


# Fusions. Each returns the fused operator, or None if the reader is of another kind.

_ADDITIONS = operator.add, operator.iadd, torch.add, "add", "add_"
_RELUS = TF.relu, torch.relu, torch.relu_, "relu", "relu_"


def _sum(input: Any, other: Any, *, alpha: Any = 1) -> None:
    """The signature of additions."""


def _calls(node: Node, targets: tuple) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _add_residual(conv: Node, reader: Node) -> _Fused:
    arguments = given(conv)
    if not _calls(reader, _ADDITIONS) or arguments["relu"] or arguments["residual"] is not None:
        return None
    if (call := bound(_sum, *reader.args, **reader.kwargs)) is None:
        return None
    input, other, alpha = call.arguments.values()
    is_first = input is conv
    residual = other if is_first else input
    if alpha != 1:
        raise Refusal(f"its sum has alpha={alpha}")
    if residual is conv or not isinstance(residual, Node):
        raise Refusal("its sum is not with another tensor")
    if changed(reader) and not is_first:
        raise Refusal("its sum is written into the other operand")
    if not _is_alike(value(residual), value(conv)):
        raise Refusal("its sum is with a tensor of another shape, dtype or device")
    if not _lies_alike(value(reader), value(conv)):
        raise Refusal("its sum has the memory format of the other tensor")
    return conv.target, arguments | {"residual": residual}


def _is_alike(t: Any, y: Any) -> bool:
    return (
        type(t) is type(y) is FakeTensor
        and (t.dtype, t.device, t.layout, t.dim()) == (y.dtype, y.device, y.layout, y.dim())
        and all(statically_known_true(a == b) for a, b in zip(t.shape, y.shape, strict=True))
    )


def _lies_alike(t: Any, y: Any) -> bool:
    """Whether tensors of one shape have the same strides, except along axes of size 1."""
    return type(t) is type(y) is FakeTensor and all(
        statically_known_true(size == 1) or statically_known_true(a == b)
        for size, a, b in zip(y.shape, t.stride(), y.stride(), strict=True)
    )


def _apply_relu(conv: Node, reader: Node) -> _Fused:
    arguments = given(conv)
    if not _calls(reader, _RELUS) or arguments["relu"]:
        return None
    return conv.target, arguments | {"relu": True}


def _pool_maxima(conv: Node, reader: Node) -> _Fused:
    if reader.target is not _ops.max_pool2d.default:
        return None
    arguments, window = given(conv), given(reader)
    if not arguments.pop("relu"):
        raise Refusal("no ReLU stands between it and max_pool2d")
    if arguments.pop("residual") is not None:
        raise Refusal("a sum is not pooled in one kernel")
    if window["ceil_mode"] or window["indices"] or tuple(window["dilation"]) != (1, 1):
        raise Refusal("max_pool2d has dilation, ceil_mode or indices")
    pool = {name: window[name] for name in ("kernel", "stride", "padding")}
    arguments |= {f"pool_{name}": pair for name, pair in pool.items()}
    return _ops.conv2d_relu_max_pool2d.default, arguments | {"argmax": window["argmax"]}


FUSIONS = (_add_residual, _apply_relu, _pool_maxima)
