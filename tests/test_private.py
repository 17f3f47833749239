"""What the library counts on in PyTorch and Triton that they do not promise, each by itself.

Run, on CPUs, with PyTorch and Triton 2.11.0 and 3.6.0, 2.12.1 and 3.7.1, 2.13.0 and 3.6.0, 2.13.0
and 3.9.0, 2.14.1 and 3.8.0, 2.15.0 and 3.9.0.
"""

import ast
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
import triton
import triton.language as tl
from compiled_private import CHECKS
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.overrides import TorchFunctionMode
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import _private as bench_private
from kernels import _private
from kernels.device import INTERPRET

ROOT = Path(__file__).parents[1]
in_interpreter = pytest.mark.skipif(not INTERPRET, reason="the interpreter is off")


# Where internals are used.

HOMES = {ROOT / "kernels" / "_private.py", ROOT / "bench" / "_private.py"}
PROTOCOLS = {"_replace", "_asdict", "_fields", "_make", "_get_name", "_exit"}
"""Documented, in spite of their names: of named tuples, of modules that print themselves, of os."""


def internals(path: Path) -> Iterator[str]:
    """Modules that are not public and attributes of others' that begin with an underscore."""
    tree = ast.parse(path.read_text())
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _of_self(n)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = getattr(node, "module", None) or ""
            names = [f"{source}.{alias.name}".strip(".") for alias in node.names]
            yield from filter(_is_internal, names)
        elif isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[:2] != "__":
            theirs = not _of_self(node) and node.attr not in own | PROTOCOLS
            if theirs:
                yield ast.unparse(node)


def _of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _is_internal(name: str) -> bool:
    parts = name.split(".")
    inner = parts[:2] in (["triton", place] for place in ("runtime", "backends", "compiler"))
    deep = parts[:2] == ["triton", "language"] and len(parts) > 3
    return inner or deep or (parts[0] == "torch" and any(part[0] == "_" for part in parts))


@pytest.mark.parametrize("package", ["kernels", "cnn", "bench"])
def test_internals_are_used_in_one_file_alone(package):
    paths = set((ROOT / package).rglob("*.py")) - HOMES
    found = {str(path.relative_to(ROOT)): sorted(internals(path)) for path in paths}
    assert {name: uses for name, uses in found.items() if uses} == {}


# Triton's interpreter.


@triton.jit
def add_one(x):
    return x + 1


@triton.jit
def add_up(x_ptr, y_ptr, n):
    total = 0
    for i in _private.python_range(n):
        total += tl.load(x_ptr + i)
    for i in _private.python_range(1, n, 2):
        total += tl.load(x_ptr + i)
    tl.store(y_ptr, add_one(add_one(total)))


@in_interpreter
def test_the_interpreter_loops_up_to_a_bound_that_is_an_argument():
    y = torch.zeros(1, dtype=torch.int64)
    add_up[(1,)](torch.arange(6), y, 5)
    assert y.item() == sum(range(5)) + 1 + 3 + 2


@in_interpreter
def test_the_interpreter_patches_a_language_once_in_a_launch(monkeypatch):
    from triton.runtime import interpreter

    calls, patch, load = [], interpreter._patch_lang, tl.load
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: calls.append(fn) or patch(fn))
    y = torch.zeros(1, dtype=torch.int64)
    add_up[(1,)](torch.arange(4), y, 4)
    assert len(calls) == 3
    for _ in range(2):
        calls.clear()
        with _private.quick_interpreter():
            add_up[(1,)](torch.arange(4), y, 4)
        assert len(calls) == 1
    assert tl.load is load


@triton.jit
def add_to_largest(y_ptr, x):
    tl.store(y_ptr, x + tl.full((1,), 2**31 - 1, tl.int32).sum(0))


@in_interpreter
def test_the_interpreter_checks_no_overflow(monkeypatch):
    from triton.runtime import interpreter

    builder, y = interpreter.interpreter_builder, torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
    with pytest.raises(triton.InterpreterError, match="overflow"):
        add_to_largest[(1,)](y, 1)
    with _private.quick_interpreter():
        add_to_largest[(1,)](y, 2)
    assert y.item() == -(2**31) + 1
    with pytest.raises(triton.InterpreterError, match="overflow"):
        add_to_largest[(1,)](y, 1)


