"""Record and replay calls of operators. The first call of a kind records its allocations and its
launches; later ones repeat them on their own tensors, without planning.

Planning a launch takes ten times as long as making it. But plan, grid, strides and descriptors
follow from the operands' shapes, strides, dtypes and alignment alone, so a call that agrees in
these, and in its numbers, makes the same launches.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import device
from ._private import describes_like

Slots = list[Any]  # a call's operands, then the tensors and descriptors that it makes, in order


class Recording:
    """The steps of a call, each of which is given the slots; to be called with the operands.

    It is ``complete`` where every tensor that a step takes is known to be an operand or the result
    of a step. One that is not must not be called.
    """

    def __init__(self, operands: Sequence[Tensor | None]):
        self.complete = True
        self.results: Any = None  # gives what the call returns from its slots
        self._steps: list[Callable[[Slots], None]] = []
        self._values: Slots = list(operands)  # held while recording, so that no two have one id
        self._slots = {id(t): slot for slot, t in enumerate(operands) if t is not None}

    def __call__(self, *operands: Tensor | None) -> Any:
        slots = [*operands]
        for step in self._steps:
            step(slots)
        return self.results(slots)

    def made(self, value: Tensor | TensorDescriptor, step: Callable[[Slots], None]) -> None:
        """A step that adds a value to the slots."""
        self._slots[id(value)] = len(self._values)
        self._values.append(value)
        self._steps.append(step)

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict) -> None:
        # In the kernel's order: Triton takes longer to bind what is named.
        args += tuple([meta.pop(name) for name in kernel.arg_names if name in meta])
        takes = [(i, take) for i, value in enumerate(args) if (take := self._from_slots(value))]
        known = list(args)
        for i, _ in takes:
            known[i] = None

        def step(slots: Slots) -> None:
            arguments = known[:]
            for i, take in takes:
                arguments[i] = take(slots)
            device.launch(kernel, grid, *arguments, **meta)

        self._steps.append(step)

    def finish(self, results: Any) -> None:
        """The call returned a tensor or a tuple of them. From here on none is held."""
        several = isinstance(results, tuple)
        found = [self._from_slots(t) for t in (results if several else (results,))]
        if several:
            self.results = lambda slots: tuple([take(slots) for take in found if take])
        else:
            self.results = found[0]
        self._values, self._slots = [], {}

    def _from_slots(self, value: Any) -> Callable[[Slots], Any] | None:
        """How an argument is made from the slots; None for one that holds no tensor."""
        if isinstance(value, Tensor):
            slot = self._slots.get(id(value))
            self.complete &= slot is not None
            return itemgetter(slot or 0)
        if isinstance(value, TensorDescriptor):
            if id(value) not in self._slots:
                self._describe(value)
            return itemgetter(self._slots[id(value)])
        if isinstance(value, tuple) and any(found := [self._from_slots(item) for item in value]):
            parts = list(zip(found, value, strict=True))
            make = getattr(value, "_make", tuple)  # a named tuple stays one
            return lambda slots: make([take(slots) if take else item for take, item in parts])
        return None

    def _describe(self, value: TensorDescriptor) -> None:
        """A step that adds a descriptor, which launches may share, to the slots."""
        describe, base = describes_like(value), self._from_slots(value.base)
        assert base is not None
        self.made(value, lambda slots: slots.append(describe(base(slots))))


def record(function: Callable[..., Any], operands: Sequence[Tensor | None], *rest: Any) -> Any:
    """(results, recording) of ``function(*operands, *rest)``."""
    # One tensor given twice is two operands: the next call may give two tensors.
    operands = [None if t is None else t.detach() for t in operands]
    device.recorder.recording = recording = Recording(operands)
    try:
        results = function(*operands, *rest)
    finally:
        device.recorder.recording = None
    recording.finish(results)
    return results, recording


def new(
    like: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Memory for a result or a step between, on like's device and by default of its dtype."""
    t = like.new_empty_strided(tuple(shape), tuple(strides), dtype=dtype)
    if (recording := device.recorder.recording) is not None:
        kind = {"dtype": t.dtype, "device": t.device}
        size, steps = t.shape, t.stride()
        recording.made(t, lambda slots: slots.append(torch.empty_strided(size, steps, **kind)))
    return t


def derive(t: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(t), of which each call makes its own."""
    made = function(t)
    if (recording := device.recorder.recording) is not None:
        take = recording._from_slots(t)
        assert take is not None
        recording.made(made, lambda slots: slots.append(function(take(slots))))
    return made


def contiguous(t: Tensor | None) -> Any:
    """t, or its copy if it is not contiguous; None stays None."""
    return t if t is None or t.is_contiguous() else derive(t, Tensor.contiguous)
