"""What an operator is: ``define`` declares one, with all that PyTorch is told of it.

An operator's hooks get its arguments by name, as a record ``a`` that is made of its schema: batched
N, C, H, W tensors and normalized numbers; pairs are (height, width), padding is (top, bottom, left,
right). A CUDA tensor always runs the kernels. A CPU tensor runs them in Triton's interpreter
(TRITON_INTERPRET=1 at import) or emulated (``device.emulate``), and is otherwise refused.
"""

import re
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import device, replay
from .._private import (
    SingleLevelFunction,
    below_autograd,
    constant_while_traced,
    enable_single_level_autograd_function,
    is_transformed,
    record_as_now,
    register_sharding,
)
from ..geometry import is_channels_last
from . import calls

_NAMESPACE = "triton_cnn"
_library = torch.library.Library(_NAMESPACE, "DEF")

Placement = Literal["batch", "whole", "sum"]
BATCH: Placement = "batch"
WHOLE: Placement = "whole"
SUM: Placement = "sum"
"""What each process has of a tensor: some images, all of it, or its share of a sum."""


class Sharding(NamedTuple):
    """How a DTensor's batch is shared by processes: what each has of operands and results.

    As images do not mix, results that have a batch are sharded as their operands are. Gradients of
    weights and biases are shares of a sum, which DTensor adds up where it is needed. Or else each
    process has all of everything.
    """

    operands: Sequence[Placement]
    results: Sequence[Placement]


class Layout(NamedTuple):
    """How a tensor lay in memory that is no longer there."""

    shape: torch.Size
    strides: tuple[int, ...]

    @property
    def channels_last(self) -> bool:
        return is_channels_last(self.shape, self.strides)


class Recorded:
    """A call that autograd records, as one object, because each argument of a Function costs time.

    ``make`` computes the results from the tensors. ``a`` has the arguments by name, of the tensors
    their ``Layout``: they themselves must not live as long.
    """

    __slots__ = ("a", "make")

    def __init__(
        self,
        operator: "Operator",
        make: Callable[..., Any],
        tensors: Sequence[Tensor | None],
        numbers: tuple,
    ):
        layouts = [None if t is None else Layout(t.shape, t.stride()) for t in tensors]
        self.a: Any = operator.Arguments(*layouts, *numbers)
        self.make = make