@triton.jit
def copy_box(x, y_ptr, N: tl.constexpr):
    box = x.load([0, 0])
    i = tl.arange(0, N)
    tl.store(y_ptr + i[:, None] * N + i[None, :], box)


@in_interpreter
def test_a_descriptor_is_its_fields():
    first, other = torch.rand(3, 8), torch.rand(3, 8)
    known = TensorDescriptor(first, [3, 8], [8, 1], [8, 8])
    made = _private.describes_like(known)(other)
    right = TensorDescriptor(other, [3, 8], [8, 1], [8, 8])
    assert type(made) is TensorDescriptor
    assert made.base is other
    assert {**vars(made), "base": None} == {**vars(right), "base": None}
    y = torch.zeros(8, 8)
    copy_box[(1,)](made, y, 8)
    assert torch.equal(y, TF.pad(other, (0, 0, 0, 5)))


# Triton's compiler and driver, in a process that has no interpreter.


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    program = [sys.executable, str(ROOT / "tests" / "compiled_private.py")]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_compiled(outcomes, name):
    assert outcomes[name] == ""


# PyTorch's modes.


def state(x: Tensor) -> tuple[bool, bool]:
    SEEN.append((_private.is_transformed(), _private.is_watched()))
    return x * 1


SEEN: list[tuple[bool, bool]] = []


