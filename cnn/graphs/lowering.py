"""Replace calls of convolutions and poolings in Dynamo's graphs by operators, each in place."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import BoundArguments, signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import kernels
from kernels import device
from kernels._private import FakeTensor, defaults_of, pytree
from kernels.geometry import conv_transpose_output_size, conv_transpose_padding
from kernels.ops.tensors import channels_last

from ..arguments import DTYPES, conv_padding, one_number, pair, pooling
from .effects import value

_ops = torch.ops.triton_cnn
OPERATORS = {
    _ops.conv2d.default: "conv2d",
    _ops.conv2d_bytes.default: "conv2d of bytes",
    _ops.conv2d_fp8.default: "conv2d of float8",
    _ops.conv2d_dgrad.default: "conv_transpose2d",
    _ops.max_pool2d.default: "max_pool2d",
    _ops.conv2d_relu_max_pool2d.default: "conv2d + relu + max_pool2d",
}
_OWN_SOURCES = (
    str(Path(kernels.__file__).parent),
    *(str(Path(__file__).parents[1] / name) for name in ("functional.py", "layers.py")),
)


class Refusal(Exception):
    """The reason why a node stays unchanged, as a clause about it."""


@dataclass
class Outcome:
    """The outcome for a convolution or pooling."""

    node: Node
    function: str  # that was called
    layer: str  # its name in the model
    line: str  # of its source
    why: str = ""  # it was left to Inductor, or not fused further

    @property
    def became(self) -> str:
        """The operator and what it fuses; "" if the call was left to Inductor."""
        if self.node.target not in OPERATORS:
            return ""
        arguments = given(self.node)
        residual = " + residual" if arguments.get("residual") is not None else ""
        return name_of(self.node) + residual + (" + relu" if arguments.get("relu") else "")


def lower(graph: Graph) -> list[Outcome]:
    """Replace each call by an operator; returns the outcomes."""
    outcomes = []
    for node in list(graph.nodes):
        make = _LOWERINGS.get(node.target)
        if make is None or (call := bound(make, node, *node.args, **node.kwargs)) is None:
            continue
        outcomes.append(outcome := Outcome(node, name_of(node), _layer(node), _line(node)))
        try:
            with graph.inserting_before(node):
                outcome.node = make(*call.args, **call.kwargs)
        except Refusal as refusal:
            outcome.why = str(refusal)
    return outcomes


def name_of(node: Node) -> str:
    target: Any = node.target
    return OPERATORS.get(target) or str(getattr(target, "__name__", target))


def _layer(node: Node) -> str:
    """The name in the model of the innermost layer that makes a call."""
    path = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return re.sub(r"^L\['\w+'\]\.?", "", path[-1]) if path else ""


def _line(node: Node) -> str:
    """FILE:LINE of a call, outside this library's functions and layers."""
    frames = re.findall(r'File "(.*)", line (\d+)', node.meta.get("stack_trace") or "")
    users = [":".join(frame) for frame in frames if not frame[0].startswith(_OWN_SOURCES)]
    return users[-1] if users else ""


# Binding of a call's arguments.


def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BoundArguments | None:
    """All arguments of a call of ``function``; None if they do not fit its signature."""
    try:
        call = signature(function).bind(*args, **kwargs)
    except TypeError:
        return None
    call.apply_defaults()
    return call


def given(node: Node) -> dict[str, Any]:
    """The arguments by name of a call of an operator, which passes all of them by position."""
    target: Any = node.target
    return dict(zip(defaults_of(target), node.args, strict=True))


# The lowerings: each makes a call's operator from arguments with torch's names and defaults.


