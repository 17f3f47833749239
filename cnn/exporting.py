"""Export networks to other runtimes: programs of ``torch.export``, and ONNX.

While torch exports, ``functional`` calls torch's operators on every device, and a fused function
calls its parts. So an exported program uses only ATen's operators and runs without this library.
"""

import os
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from kernels._private import pytree

from .composed import exported_operators
from .errors import missing


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    kernels: bool = False,
    **options: Any,
) -> ExportedProgram:
    """The program of ``torch.export.export``, which also takes ``options``.

    With ``kernels`` the program keeps this library's operators, including the fused ones, as calls
    of ``torch.ops.triton_cnn``. It then needs ``import cnn`` to load, and a GPU or
    ``TRITON_INTERPRET=1`` to run.

    Example:
        >>> x = torch.randn(2, 3, 16, 16)
        >>> program = cnn.export(cnn.Conv2d(3, 8, 3), (x,), kernels=True)
        >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        ['triton_cnn.conv2d.default']
    """
    with exported_operators() if kernels else nullcontext():
        return torch.export.export(model, args, kwargs, **options)


def export_onnx(
    model: nn.Module,
    args: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    **options: Any,
) -> "torch.onnx.ONNXProgram":
    """Write a network as ONNX, with ONNX's own operators, for onnxruntime and others.

    A fused layer becomes the nodes of its parts; weights keep their names. Needs the extra
    ``export``.

    Args:
        model: any network in eval mode, with layers of this library or without. It is not changed.
        args: example inputs, one tensor or a tuple. Only their shapes, dtypes and devices matter;
            nothing is computed.
        path: path of the file; None writes none. Weights above 1.5 GB go to a file beside it.
        kwargs: example inputs by name.
        dynamic_batch: whether the first axis of every input tensor, "batch", may have any size.
        dynamic_shapes: instead, the axes that may vary, as in ``torch.export.export``.
        options: other options of ``torch.onnx.export``, such as input_names, output_names and
            opset_version.

    Returns torch's ONNXProgram, whose numbers match the network's up to rounding. onnxruntime's CPU
    has convolutions only in float32 and float16. The runtime, not ``precision``, decides how
    products are computed, and how pooling treats NaN and -inf.

    Raises TypeError if ``model`` is not a module, ValueError if it is in training mode or both
    dynamic arguments are given.

    Example:
        >>> model, images = cnn.models.lenet5().eval(), torch.randn(2, 1, 32, 32)
        >>> program = cnn.export_onnx(model, images, "lenet5.onnx", dynamic_batch=True)
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
        # Twice the examples, because torch.export treats a batch of one as a constant.
        inputs = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, inputs)
        shapes, batch = ShapesCollection(), Dim("batch")
        for t in pytree.tree_leaves(inputs):
            if isinstance(t, Tensor) and t.dim():
                shapes[t] = {0: batch}
        dynamic_shapes = shapes.dynamic_shapes(model, *inputs)
    options = {"external_data": False, "verbose": False, **options}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # of torch's own classes
        warnings.filterwarnings("ignore", "# The axis name: batch", UserWarning)
        program = torch.export.export(model, *inputs, dynamic_shapes=dynamic_shapes)
        made: Any = torch.onnx.export(
            program, f=path, dynamic_shapes=dynamic_shapes, dynamo=True, **options
        )
    return made