class Passing(_private.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def in_vmap(x: Tensor) -> None:
    torch.vmap(state)(x)


def in_grad(x: Tensor) -> None:
    torch.func.grad(lambda x: state(x).sum())(x)


def in_jvp(x: Tensor) -> None:
    torch.func.jvp(state, (x,), (x,))


def in_functionalize(x: Tensor) -> None:
    torch.func.functionalize(state)(x)


def in_trace(x: Tensor) -> None:
    torch.jit.trace(state, (x,), check_trace=False)


def in_dual_level(x: Tensor) -> None:
    with forward_ad.dual_level():
        state(x)


def in_mode(x: Tensor) -> None:
    with Passing():
        state(x)


def in_fake_mode(x: Tensor) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = state(mode.from_tensor(x))
    assert type(fake) is _private.FakeTensor
    assert not isinstance(x, _private.FakeTensor)


@pytest.mark.parametrize(
    ("enter", "seen"),
    [
        (state, (False, False)),
        (in_dual_level, (True, True)),
        (in_vmap, (True, True)),
        (in_grad, (True, True)),
        (in_jvp, (True, True)),
        (in_functionalize, (True, True)),
        (in_mode, (False, True)),
        (in_fake_mode, (False, True)),
        (in_trace, (False, True)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modes_are_seen(enter, seen):
    SEEN.clear()
    enter(torch.ones(3))
    assert set(SEEN) == {seen}
    assert not _private.is_transformed()
    assert not _private.is_watched()


def test_a_function_mode_is_seen():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **kwargs or {})

    assert not _private.is_function_mode_enabled()
    with Mode():
        assert _private.is_function_mode_enabled()
    with torch.device("meta"):
        assert _private.is_function_mode_enabled()
    assert not _private.is_function_mode_enabled()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_autocast_is_seen(kind, monkeypatch):
    assert not _private.is_any_autocast_enabled()
    before = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, True)
    try:
        assert _private.is_any_autocast_enabled()
    finally:
        torch.set_autocast_enabled(kind, before)
    assert not _private.is_any_autocast_enabled()


# Autograd.


class Cube(_private.SingleLevelFunction):
    """Of a tensor and what makes the result of it."""

    @staticmethod
    def forward(x, make):
        return make(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * 3 * x * x, None


def test_a_single_level_function_records_as_others_do_without_their_preparations(monkeypatch):
    monkeypatch.setattr(Function, "apply", None)
    x = torch.tensor([2.0], requires_grad=True)
    y = Cube.apply(x, lambda x: x**3)
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx, x)
    assert (y.item(), dx.item(), ddx.item()) == (8, 12, 12)
    with torch.no_grad():
        assert not Cube.apply(x, lambda x: x**3).requires_grad
    key = y.grad_fn._compiled_autograd_key()
    assert key == Function._compiled_autograd_key(y.grad_fn)


@cache
def cube() -> Any:
    """An operator whose autograd kernel is made as the library's are."""
    library = torch.library.Library("private_test", "DEF")
    library.define("cube(Tensor x) -> Tensor")
    library.impl("cube", lambda x: x**3, "CPU")
    operator = torch.ops.private_test.cube.default

    def autograd(keyset: Any, x: Tensor) -> Tensor:
        below = _private.below_autograd(operator, keyset)
        if not (x.requires_grad or _private.is_transformed()):
            return below(x)
        make = _private.record_as_now(below)
        with _private.enable_single_level_autograd_function():
            return Cube.apply(x, make)

    library.impl("cube", autograd, "Autograd", with_keyset=True)
    return SimpleNamespace(call=operator, library=library)  # which lives as long as this


def test_an_autograd_kernel_records_at_each_level_and_calls_what_is_below():
    function, x = cube().call, torch.tensor(2.0)
    assert function(x).item() == 8
    assert not function(x).requires_grad
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(function(leaf), leaf)
    assert dx.item() == 12
    grad = torch.func.grad
    assert grad(function)(x).item() == 12
    assert grad(grad(function))(x).item() == 12
    assert grad(grad(grad(function)))(x).item() == 6
    # What the levels below have to record is recorded: the leaf's graph, beside func.grad's.
    (ddx,) = torch.autograd.grad(grad(function)(leaf), leaf)
    assert ddx.item() == 12
    with torch.no_grad():
        assert not grad(function)(leaf).requires_grad


def test_a_function_turns_recording_off_and_record_as_now_on():
    seen = []

    def make(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()))
        return x**3

    x = torch.tensor(2.0, requires_grad=True)
    Cube.apply(x, make)
    Cube.apply(x, _private.record_as_now(make))
    with torch.no_grad():
        Cube.apply(x, _private.record_as_now(make))
    assert seen == [(False, False), (True, True), (False, True)]


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        ((4, 3, 2, 2), lambda t: torch.conv2d(leaf(1, 3, 4, 4), t).grad_fn._saved_weight),
        ((4,), lambda t: torch.matmul(leaf(2, 4), t).grad_fn._saved_vec),
    ],
    ids=["weight", "vector"],
)
def test_autocast_keeps_one_copy_of_a_parameter(shape, use):
    t = torch.randn(shape, requires_grad=True)

    def never(x: Tensor) -> Any:
        raise AssertionError("the caller's hooks saw it")

    copy = lambda: _private.autocasts_copy(t, torch.bfloat16)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(never, never):
            first = copy()
        with torch.no_grad():
            again = copy()
        with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"):
            third = copy()
        places = {kept.data_ptr() for kept in (first, again, third, use(t))}
    assert len(places) == 1
    assert torch.equal(first, t.bfloat16())
    first.float().sum().backward()
    assert torch.equal(t.grad, torch.ones(shape))
    with torch.autocast("cpu", torch.bfloat16):
        assert copy().data_ptr() not in places


# Quantization.


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_proxies_of_the_tracer_for_quantization_are_told_from_others():
    from torch.ao.quantization.fx.tracer import QuantizationTracer

    found = []

    class Asking(torch.nn.Module):
        def forward(self, x):
            found.append(_private.is_quantizing((None, x, 2)))
            return x

    QuantizationTracer([], []).trace(Asking())
    torch.fx.symbolic_trace(Asking())
    Asking()(torch.ones(1))
    assert found == [True, False, False]


# DTensor.

SHARDED = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from kernels._private import register_sharding

library = torch.library.Library("private_test", "DEF")
library.define("scale(Tensor x, Tensor? y, int by) -> (Tensor, Tensor)")
seen = []

def scale(x, y, by):
    seen.append((x.shape[0], by))
    return x * by, x.sum(0) * by