def _conv2d(
    node: Node, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Node:
    _check_constant(stride, padding, dilation, groups)
    operands = _operands(value(node), input, weight, bias)
    steps, spread = pair(stride, 1), pair(dilation, 1)
    pads = conv_padding(padding, value(weight).shape[2:], steps, spread)
    numbers = steps, pads, spread, one_number(groups), None, False
    return _replace(node, _ops.conv2d.default, *operands, None, *numbers)


def _conv_transpose2d(
    node: Node,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
) -> Node:
    _check_constant(stride, padding, output_padding, groups, dilation)
    operands = _operands(value(node), input, weight, bias)
    steps, spread = pair(stride, 1), pair(dilation, 1)
    pads, extra = pair(padding, 0), pair(output_padding, 0)
    size = [
        conv_transpose_output_size(_size(input, axis), kernel, step, (pad, pad), spacing, more)
        for axis, kernel, step, pad, spacing, more in zip(
            (2, 3), value(weight).shape[2:], steps, pads, spread, extra, strict=True
        )
    ]
    size = [item.node if isinstance(item, Proxy) else item for item in size]
    last = channels_last(value(input), value(weight))
    sides = conv_transpose_padding(pads, extra, steps)
    numbers = size, steps, sides, spread, one_number(groups), None, last
    return _replace(node, _ops.conv2d_dgrad.default, *operands, *numbers)


def _size(node: Node, axis: int) -> Any:
    """A size of a tensor; if it may vary, a node that reads it when the graph runs."""
    size = value(node).shape[axis]
    return size if isinstance(size, int) else Proxy(_evaluated(node, "size", axis))


def _max_pool2d(
    node: Node,
    input: Any,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
) -> Node:
    _check_constant(kernel_size, stride, padding, dilation, ceil_mode)
    indices = bool(return_indices) or node.target is TF.max_pool2d_with_indices
    results = value(node) if indices and value(node) else (value(node),)
    operands = _operands(results[0], input)
    if indices and any(user.target is not operator.getitem for user in node.users):
        raise Refusal("its maxima and indices are passed on as one tuple")
    kernel, steps, pads = pooling(kernel_size, stride, padding)
    # The argmax is kept only for a gradient.
    kept = results[0].requires_grad
    numbers = kernel, steps, pads, pair(dilation, 1), bool(ceil_mode), kept, indices
    made = _call(node, _ops.max_pool2d.default, *operands, *numbers)
    parts = [_call(node, operator.getitem, made, place) for place in (0, 2)[: len(results)]]
    for part, result in zip(parts, results, strict=True):
        part.meta["example_value"] = result
    if not indices:
        node.replace_all_uses_with(parts[0])
    for user in list(node.users):
        user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return made


def _own(node: Node, *args: Any, **kwargs: Any) -> Node:
    """A call of one of this library's operators, with all arguments by position."""
    target = _OVERLOADS.get(node.target, node.target)
    arguments = defaults_of(target)
    arguments |= dict(zip(arguments, args, strict=False)) | kwargs
    node.target, node.args, node.kwargs = target, tuple(arguments.values()), {}
    return node


def _other(node: Node, *args: Any, **kwargs: Any) -> Node:
    raise Refusal("only conv2d, conv_transpose2d and max_pool2d have operators here")


_OVERLOADS: dict[Any, Any] = {overload.overloadpacket: overload for overload in OPERATORS}
_POOLINGS = TF.max_pool2d, TF.max_pool2d_with_indices, torch.max_pool2d
_OTHERS = (
    *(torch.conv1d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose3d),
    *(torch.convolution, TF.max_pool1d, torch.max_pool1d, TF.max_pool3d, torch.max_pool3d),
)
_LOWERINGS: dict[Any, Callable[..., Node]] = {
    **dict.fromkeys(_OTHERS, _other),
    torch.conv2d: _conv2d,
    torch.conv_transpose2d: _conv_transpose2d,
    **dict.fromkeys(_POOLINGS, _max_pool2d),
    **dict.fromkeys((*OPERATORS, *_OVERLOADS), _own),
}


# Operands, and nodes.


def _check_constant(*arguments: Any) -> None:
    if any(isinstance(leaf, Node) for leaf in pytree.tree_leaves(arguments)):
        raise Refusal("its arguments vary")


def _operands(result: Any, *operands: Any) -> list[Node | None]:
    """The operands, cast to the result's dtype if autocast has changed it."""
    tensors = [
        value(node) if isinstance(node, Node) else node for node in operands if node is not None
    ]
    _check_tensors(result, *tensors)
    return [
        node
        if node is None or value(node).dtype == result.dtype
        else _evaluated(node, "to", result.dtype)
        for node in operands
    ]


def _check_tensors(result: Any, input: Any, *others: Any) -> None:
    tensors = (result, input, *others)
    if any(t is None for t in tensors):
        raise Refusal("its tensors are reshaped in place, or not known")
    if any(type(t) is not FakeTensor for t in tensors):
        raise Refusal("its tensors are of a subclass, or in a transform of torch.func")
    for t in tensors:
        if t.dtype not in DTYPES:
            raise Refusal(f"its tensors have dtype {t.dtype}")
        if t.layout != torch.strided:
            raise Refusal(f"its tensors have layout {t.layout}")
        if free_unbacked_symbols(t):
            raise Refusal("its sizes depend on data")
    if input.dim() != 4:
        raise Refusal("its input has no batch")
    if any(isinstance(size, int) and size == 0 for size in (*input.shape[1:], *result.shape[1:])):
        raise Refusal("its input or result is empty")
    kind = input.device.type
    if kind == "cpu" and not device.takes_cpu():
        raise Refusal(ON_CPU)
    if kind not in ("cpu", "cuda"):
        raise Refusal(f"its tensors are on {kind}")


ON_CPU = "its tensors are on the CPU, where kernels run only in Triton's interpreter"


def _evaluated(node: Node, method: str, *arguments: Any) -> Node:
    """A call of a method without side effects, with its value."""
    made = node.graph.call_method(method, (node, *arguments))
    with torch.no_grad():
        made.meta["example_value"] = getattr(value(node), method)(*arguments)
    return made


def _call(node: Node, target: Callable[..., Any], *arguments: Any) -> Node:
    """A call that replaces a node and keeps its source lines."""
    made = node.graph.call_function(target, arguments)
    made.meta = {key: item for key, item in node.meta.items() if key != "example_value"}
    return made


def _replace(node: Node, target: Callable[..., Any], *arguments: Any) -> Node:
    made = _call(node, target, *arguments)
    made.meta["example_value"] = value(node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made
