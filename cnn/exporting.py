"""Networks for other runtimes: programs of ``torch.export``, and ONNX.

While torch exports, ``functional`` calls torch's operators, fused ones by their parts, on every
device. So what leaves is made of ATen's, and runs without this library.
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
    """``torch.export.export``, whose ``options`` it takes.

    With ``kernels`` the program keeps this library's operators, the fused ones too, as calls of
    ``torch.ops.triton_cnn``. It then needs ``import cnn`` wherever it is loaded, and a GPU, or
    ``TRITON_INTERPRET=1``, wherever it runs.
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
    ``precision``'s, and so is what a pooling makes of NaN and -inf.
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
        # Twice the examples, as torch.export takes a batch of one for a constant.
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