library.impl("scale", scale, "CPU")
library.impl("scale", lambda x, y, by: (x * by, x.sum(0) * by), "Meta")
operator = torch.ops.private_test.scale.default
batch, whole, sum_ = Shard(0), Replicate(), Partial()
choices = [((batch, sum_), (batch, whole)), ((whole, whole), (whole, whole))]
register_sharding(operator, choices)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for images, part in ((4, 2), (3, 2), (1, 1)):
    x = distribute_tensor(torch.ones(images, 5), mesh, [batch])
    for y in (None, distribute_tensor(torch.ones(3), mesh, [whole])):
        for by in (2, 3):
            z, total = operator(x, y, by)
            assert z.placements == (batch,) and total.placements == (sum_,)
            assert z.shape == (images, 5) and total.shape == (5,)
            assert seen[-1] == (part, by), (seen, images)
z, total = operator(distribute_tensor(torch.ones(4, 5), mesh, [whole]), None, 2)
assert z.placements == total.placements == (whole,)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_dtensor_shards_as_it_was_told_and_unevenly():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHARDED], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


# Dynamo and Inductor.


ignoring_jit = pytest.mark.filterwarnings("ignore:.*torch.jit")


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_marked_function_is_called_while_dynamo_traces(fresh):
    calls = []

    @_private.constant_while_traced
    def note() -> None:
        calls.append(json.dumps(sorted(sys.modules)))

    def function(x: Tensor) -> Tensor:
        note()
        return x + 1

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert len(calls) == 1
    compiled(torch.ones(2))
    assert len(calls) == 1


class Exporting(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (10 if _private.is_exporting() else 1)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "by Dynamo"])
def test_torch_export_is_told_from_compilation(fresh, strict):
    model, x = Exporting(), torch.zeros(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    program = torch.export.export(model, (x,), strict=strict)
    assert [call(x).item() for call in (model, compiled, program.module())] == [1, 1, 10]


def test_a_backend_knows_the_compilation_and_is_reset(fresh):
    seen, resets = [], []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append((_private.compile_id(), dict(_private.dynamos_counters("private_test"))))
        _private.dynamos_counters("private_test")["graphs"] += 1
        return gm.forward

    _private.reset_with_dynamo(backend, lambda: resets.append(len(seen)))
    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    compiled(torch.ones(2))
    compiled(torch.ones(3))
    assert seen == [("0/0", {}), ("0/1", {"graphs": 1})]
    assert _private.compile_id() == "-"
    assert resets == []
    torch.compiler.reset()
    assert resets == [2]
    assert torch._dynamo.utils.counters.pop("private_test") == {"graphs": 2}


def test_dynamos_graphs_have_fake_tensors_whose_views_share_a_storage(fresh):
    nodes: dict[str, Any] = {}

    def backend(gm: Any, inputs: Any) -> Any:
        nodes.update({node.name: node for node in gm.graph.nodes if node.op != "output"})
        return gm.forward

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = TF.relu(torch.conv2d(x, w))
        first, _ = torch.split(TF.linear(TF.max_pool2d(y, 2), torch.ones(3, 2)), 2, -1)
        return first.unsqueeze(0)

    torch.compile(function, backend=backend)(torch.ones(2, 1, 5, 5), torch.ones(1, 1, 2, 2))
    values = {name: node.meta["example_value"] for name, node in nodes.items()}
    assert {type(t) for t in values.values() if isinstance(t, Tensor)} == {_private.FakeTensor}
    named = {str(getattr(n.target, "__name__", n.target)): n for n in nodes.values()}
    storages = {
        name: _private.storage_of(named[name].meta["example_value"])
        for name in ("conv2d", "relu", "max_pool2d", "linear", "getitem", "unsqueeze")
    }
    assert len(set(storages.values())) == 4
    assert storages["linear"] == storages["getitem"] == storages["unsqueeze"]
    for name in ("conv2d", "relu", "max_pool2d", "linear", "split"):
        assert named[name].target.__module__ in _private.FUNCTION_MODULES


def test_operators_tell_their_namespace_arguments_and_mutability():
    aten = torch.ops.aten
    for target in (aten.add, aten.add.Tensor):
        assert _private.namespace_of(target) == "aten"
    assert _private.namespace_of(torch.ops.prims.convert_element_type.default) == "prims"
    assert _private.namespace_of(torch.ops.triton_cnn.conv2d.default) == "triton_cnn"
    for target in (torch.add, operator.add, TF.relu, "add"):
        assert _private.namespace_of(target) is None
    assert isinstance(aten.add.Tensor, _private.OpOverload)
    assert isinstance(aten.add, _private.OpOverloadPacket)
    defaults = _private.defaults_of(aten.max_pool2d.default)
    names = ["self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"]
    assert list(defaults) == names
    assert defaults["self"] is None
    assert defaults["ceil_mode"] is False
    for name, mutable in (("relu", False), ("relu_", True), ("add", False), ("add_", True)):
        packet = getattr(aten, name)
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        assert mutable in map(_private.is_mutable, overloads)
        assert _private.is_mutable(overloads[0]) is mutable


def test_trees_and_pairs():
    tree = {"a": (1, [2.0, None]), "b": 3}
    assert _private.pytree.tree_leaves(tree) == [1, 2.0, None, 3]
    doubled = _private.pytree.tree_map_only(int, lambda i: 2 * i, tree)
    assert doubled == {"a": (2, [2.0, None]), "b": 6}
    assert [*map(_private.pair_of, (3, (1, 2), [4, 5]))] == [(3, 3), (1, 2), (4, 5)]


def test_convolutions_are_of_one_class():
    for name in ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "LazyConv2d"):
        assert issubclass(getattr(torch.nn, name), _private.Convolution)
    assert not issubclass(torch.nn.Linear, _private.Convolution)


