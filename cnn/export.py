"""Networks for other runtimes: ONNX, and programs of ATen's operators alone.

``torch.export.export`` keeps this library's operators, fused ones too, as calls of
``torch.ops.triton_cnn``. What does not know them is given the same network in ATen's.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map_only

import kernels.library  # noqa: F401  (defines the operators)
from kernels.geometry import pool_output_size

from .problem import missing


def export_onnx(
    model: nn.Module,
    args: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Write a network as ONNX, of ONNX's own operators, for onnxruntime and others.

    A fused layer becomes the nodes that it stands for; weights keep their names. Needs the extra
    ``export``.

    Args:
        model: any network, with layers of this library or without, in eval mode. It stays as it is.
        args: example inputs of the network, one tensor or a tuple; only their shapes, dtypes and
            devices count. They run nowhere.
        path: of the file; None writes none. Weights of more than 1.5 GB go beside it.
        kwargs: example inputs by name.
        dynamic_batch: whether the first axis of every input tensor, "batch", may have any size.
        dynamic_shapes: in its place, which axes may, as in ``torch.export.export``.
        options: others of ``torch.onnx.export``, such as input_names, output_names and
            opset_version.

    Returns torch's ONNXProgram, whose numbers are the network's to rounding; onnxruntime's CPU has
    convolutions in float32 and float16 alone. How products are made is the runtime's choice, not
    ``precision``'s, and so is what a pooling makes of NaN and -inf. Raises NotImplementedError,
    which names the operators, for float8 and for gradients within the network.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise missing(package, "exporting to ONNX", "export")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got model={model!r:.80}")
    if model.training:
        raise ValueError("export_onnx needs a model in eval mode, got one in training mode")
    if dynamic_batch and dynamic_shapes is not None:
        raise ValueError(f"dynamic_batch takes no dynamic_shapes, got {dynamic_shapes!r}")
    inputs: Any = (args,) if isinstance(args, Tensor) else tuple(args), kwargs or {}
    if dynamic_batch:
        inputs = tree_map_only(Tensor, _twice, inputs)
        dynamic_shapes = _batched(model, inputs)
    with torch.no_grad():
        program = torch.export.export(model, *inputs, dynamic_shapes=dynamic_shapes)
    options = {"external_data": False, "verbose": False, **options}
    with _without_torchs_warnings():
        made: Any = torch.onnx.export(
            to_aten(program), f=path, dynamic_shapes=dynamic_shapes, dynamo=True, **options
        )
    return made


@contextmanager
def _without_torchs_warnings() -> Iterator[None]:
    """Of its own classes, and of names that its inputs share."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name: batch", UserWarning)
        yield


def _twice(t: Tensor) -> Tensor:
    """An example whose batch torch.export does not take for the constant one."""
    return torch.cat([t, t]) if t.dim() else t


def _batched(model: nn.Module, inputs: tuple[tuple, dict[str, Any]]) -> Any:
    shapes, batch = ShapesCollection(), Dim("batch")
    for t in tree_leaves(inputs):
        if isinstance(t, Tensor) and t.dim():
            shapes[t] = {0: batch}
    return shapes.dynamic_shapes(model, *inputs)


def to_aten(program: ExportedProgram) -> ExportedProgram:
    """The program with ATen's operators in the place of this library's, which it then runs without.

    Results have the same shapes, layouts and dtypes, and the same numbers to rounding. Raises
    NotImplementedError for operators of gradients and of float8, which ATen does not have.
    """
    modules = [m for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    called = {node.target for module in modules for node in module.graph.nodes}
    ours = {op for op in called if getattr(op, "namespace", None) == "triton_cnn"}
    if left := sorted(str(op.name()) for op in ours - _ATEN.keys()):
        raise NotImplementedError(f"ATen has nothing that does what {', '.join(left)} does")
    with _without_torchs_warnings():
        return program.run_decompositions(_ATEN)


# Each takes its operator's arguments. Offsets are for gradients: they are left empty.


def _conv2d(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x, top, left = TF.pad(x, (left, right, top, bottom)), 0, 0
    y = torch.conv2d(x, w, bias, stride, (top, left), dilation, groups)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def _conv2d_bytes(x, w, bias, scale, shift, *arguments):
    x = x * scale[:, None, None] + shift[:, None, None]
    return _conv2d(x.to(w.dtype), w, bias, None, *arguments)


def _conv2d_dgrad(dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last):
    before = top, left = padding[0], padding[2]
    sizes = zip(dy.shape[2:], w.shape[2:], stride, dilation, before, size, strict=True)
    after = below, right = [(p - 1) * s + d * (r - 1) + 1 - b - n for p, r, s, d, b, n in sizes]
    extra = [b - a for b, a in zip(before, after, strict=True)]
    if all(0 <= e < s for e, s in zip(extra, stride, strict=True)):
        return torch.conv_transpose2d(dy, w, bias, stride, before, extra, groups, dilation)
    # ONNX has no output padding of a stride or more: the whole is cut to size, or made larger.
    dx = torch.conv_transpose2d(dy, w, None, stride, 0, 0, groups, dilation)
    dx = TF.pad(dx, (-left, -right, -top, -below))
    return dx if bias is None else dx + bias[:, None, None]


def _max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices):
    W, window = x.shape[3], (kernel, stride, padding, dilation)
    # ONNX's ceil_mode may have one window more, which is all padding: here it is padding.
    below, right = _reach(x.shape[2:], *window) if ceil_mode else (0, 0)
    if below or right:
        x = TF.pad(x, (0, right, 0, below), value=-torch.inf)
    none = x.new_empty(0, dtype=torch.uint8)
    if not indices:
        return TF.max_pool2d(x, *window), none, none.long()
    y, flat = TF.max_pool2d(x, *window, return_indices=True)
    if right:
        flat = flat - flat // (W + right) * right
    return y, none, flat


def _reach(size: Sequence[int], *window: Sequence[int]) -> list[int]:
    """Rows and columns that the last windows of ceil_mode have beyond the padded input."""
    return [
        max(0, (pool_output_size(n, k, s, p, d, True) - 1) * s + d * (k - 1) + 1 - n - 2 * p)
        for n, k, s, p, d in zip(size, *window, strict=True)
    ]


def _conv2d_relu_max_pool2d(x, w, bias, *arguments):
    *convolution, kernel, stride, padding, _ = arguments
    y = _conv2d(x, w, bias, None, *convolution, relu=True)
    return TF.max_pool2d(y, kernel, stride, padding), y.new_empty(0, dtype=torch.uint8)


def _max_unpool2d(x, indices, size):
    H, W = size
    y = x.new_zeros((*x.shape[:2], H * W))
    return y.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, (H, W))


_ops = torch.ops.triton_cnn
_ATEN: dict[Any, Any] = {
    _ops.conv2d.default: _conv2d,
    _ops.conv2d_bytes.default: _conv2d_bytes,
    _ops.conv2d_dgrad.default: _conv2d_dgrad,  # the transposed convolution
    _ops.max_pool2d.default: _max_pool2d,
    _ops.conv2d_relu_max_pool2d.default: _conv2d_relu_max_pool2d,
    _ops.max_unpool2d.default: _max_unpool2d,
}
