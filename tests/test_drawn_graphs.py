"""Drawn networks under torch.compile with this library's fusion, against eager execution."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from drawn_networks import draw
from drawn_programs import Program, reduced
from torch import Tensor, fx
from torch._dynamo.backends.debugging import aot_eager

from cnn.compile_backend import fuse, triton_cnn

pytestmark = [
    pytest.mark.slow,
    # Dynamo looks for the gradients of its inputs, which are no leaves here.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # Inductor imports what it is in.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
]

PART = 50
"""Programs of one test: few enough to share among workers, enough for each pattern to occur."""

PATTERNS = {
    "conv2d": 30,
    "conv2d + relu": 10,
    "conv2d + residual + relu": 2,
    "conv2d_relu_max_pool2d": 3,
    "conv2d_dgrad": 1,
    "max_pool2d": 20,
}
"""The operators that fusion makes of the rest, and how many at least in each part."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.02}
"""RMS error of a tensor, by the coarsest dtype of the program, relative to the larger of its RMS
and one; of integers the share that differs. What is sound differs by rounding, what is not by as
much as the values."""

FLIPS = 2.0
"""The same of gradients in bfloat16, which shows only what is grossly wrong. Fusion rounds once in
place of twice, and where that changes which elements a ReLU or a pooling lets through, their whole
gradients go elsewhere. In programs of whole numbers nothing is rounded forward: their values are
equal, and their gradients differ by rounding."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("first", range(0, 300, PART))
def test_fused_graphs_do_what_eager_does(first):
    made = Counter()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = operators(gm)
        fused = fuse(gm)
        made.update(operators(fused))
        made.subtract(before)
        return aot_eager(fused, inputs)

    for seed in range(first, first + PART):
        check(draw(seed), backend)
    assert {name: n for name, n in PATTERNS.items() if made[name] < n} == {}, made


@pytest.mark.parametrize("seed", range(1000, 1020))
def test_inductor_compiles_what_eager_does(seed):
    check(draw(seed), triton_cnn)


def test_a_wrong_backend_is_told_by_a_small_program():
    def without_relu(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for node in gm.graph.nodes:
            if node.target is TF.relu:
                node.replace_all_uses_with(node.args[0])
        gm.recompile()
        return gm.forward

    programs = (program for program in map(draw, count()) if " = TF.relu(v" in str(program))
    program = next(program for program in programs if differences(program, without_relu))
    with pytest.raises(pytest.fail.Exception) as failure:
        check(program, without_relu)
    told, _, drawn = str(failure.value).partition("drawn as\n")
    assert drawn == str(program)
    assert "result v" in told
    assert "TF.relu" in told
    lines = told.partition("forward")[2].partition("return")[0].splitlines()[1:]
    assert len([line for line in lines if line.strip() != "pass"]) < len(program.lines)


def operators(gm: fx.GraphModule) -> Counter[str]:
    """How often the graphs of a module call which of this library's operators."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return Counter(
        _pattern(node.target, node.args, node.kwargs)
        for graph in graphs
        for node in graph.nodes
        if str(node.target).startswith("triton_cnn.")
    )


def _pattern(target: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default
    schema = target._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
    given |= kwargs
    parts = [name for name in ("residual", "relu") if given.get(name)]
    return " + ".join([schema.name.removeprefix("triton_cnn::"), *parts])


def check(program: Program, backend: Any) -> None:
    """Fail with a small program that shows what the backend gets wrong."""
    if differences(program, backend):
        less = reduced(program, lambda smaller: _is_wrong(smaller, backend))
        pytest.fail("\n".join((str(less), *differences(less, backend), f"drawn as\n{program}")))


def _is_wrong(program: Program, backend: Any) -> bool:
    try:
        return bool(differences(program, backend)) and not differences(program, "aot_eager")
    except Exception:  # eager torch does not take it
        return False


def differences(program: Program, backend: Any) -> list[str]:
    """What differs from eager execution, in words."""
    expected = outcome(program)
    try:
        found = outcome(program, backend)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        pair = found.get(name), expected.get(name)
        if line := _difference(*pair, _tolerance(program, name.startswith("gradient"))):
            lines.append(f"{name}: {line}")
    return lines


def outcome(program: Program, backend: Any = None) -> dict[str, Tensor]:
    """All that a call of the network and its backward pass leave behind, by name."""
    network, leaves, inputs = program.build()
    call: Any = network
    if backend is not None:
        call = torch.compile(network, backend=backend, dynamic=program.dynamic)
    with (
        torch.set_grad_enabled(program.training),
        torch.autocast("cpu", torch.bfloat16, enabled=program.autocast, cache_enabled=False),
    ):
        results = call(*inputs)
    differentiable = [t for t in results if t.requires_grad]
    if differentiable:
        sum(map(_weighted_sum, differentiable)).backward()
    left = {f"result {name}": t for name, t in zip(program.results, results, strict=True)}
    requires_grad = {
        f"{n} requires a gradient": torch.tensor(t.requires_grad) for n, t in left.items()
    }
    strides = {f"{n} lies": torch.tensor(_strides(t)) for n, t in left.items()}
    left |= requires_grad | strides
    left |= {f"x{i}": t for i, t in enumerate(inputs)} | network.state_dict()
    sources = dict(network.named_parameters()) | {f"leaf{i}": t for i, t in enumerate(leaves)}
    # AOTAutograd gives zero to an input that is mutated and not read, eager torch nothing.
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in sources.items()}
    left |= {f"gradient of {name}": gradient for name, gradient in grads.items()}
    return {name: t.detach() for name, t in left.items()}


def _strides(t: Tensor) -> list[int]:
    """Those of axes that have more than one element: the others say nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _weighted_sum(t: Tensor) -> Tensor:
    weights = torch.arange(t.numel(), dtype=torch.float64).cos().reshape(t.shape)
    return (t.double() * weights).sum()


def _tolerance(program: Program, is_gradient: bool) -> float:
    if program.coarsest == torch.bfloat16 and is_gradient != program.whole:
        return FLIPS if is_gradient else 0.0
    return TOLERANCE[program.coarsest]


def _difference(found: Tensor | None, right: Tensor | None, tolerance: float) -> str | None:
    if found is None or right is None:
        return f"only {'eager' if found is None else 'compiled'}"
    if (found.shape, found.dtype) != (right.shape, right.dtype):
        return f"{found.dtype} of {tuple(found.shape)}, not {right.dtype} of {tuple(right.shape)}"
    if not right.is_floating_point():
        share = (found != right).double().mean().item()
        return f"{found}, not {right}" if share > tolerance else None
    found, right = found.double(), right.double()
    if not torch.equal(found.isfinite(), right.isfinite()):
        return "infinite or NaN elsewhere"
    error, size = (t.nan_to_num().square().mean().sqrt().item() for t in (found - right, right))
    if error <= tolerance * max(size, 1):
        return None
    return f"RMS error {error:.3g} of {size:.3g}"
