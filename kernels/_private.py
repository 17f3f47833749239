"""What the library uses of PyTorch and Triton that neither of them promises to keep.

All of it is here; what only the commands of ``bench`` need is in ``bench/_private.py``. Each entry
says what it counts on, and ``tests/test_private.py`` has a test of that and the versions it was run
with. Names that are only imported have no public home.

Dynamo, Inductor and DTensor take seconds to import, so that functions which need them do it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._functorch.utils import (
    enable_single_level_autograd_function as enable_single_level_autograd_function,
)
from torch._guards import CompileContext
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses import FakeTensor as FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules.utils import _pair
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from triton.backends.compiler import GPUTarget as GPUTarget
from triton.language.target_info import cuda_capability_geq as cuda_capability_geq
from triton.runtime.errors import PTXASError as PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

pytree = _pytree
pair_of: Callable[[Any], tuple] = _pair
"""A pair from one number or two, as torch's layers make it."""
Convolution: type[torch.nn.Module] = torch.nn.modules.conv._ConvNd
"""Of which torch's convolutions are, transposed ones too."""

# Triton.


def python_range(*bounds: Any) -> range:
    """``range`` in the interpreter, of bounds that may be scalars of the kernel.

    Counts on the array of one element that such a scalar holds. Triton 3.6's interpreter hands
    range() this array, which numpy from 2.4 on refuses.
    """
    return range(*(int(b.handle.data.item()) if isinstance(b, tl.tensor) else b for b in bounds))


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within this context the interpreter leaves out what takes most of its time: checks of integer
    overflow, which compiled kernels run without too, and patching Triton's language anew at each
    call of a jitted function; once for each module is enough.

    Counts on ``interpreter_builder.options``, which each addition reads, and on ``_patch_lang``,
    which each call looks up; what it patches is undone when the launch ends.
    """
    from triton.runtime import interpreter

    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    options, patched = builder.options, set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    builder.options = replace(options, sanitize_overflow=False)
    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        builder.options, interpreter._patch_lang = options, patch


class _NoDriver:
    """Stands in for Triton's driver if there is no GPU; enough to compile."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str | None = None) -> int:
        return 0


@contextmanager
def without_gpu(target: GPUTarget) -> Iterator[None]:
    """Within this context kernels' ``warmup`` compiles for ``target``, whatever GPU there is.

    Counts on what warming up asks of a driver, and on ``_active``, which is None until a driver is
    needed: to ask for ``active`` would make one, or raise without a GPU.
    """
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(_NoDriver(target))  # type: ignore[arg-type]
    try:
        yield
    finally:
        triton.runtime.driver._active = previous


def describes_like(descriptor: TensorDescriptor) -> Callable[[Tensor], TensorDescriptor]:
    """Makes descriptors of other tensors that are described, and aligned, as this one's is.

    Counts on a descriptor being its ``__dict__``: the constructor would only check again what it
    checked of this one.
    """
    fields = {**vars(descriptor), "base": None}

    def describe(t: Tensor) -> TensorDescriptor:
        made = object.__new__(TensorDescriptor)
        made.__dict__.update(fields)
        made.base = t
        return made

    return describe


# PyTorch's modes.


def is_transformed() -> bool:
    """Whether forward-mode AD or a transform of ``torch.func`` is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_watched() -> bool:
    """Whether a dispatch mode, a transform of ``torch.func``, forward-mode AD or a trace by
    ``torch.jit`` is active. Each call asks, so that it does without functions in between.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


is_function_mode_enabled: Callable[[], bool] = torch._C._is_torch_function_mode_enabled
"""Whether a mode of ``__torch_function__`` is active."""

is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is enabled, of whichever device."""


# Autograd.


class SingleLevelFunction(_SingleLevelFunction):
    """A Function, with ``setup_context``, whose ``apply`` is autograd's own. ``Function.apply``
    looks up the defaults of ``forward`` by inspection, which takes longer than the rest, and goes
    by the levels of ``torch.func``: a kernel of the dispatcher is given one level at a time.

    Counts on the base being what ``torch.func`` makes such a level's Function of.
    """

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple:
        return (ctx._autograd_function_id,)  # as in Function


def below_autograd(operator: Any, keyset: Any) -> Callable[..., Any]:
    """The operator with what is left to dispatch on after autograd, of an autograd kernel that was
    given ``keyset``.
    """
    rest = keyset & torch._C._after_autograd_keyset

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(rest, *args)

    return call


def record_as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autograd's modes as they are now, wherever it is called: a Function turns
    off the recording of gradients and of tangents within its forward.
    """
    grad, tangents = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def call(*args: Any) -> Any:
        with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(tangents):
            return function(*args)

    return call