class Operator:
    """``torch.ops.triton_cnn.NAME``, to be called with all arguments by position, tensors first.

    A call bypasses PyTorch's dispatcher, which takes two thirds of the time, if the dispatcher has
    nothing to do.
    """

    def __init__(
        self,
        schema: str,
        results: Callable[[Any], Any],
        kernels: Callable[..., None],
        reference: Callable[[Any], Any] | None,
        sharding: Sharding,
    ):
        self.name, parameters = re.findall(r"^(\w+)\((.*)\) -> ", schema)[0]
        types, names = zip(*(text.split() for text in parameters.split(", ")), strict=True)
        self.tensors: int = sum(text.startswith("Tensor") for text in types)
        self.numbers: tuple[str, ...] = names[self.tensors :]
        self.Arguments: Any = namedtuple(self.name, names)
        self.sharding = sharding
        self.function: Any = None  # its torch.autograd.Function
        self.kernels, self._results, self._reference = kernels, results, reference
        _library.define(schema)
        self.packet: Any = getattr(torch.ops.triton_cnn, self.name)
        self.overload: Any = self.packet.default

    def __call__(self, *args: Any) -> Any:
        tensors, numbers = args[: self.tensors], args[self.tensors :]
        if not calls.is_plain(tensors):
            meet_subclasses()
            return self.overload(*args)
        if self.function is not None and torch.is_grad_enabled():
            make = lambda *tensors: self._run(tensors, numbers)  # noqa: E731
            return self.function.apply(*tensors, Recorded(self, make, tensors, numbers))
        return self._run(tensors, numbers)

    def _run(self, tensors: Sequence[Tensor | None], numbers: tuple) -> Any:
        """The results on plain tensors, without a gradient; what they are on has to be known."""
        x: Any = tensors[0]
        if x.is_cuda or (x.is_cpu and device.takes_cpu()):
            return self._launch(tensors, numbers)
        return self.overload(*tensors, *numbers)

    def _launch(self, tensors: Sequence[Tensor | None], numbers: tuple) -> Any:
        """What the kernels give. A call that comes again is replayed: the numbers can be hashed."""
        if not calls.may_replay():
            return self._by_name(*tensors, *numbers)
        key = calls.operator_key(self, tensors, numbers)
        if (recording := calls.known.get(key)) is not None:
            return recording(*tensors)
        results, recording = replay.record(self._by_name, tensors, *numbers)
        if recording.complete:
            calls.remember(key, recording)
        return results

    def _by_name(self, *args: Any) -> Any:
        a = self.Arguments(*args)
        results = self._results(a)
        self.kernels(a, *(results if isinstance(results, tuple) else (results,)))
        return results

    def launch(self, *args: Any) -> Any:
        """What the kernels give, whatever the tensors are on: for tensors of the meta device where
        launches only compile.
        """
        return self._launch(args[: self.tensors], args[self.tensors :])

    def dispatched(self, on_gpu: bool, *args: Any) -> Any:
        """What the dispatcher calls of a GPU's tensors, or the CPU's: with pairs as lists."""
        tensors = args[: self.tensors]
        for t in tensors:
            if t is not None and not t.data_ptr() and t.numel():
                raise RuntimeError(
                    f"{self.name} needs tensors whose memory is allocated, got one of "
                    f"{list(t.shape)} whose storage is empty"
                )
        if not on_gpu and not device.takes_cpu():
            raise NotImplementedError(
                f"{_NAMESPACE}::{self.name} takes CPU tensors only under TRITON_INTERPRET=1, to be "
                "set before Triton is imported; without it cnn.functional calls torch's operators"
            )
        return self._launch(tensors, _with_tuples(args[self.tensors :]))

    def reference(self, *args: Any) -> Any:
        """What ATen gives, layout included, which measured plans are checked against."""
        assert self._reference is not None
        return self._reference(self.Arguments(*args))

    def arguments(self, a: Any, **others: Any) -> Any:
        """The operator's arguments by name: the others, and the rest from another's ``a``."""
        given = {**a._asdict(), **others}
        return self.Arguments(**{name: given[name] for name in self.Arguments._fields})

    def bind(self, result: Callable[[Any], Any] | None = None, /, **numbers: Any) -> "Bound":
        """The operator with its numbers; ``result`` picks from what it gives."""
        return Bound(self, tuple([numbers[name] for name in self.numbers]), result)


class Bound:
    """An operator and its numbers, to be called with its tensors."""

    def __init__(
        self, operator: Operator, numbers: tuple, result: Callable[[Any], Any] | None = None
    ):
        self._operator, self._numbers, self._result = operator, numbers, result

    def __call__(self, *tensors: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            # Dynamo takes no Function that is given one tensor twice: its own residual, say.
            meet_subclasses()
            made = self._operator.packet(*tensors, *self._numbers)
        else:
            made = self._operator(*tensors, *self._numbers)
        return made if self._result is None else self._result(made)

    def again(self, *tensors: Tensor | None) -> Callable[..., Any] | None:
        """After a call that nothing watched: the same, for tensors that differ from these in their
        elements alone, with what follows from the rest done once. None if it is not kept.
        """
        operator, result = self._operator, self._result
        recording = calls.known.get(calls.operator_key(operator, tensors, self._numbers))
        if recording is None:
            return None
        if operator.function is None or not torch.is_grad_enabled():
            return recording if result is None else lambda *tensors: result(recording(*tensors))
        call = Recorded(operator, recording, tensors, self._numbers)
        record = operator.function.apply
        if result is None:
            return lambda *tensors: record(*tensors, call)
        return lambda *tensors: result(record(*tensors, call))


operators: dict[str, Operator] = {}
"""All that are defined, by name."""


def define(
    schema: str,
    *,
    results: Callable[[Any], Any],
    kernels: Callable[..., None],
    sharding: Sharding,
    vmap: Callable[[Operator, int, Any, Any], tuple[Any, Any]] | None = None,
    flops: Callable[[Any], int] | None = None,
    reference: Callable[[Any], Any] | None = None,
    saves: Sequence[str] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., tuple] | None = None,
) -> Operator:
    """The operator of a schema, which has tensors before numbers. All of ``a`` is by name.

    Args:
        results: of ``a``, memory for the results; also the fake version, whose sizes are symbolic.
        kernels: of ``a`` and the results, computes them.
        sharding: how a DTensor is shared.
        vmap: of the operator, the mapped axis's size, the mapped axis of each argument by name, and
            ``a``, the results and their mapped axes.
        flops: of ``a`` that has shapes for tensors, what FlopCounterMode counts.
        reference: of ``a``, the results by ATen.
        saves: the names of the tensors that ``backward`` finds in ``ctx.saved_tensors``.
        setup_context: in place of ``saves``, as a torch.autograd.Function's, of the tensors and the
            call, a ``Recorded``: it has to be ``ctx.call``.
        backward: as a Function's; the last gradient, of the call, is None.
    """
    made = Operator(schema, results, kernels, reference, sharding)
    operators[made.name] = made
    qualified = f"{_NAMESPACE}::{made.name}"

    def named(args: Sequence[Any]) -> Any:
        return made.Arguments(*_with_tuples(args))

    _library.impl(made.name, partial(made.dispatched, True), "CUDA")
    _library.impl(made.name, partial(made.dispatched, False), "CPU")
    _library.impl(made.name, partial(_refuse_trace, made.name), "Tracer")
    torch.library.register_fake(qualified, lambda *args: results(named(args)), lib=_library)
    if vmap is not None:
        torch.library.register_vmap(
            qualified,
            lambda info, dims, *args: vmap(
                made, info.batch_size, made.Arguments(*dims), named(args)
            ),
            lib=_library,
        )
    if flops is not None:
        register_flop_formula(made.packet)(lambda *args, **_: flops(named(args)))
    if backward is not None:
        made.function = _function(made, setup_context or _saving(made, saves), backward)
        _library.impl(made.name, partial(_autograd, made), "Autograd", with_keyset=True)
    return made