def test_the_python_dispatcher_keeps_symbolic_sizes():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * 3)
    mode, image = FakeTensorMode(shape_env=ShapeEnv()), torch.ones(5, 3, 8, 8)
    x = mode.from_tensor(image, symbolic_context=dynamic)
    with torch.no_grad(), _private.enable_python_dispatcher():
        y = torch.ops.aten.permute.default(x, [0, 2, 3, 1])
        z = torch.ops.aten.clone.default(y, memory_format=torch.contiguous_format)
        pooled = torch.ops.aten.max_pool2d.default(x, [2, 2])
    for t in (y, z, pooled):
        assert isinstance(t.shape[0], torch.SymInt)
        assert str(t.shape[0]) == str(x.shape[0])


class Stop(Exception):
    pass


@ignoring_jit
def test_inductor_takes_modes_options_and_a_pass_over_the_joint_graph(fresh):
    Pass: Any = _private.graph_pass()
    targets: list[Any] = []

    class Last(Pass):
        def __init__(self, users: Any):
            self.users = users

        def __call__(self, graph: torch.fx.Graph) -> None:
            targets.extend(node.target for node in graph.nodes)
            raise Stop

        def uuid(self) -> str:
            return "private_test"

    users = Last(None)
    made = _private.inductor("max-autotune-no-cudagraphs", {"joint_custom_post_pass": users}, Last)
    assert made.config["max_autotune"] is True
    assert made.config["joint_custom_post_pass"].users is users
    with pytest.raises(RuntimeError, match="no_such_option"):
        _private.inductor(None, {"no_such_option": 1}, Last)

    def backend(gm: Any, inputs: Any) -> Any:
        compiler = _private.inductor(None, None, Last)
        assert compiler.config["joint_custom_post_pass"].users is None
        return compiler(gm, inputs)

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Stop"):
        torch.compile(lambda x: x.sin(), backend=backend)(torch.ones(2, requires_grad=True))
    # The gradient's cosine is in the same graph.
    assert {torch.ops.aten.sin.default, torch.ops.aten.cos.default} <= set(targets)


@ignoring_jit
def test_inductor_tells_whether_it_moves_layouts():
    from torch._inductor import config

    for on in (True, False):
        with config.patch(layout_optimization=on):
            assert _private.moves_layouts() is on


def test_inductors_pooling_keeps_bytes_that_stand_for_places():
    x, window = torch.randn(2, 3, 9, 8), ((3, 3), (2, 2), (1, 1), (1, 1), False)
    pool, places = bench_private.inductors_pooling(window, (9, 8))
    values, offsets = pool(x)
    right, indices = TF.max_pool2d(x, *window, return_indices=True)
    assert offsets.dtype.itemsize == 1
    assert torch.equal(values, right)
    assert torch.equal(places(offsets), indices)