def autocasts_copy(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast of a parameter, 1-D or 4-D, that torch keeps until the outermost autocast region
    ends.

    Only torch's operators can reach it. So one is run on an empty batch, which launches nothing,
    and what it has saved for backward is taken: the cast, at its place in the autograd graph. The
    hooks keep a caller's own, such as a checkpoint's, from seeing this; where hooks are disabled
    there are none.
    """
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same) if enabled else nullcontext()
    with torch.enable_grad(), hooks:
        if t.dim() == 1:
            empty = t.new_empty((0, *t.shape), dtype=dtype, requires_grad=True)
            return torch.matmul(empty, t).grad_fn._saved_vec  # type: ignore[union-attr]
        empty = t.new_empty((0, *t.shape[1:]), dtype=dtype, requires_grad=True)
        return torch.conv2d(empty, t).grad_fn._saved_weight  # type: ignore[union-attr]


def _same(t: Tensor) -> Tensor:
    return t


# Quantization.


def is_quantizing(values: Sequence[Any]) -> bool:
    """Whether ``torch.ao.quantization`` traces a call of these values in its FX mode.

    Counts on its tracer, whose proxies they are then; nothing is imported for that.
    """
    module = sys.modules.get("torch.ao.quantization.fx.tracer")
    tracers = (getattr(value, "tracer", None) for value in values)
    return module is not None and any(isinstance(t, module.QuantizationTracer) for t in tracers)


# DTensor.

_Choice = tuple[Sequence[Any], Sequence[Any]]


def register_sharding(operator: Any, choices: Sequence[_Choice]) -> None:
    """Tell DTensor how an operator may be sharded along an axis of a mesh: each choice has the
    placements of its results, and of its operands, of which some may be None in a call.

    Not by ``torch.distributed.tensor.experimental.register_sharding``, nor in PyTorch 2.11 by what
    that calls: they shard no batch of fewer images than there are processes.
    """
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSpec, OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import (
        generate_redistribute_costs,
        register_op_strategy,
    )

    operands = len(choices[0][1])

    def strategy(schema: Any) -> OpStrategy:
        mesh, specs = schema.get_mesh_from_args(), []
        for combination in product(choices, repeat=mesh.ndim):
            made = zip(*(out for out, _ in combination), strict=True)
            taken = zip(*(into for _, into in combination), strict=True)
            results = tuple(DTensorSpec(mesh, placements) for placements in made)
            given = [
                (t, DTensorSpec(mesh, placements, tensor_meta=t.tensor_meta))
                for t, placements in zip(schema.args_schema[:operands], taken, strict=True)
                if isinstance(t, OpStrategy)
            ]
            costs = [generate_redistribute_costs(*pair) for pair in given]
            result = results[0] if len(results) == 1 else results
            specs.append(OpSpec(result, [spec for _, spec in given], costs))
        return OpStrategy(specs)

    # All numbers count: another stride makes another result.
    numbers = RuntimeSchemaInfo(static_argnum=operands, needs_pytree=True)
    register_op_strategy(operator, numbers)(strategy)


# Dynamo.


def constant_while_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which Dynamo then calls while it traces: what
    ``torch.compiler.assume_constant_result`` marks, which imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """Whether torch.export looks on: ``torch.compiler.is_exporting``, which is true of all that
    Dynamo of PyTorch 2.11 compiles.
    """
    return torch.compiler._is_exporting_flag


def reset_with_dynamo(backend: Callable[..., Any], reset: Callable[[], None]) -> None:
    """Have ``torch.compiler.reset`` call ``reset``, as it does of each backend it has used."""
    backend.reset = reset  # type: ignore[attr-defined]


def dynamos_counters(group: str) -> Any:
    """Dynamo's counters of a group, which its own reports show."""
    from torch._dynamo.utils import counters

    return counters[group]


def compile_id() -> str:
    """The numbers that Dynamo's logs give a frame and its compilation, within a backend's call."""
    return str(CompileContext.current_compile_id() or "-")


# Operators in graphs.

FUNCTION_MODULES = {"torch", "torch.functional", "torch.nn.functional", "torch._C._nn"}
"""Where the functions of torch and of torch.nn.functional say that they are."""


def namespace_of(target: Any) -> str | None:
    """An operator's or a packet's, such as "aten"; None of what is neither."""
    is_operator = isinstance(target, OpOverload | OpOverloadPacket)
    return target.__module__.rpartition(".")[2] if is_operator else None


def defaults_of(operator: OpOverload) -> dict[str, Any]:
    """The operator's arguments by name, in their order; None of those that have no default."""
    return {argument.name: argument.default_value for argument in operator._schema.arguments}


def is_mutable(operator: OpOverload) -> bool:
    """Whether the operator's schema says that it writes to an argument."""
    return operator._schema.is_mutable


def storage_of(t: Tensor) -> int:
    """A number that views of one tensor have in common, and no other that is alive: fake tensors,
    too, which have no memory to tell by.
    """
    return t.untyped_storage()._cdata


# Inductor.


def graph_pass() -> Any:
    """The base of passes over graphs whose ``uuid`` is part of the keys of Inductor's caches."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def inductor(mode: str | None, options: Any, joint_pass: Callable[[Any], Any]) -> Any:
    """What compiles a graph for ``torch.compile`` with these modes and options, but that what
    ``joint_pass`` makes of the pass which the user has set, or None, runs in its place: the last
    one over AOTAutograd's joint graph.
    """
    from torch._inductor import config

    compiler = torch._TorchCompileInductorWrapper(mode, options, None)
    users = compiler.config.get("joint_custom_post_pass", config.joint_custom_post_pass)
    compiler.config["joint_custom_post_pass"] = joint_pass(users)
    return compiler


def moves_layouts() -> bool:
    """Whether Inductor, as it is set while it compiles, computes convolutions in channels_last."""
    from torch._inductor import config

    return config.layout_optimization