def _with_tuples(args: Sequence[Any]) -> tuple:
    return tuple([tuple(value) if type(value) is list else value for value in args])


def _refuse_trace(name: str, *args: Any) -> Any:
    raise NotImplementedError(
        f"torch.jit.trace does not take {_NAMESPACE}::{name}: use torch.export"
    )


def _saving(operator: Operator, names: Sequence[str]) -> Callable[..., None]:
    places = [operator.Arguments._fields.index(name) for name in names]

    def setup_context(ctx: Any, inputs: Sequence[Any], results: Any) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*[tensors[place] for place in places])

    return setup_context


def _function(
    operator: Operator, setup_context: Callable[..., None], backward: Callable[..., tuple]
) -> type[SingleLevelFunction]:
    """The Function that makes an operator differentiable: of conv2d_dgrad, Conv2dDgrad."""
    hooks = {"forward": _forward, "setup_context": setup_context, "backward": backward}
    return type(
        "".join(word.capitalize() for word in operator.name.split("_")),
        (SingleLevelFunction,),
        {key: staticmethod(hook) for key, hook in hooks.items()} | {"__module__": __name__},
    )


def _forward(*args: Any) -> Any:
    return args[-1].make(*args[:-1])


def _autograd(operator: Operator, keyset: Any, *args: Any) -> Any:
    """The operator's kernel of autograd, by the same Function that is called past the dispatcher.

    As in the operators of PyTorch the level of a transform is no concern of this kernel: within
    ``torch.func.grad`` it is given the tensors of one level, and the next operator is the level's.
    """
    tensors, numbers = args[: operator.tensors], args[operator.tensors :]
    below = below_autograd(operator.overload, keyset)
    if not _is_recorded(tensors):
        return below(*args)
    make = record_as_now(lambda *tensors: below(*tensors, *numbers))
    with enable_single_level_autograd_function():
        call = Recorded(operator, make, tensors, _with_tuples(numbers))
        return operator.function.apply(*tensors, call)


def _is_recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd has something to do for a call: to record it, or to refuse it."""
    return (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ) or is_transformed()


# DTensor.


@constant_while_traced
def meet_subclasses() -> None:
    """Tell DTensor of the operators, if it has been imported: before a call that it may be in."""
    if "torch.distributed.tensor" in sys.modules:
        _register_sharding()


@cache
def _register_sharding() -> None:
    """Of each axis of a mesh: sharded, or all replicated."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    of = {BATCH: Shard(0), WHOLE: Replicate(), SUM: Partial()}
    for operator in operators.values():
        operands, results = ([of[name] for name in names] for names in operator.sharding)
        whole = [of[WHOLE] for _ in results], [of[WHOLE] for _ in operands]
        register_sharding(operator.overload, [(results, operands), whole])
