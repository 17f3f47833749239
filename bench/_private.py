"""Undocumented behavior of PyTorch and Triton that the commands rely on and the library does not:
see ``kernels/_private.py``. This file is not installed.

The emulator has its own protocol of a driver and its launcher: ``bench/emulator/driver.py``.
"""

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler, driver
from triton.runtime import jit

# Triton's compiler.


class Compilation(NamedTuple):
    """A compilation: Triton's hash of a kernel, and its time."""

    hash: str
    seconds: float
    cached: bool  # found on disk and only loaded


def listen(note: Callable[[Compilation], None]) -> None:
    """Call ``note`` after each compilation, until another listens or ``triton.knobs`` are restored.

    Relies on the keywords of a ``compilation.listener``, whose times are in microseconds.
    """

    def listener(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        note(Compilation(metadata["hash"], times.total / 1e6, cache_hit))

    knobs.compilation.listener = listener


@contextmanager
def hooked(before: Callable[..., Any], after: Callable[..., Any] | None = None) -> Iterator[None]:
    """A context in which Triton calls these hooks before and after it compiles a kernel.

    Their ``specialization_data`` is empty, because Triton 3.6 raises an error if a constexpr is a
    jitted function.
    """
    empty = mock.patch.object(jit, "serialize_specialization_data", return_value="")
    with knobs.runtime.scope(), empty:
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = before, after
        yield


@contextmanager
def intercepted(
    is_known: Callable[[str], bool], take: Callable[[str, Any], None]
) -> Iterator[None]:
    """A context in which a kernel is compiled only if ``is_known`` returns False, and then passed
    only to ``take``: no JIT function keeps it. Both get a name made of everything that a kernel is
    compiled from: its source, the source of all functions it calls, and its specialization.

    Relies on the keywords of the two hooks; on the first one preventing the compilation by
    returning True; and on a JIT function's ``cache_key`` and ``device_caches``, whose entries begin
    with the kernels by the hooks' key.
    """

    def name(key: str, fn: Any) -> str:
        return f"{fn.module}.{fn.name} {fn.jit_function.cache_key} {key}"

    def before(*, key: str, fn: Any, **_: Any) -> bool:
        return is_known(name(key, fn))

    def after(*, key: str, fn: Any, **_: Any) -> None:
        for kernels, *_others in fn.jit_function.device_caches.values():
            if kernel := kernels.pop(key, None):
                take(name(key, fn), kernel)

    with hooked(before, after):
        yield


def unspecialized(name: str) -> str:
    """The name from ``intercepted``, made independent of how integers are specialized.

    Relies on a hook's key: a list with (type, value) of each argument, or two tuples of these for a
    tuple, followed by the options; on an integer of 1 being a constexpr there, like a constant; and
    on the values of other arguments being text.
    """

    def of(kind: Any, value: Any) -> Any:
        if isinstance(kind, tuple):
            return tuple(map(of, kind, value))
        one = kind == "constexpr" and value == 1 and value is not True
        return "integer" if one or re.fullmatch(r"i\d+", str(kind)) else (kind, value)

    found = re.fullmatch(r"(\S+ \S+) (\[.*\])(\{.*\})", name)
    assert found is not None
    kernel, arguments, options = found.groups()
    return f"{kernel} {[of(*argument) for argument in literal_eval(arguments)]}{options}"


def module_of(kernel: Any) -> str:
    """The module that contains the source of a compiled kernel."""
    return kernel.src.fn.fn.__module__


def build_launchers(kernels: Sequence[Any]) -> None:
    """Compile the C launchers that Triton 3.6 needs for each signature at its first kernel."""
    if hasattr(driver, "make_launcher"):
        for kernel in kernels:
            driver.CudaLauncher(kernel.src, kernel.metadata)


# Triton's back end for NVIDIA, as the emulator uses it.


class _ToPTX(compiler.CUDABackend):
    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        stages.pop("cubin", None)

    def hash(self) -> str:  # type: ignore[override]  Triton's is cached
        return f"{super().hash()}-ptx"


def stop_at_ptx() -> None:
    """Compile only to PTX in this process: ptxas takes seconds per kernel.

    Relies on the table of back ends, on the stages running in order and the last one returning what
    is loaded, and on ``hash`` being part of the key of Triton's cache.
    """
    backends["nvidia"] = type(backends["nvidia"])(_ToPTX, backends["nvidia"].driver)


def parameters_of_descriptor(kind: str, descriptor: Any, meta: Any) -> list[tuple[str, Any]]:
    """A descriptor's parameters, as (type, value), in this version of Triton's order; ``meta``
    belongs to a descriptor that hardware supports.
    """
    rank = len(descriptor.shape)
    arguments = len(inspect.signature(driver.make_tensordesc_arg).parameters)
    expanded = driver.make_tensordesc_arg(descriptor, meta, *[None] * (arguments - 2))
    if meta is None:
        element = kind.partition("<")[2].partition("[")[0]
        flags = len(expanded) - 1 - 4 * rank  # Triton 3.9 has one more than 3.6
        kinds = ["*" + element, *["i64"] * (2 * rank), *["i1"] * flags]
    else:
        kinds = ["nvTmaDesc"]
        expanded[0].keep = descriptor.base
    kinds += ["i32"] * rank + ["i64"] * rank
    return list(zip(kinds, expanded, strict=True))


# Inductor.


def inductors_pooling(window: tuple, size: tuple[int, int]) -> tuple[Callable, Callable]:
    """Inductor's max-pooling in training, as two functions: from x to the values and a byte for
    each one's position in its window; from such bytes to flat indices in a map of ``size``.

    ``window``: kernel, stride, padding, dilation, ceil_mode.
    """
    from torch._inductor import inductor_prims  # noqa: F401 - registers them

    prims = torch.ops.prims
    kernel, *others, _ = window

    def pool(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return prims._low_memory_max_pool_with_offsets(x, *window)

    def places(offsets: torch.Tensor) -> torch.Tensor:
        return prims._low_memory_max_pool_offsets_to_indices(offsets, kernel, size, *others)

    return pool, places
