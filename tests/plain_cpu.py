"""On a CPU that runs no kernels the library is torch: what ``test_plain_cpu`` runs, in a process
without Triton's interpreter.
"""

import copy
import doctest
import json
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import jsonschema
import onnxruntime
import pytest
import torch
import torch.nn.functional as TF
from calls import arguments
from hand_made import MODELS
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import cnn
import cnn.functional as F
from bench import cpu
from bench.__main__ import main
from kernels import device as devices
from tests.test_export import narrow_resnet, operators
from tests.test_functional import (  # noqa: F401  these hold here, too
    REJECTED,
    table,
    test_bytes_compile_map_and_cast,
    test_compiles_once_for_all_sizes,
    test_float8,
    test_full_padding,
    test_fx_traces_through,
    test_layout_of_a_convolution,
    test_layout_of_a_pooling,
    test_meta_tensors,
    test_residual_and_activation,
    test_subclasses_of_tensor,
    test_what_torch_takes,
)
from tests.test_models import NARROW, narrow_vgg, plain_vgg

ROOT = Path(__file__).parents[1]

# What torch says of itself.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Using padding='same' with even kernel lengths",
        "There is a performance drop",  # of a transform without a rule
        "`torch.jit.*:DeprecationWarning",
        ".*should not be instantiated:DeprecationWarning",
    )
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_kernel_runs():
    assert not devices.takes_cpu()
    yield
    assert devices.launches() == {}


def operands(dtype=torch.float32) -> dict[str, Tensor]:
    """Of a pooled convolution with a residual."""
    shapes = {"x": (2, 4, 6, 7), "w": (5, 4, 3, 3), "b": (5,), "r": (2, 5, 6, 7)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Every function."""
    y = F.conv2d(x, w, b, padding=1, activation="relu", residual=r, precision="tf32")
    y, indices = F.max_pool2d(y, 2, return_indices=True)
    y = F.max_unpool2d(y, indices, 2, output_size=(6, 7))
    y = F.conv_transpose2d(y, w, padding=1)
    return F.conv2d_relu_max_pool2d(y, w, b, padding="same", pool_kernel_size=3, pool_stride=2)


def theirs(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    y = TF.conv2d(x, w, b, padding=1)
    y = TF.relu(y + r.to(y.dtype))
    y, indices = TF.max_pool2d(y, 2, return_indices=True)
    y = TF.max_unpool2d(y, indices, 2, output_size=(6, 7))
    y = TF.conv_transpose2d(y, w, padding=1)
    return TF.max_pool2d(TF.relu(TF.conv2d(y, w, b, padding="same")), 3, 2)


def same(one: object, other: object) -> None:
    """To the last bit."""
    assert_close(one, other, rtol=0, atol=0)


# Functions.


@table(REJECTED)
def test_what_torch_rejects(function, changes):
    with pytest.raises(Exception) as right:  # noqa: PT011  any that torch raises
        getattr(TF, function)(**arguments(function, changes))
    with pytest.raises(right.type) as found:
        getattr(F, function)(**arguments(function, changes))
    assert found.type is right.type


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_and_gradients_are_torchs(autocast, layout):
    found = []
    for network in (ours, theirs):
        leaves = operands()
        given = {k: t.to(memory_format=layout) if t.dim() == 4 else t for k, t in leaves.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = network(**given)
        found.append([y, *torch.autograd.grad(y.sum(), list(leaves.values()))])
        assert y.stride() == found[0][0].stride()
    same(*found)


def test_derivatives():
    tensors = tuple(operands(torch.float64).values())
    assert gradcheck(ours, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ours, tensors)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda *tensors: f(*tensors).square().sum(), (0, 1, 2, 3)),
        lambda f: torch.func.jacrev(f, 1),
        lambda f: torch.func.hessian(lambda *tensors: f(*tensors).square().sum(), 2),
        lambda f: lambda x, w, b, r: torch.vmap(f, (0, None, None, None))(x[:, None], w, b, r[:1]),
        lambda f: (
            lambda x, w, b, r: torch.vmap(f, (None, 0, None, None))(x, torch.stack([w, -w]), b, r)
        ),
        lambda f: lambda x, w, b, r: torch.vmap(f, (None, None, None, 0))(x[:1], w, b, r[:, None]),
    ],
    ids=["grad", "jacrev", "hessian", "images", "filters", "residuals"],
)
def test_transforms(transform):
    tensors = [t.detach() for t in operands(torch.float64).values()]
    assert_close(transform(ours)(*tensors), transform(theirs)(*tensors))


def test_one_image_in_place():
    """The ReLU writes over a convolution's result, which for one image is a view."""
    x, w, b, _ = operands(torch.float64).values()
    x = x[0].detach().requires_grad_()
    assert gradgradcheck(lambda *t: F.conv2d(*t, activation="relu"), (x, w, b))
    same(F.conv2d(x, w, b, activation="relu"), TF.conv2d(x, w, b).relu())


def test_a_compiled_graph_has_torchs_operators_alone():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    same(compiled(**operands()), theirs(**operands()))
    assert len(graphs) == 1
    assert "triton_cnn" not in graphs[0]
    inductor = torch.compile(ours, backend="aot_eager", fullgraph=True)
    tensors = operands()
    found = torch.autograd.grad(inductor(**tensors).sum(), list(tensors.values()))
    assert_close(found, torch.autograd.grad(theirs(**tensors).sum(), list(tensors.values())))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.called: list[Callable] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_a_torch_function_mode_sees_the_functions_of_cnn():
    tensors = {name: t.detach() for name, t in operands().items()}
    with Functions() as seen:
        ours(**tensors)
    names = "conv2d max_pool2d max_unpool2d conv_transpose2d conv2d_relu_max_pool2d"
    assert seen.called == [getattr(F, name) for name in names.split()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype):
    x = torch.arange(2 * 3 * 5 * 6, dtype=torch.uint8).view(2, 3, 5, 6)
    w = torch.randn(4, 3, 3, 3, dtype=dtype, requires_grad=True)
    scale, shift = torch.tensor([0.5, 0.25, 2.0]), -3.0
    found = F.conv2d(x, w, padding=1, normalize=(scale, shift))
    values = (x * scale[:, None, None] + shift).to(dtype)
    right = TF.conv2d(values, w, padding=1)
    same(found, right)
    same(*(torch.autograd.grad(y.square().sum(), w) for y in (found, right)))
    same(F.conv2d(x[0], w, normalize=(scale, shift)), TF.conv2d(values[0], w))


def test_keywords_in_any_order():
    call = arguments("conv2d", {"bias": (6,)})
    same(F.conv2d(**dict(reversed(call.items()))), TF.conv2d(**call))
    call = arguments("max_pool2d", {})
    same(F.max_pool2d(**dict(reversed(call.items()))), TF.max_pool2d(**call))


def test_dtypes_that_no_kernel_takes():
    x = torch.arange(32).view(1, 2, 4, 4)
    same(F.conv2d(x, x[:, :, :2, :2]), TF.conv2d(x, x[:, :, :2, :2]))
    same(F.max_pool2d(x, 2), TF.max_pool2d(x, 2))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"activation": "gelu"}, ValueError, "activation='gelu'"),
        ({"precision": "bf16"}, ValueError, "precision='bf16'"),
        ({"residual": 1.0}, TypeError, "residual=1.0"),
        ({"residual": (1, 6, 7, 9)}, ValueError, r"residual of \(1, 6, 7, 9\)"),
        ({"residual": torch.randn(2, 6, 7, 9).double()}, RuntimeError, "residual of torch.float64"),
        ({"padding": "full", "dilation": 0}, RuntimeError, "dilation=0"),
        ({"normalize": (1.0,), "input": torch.uint8}, TypeError, r"normalize=\(1.0,\)"),
        ({"normalize": (1.0, 0.0)}, RuntimeError, "input must be torch.uint8"),
        ({"scale": torch.ones(())}, RuntimeError, "input must be torch.float8_e4m3fn"),
        ({"padding": "full", "weight": None}, TypeError, "weight=None"),
    ],
    ids=str,
)
def test_errors_of_what_torch_has_not(changes, error, named):
    with pytest.raises(error, match=named):
        F.conv2d(**arguments("conv2d", changes))


def test_the_operators_refuse():
    x = torch.randn(1, 1, 4, 4)
    geometry = [1, 1], [0] * 4, [1, 1], 1, None
    calls = {
        "conv2d": (x, x, None, None, *geometry, False),
        "conv2d_wgrad": (x, x, [1, 1, 1, 1], [1, 1, 1, 1], *geometry, False),
        "channel_sum": (x,),
    }
    for name, call in calls.items():
        text = rf"^triton_cnn::{name} takes CPU tensors only under TRITON_INTERPRET=1"
        with pytest.raises(NotImplementedError, match=text):
            getattr(torch.ops.triton_cnn, name)(*call)


# Networks.


def lenet5() -> nn.Module:
    return cnn.models.lenet5(in_channels=3, image_size=16)


def vgg_small() -> nn.Module:
    return cnn.models.vgg_small(in_channels=3, image_size=16)


def events(network: nn.Module, x: Tensor) -> Counter[str]:
    """How often each operator runs in a step of training, from a state without gradients."""
    torch.manual_seed(1)
    step = cpu.training(network, x, torch.zeros(len(x), dtype=torch.int64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = (event.key for event in profile.events())
    return Counter(name for name in names if name.startswith("aten::"))


@pytest.mark.parametrize("layout", cpu.LAYOUTS.values(), ids=cpu.LAYOUTS)
@pytest.mark.parametrize("build", [lenet5, vgg_small, narrow_resnet])
def test_a_step_of_training_runs_torchs_operators_and_no_more(build, layout):
    """Of networks of ours and of converted ones: nothing is padded, and nothing more is copied."""
    networks = cpu.contenders(build().to(memory_format=layout))
    x = torch.randn(4, 3, 16, 16).to(memory_format=layout)
    found = {name: events(network, x) for name, network in networks.items()}
    assert found["ours"] == found["converted"] == found["torch"]
    assert found["torch"]["aten::convolution_backward"] > 1
    assert not {"aten::pad", "aten::constant_pad_nd"} & found["ours"].keys()
    states = [[*network.state_dict().values()] for network in networks.values()]
    same(states, [states[0]] * 3)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_network_runs_torchs_operators(kind):
    torch.manual_seed(0)
    plain, x = kind().eval(), torch.randn(2, 3, 16, 16)
    converted = cnn.convert(copy.deepcopy(plain))
    with torch.no_grad():
        with Operators() as right:
            expected = plain(x)
        with Operators() as found:
            output = converted(x)
    same(output, expected)
    assert found.names == right.names


def test_networks_in_onnx_and_by_torch_export(tmp_path):
    net, x = lenet5().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        right = net(x)
        program = torch.export.export(net, (x,))
        kept = cnn.export(net, (x,), kernels=True)
    assert operators(program) == []
    same(program.module()(x), right)
    assert operators(kept) == ["conv2d_relu_max_pool2d"]
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET"):
        kept.module()(x)
    cnn.export_onnx(net, x, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(found), right)


@pytest.mark.parametrize(
    ("build", "build_plain"),
    [
        pytest.param(
            lambda: narrow_vgg(batch_norm=True),
            lambda: plain_vgg(NARROW, True, hidden=16, num_classes=5),
            id="vgg",
        ),
        pytest.param(narrow_resnet, lambda: cpu.eager(narrow_resnet()), id="resnet"),
    ],
)
def test_checkpoints_go_to_torchs_layers_and_back(build, build_plain, tmp_path):
    """Networks of torch.nn with torchvision's names, after a step of training on either side."""
    torch.manual_seed(0)
    net, plain, x = build(), build_plain(), torch.randn(2, 3, 16, 16)
    assert not any(type(layer).__module__.startswith("cnn.layers") for layer in plain.modules())
    for trained, other in ((net, plain), (plain, net)):
        optimizer = torch.optim.SGD(trained.train().parameters(), lr=0.1)
        TF.cross_entropy(trained(x), torch.tensor([1, 3])).backward()
        optimizer.step()
        torch.save(trained.state_dict(), tmp_path / "net.pt")
        other.load_state_dict(torch.load(tmp_path / "net.pt"), strict=True)
        same(other.eval()(x), trained.eval()(x))


# The benchmark.


def test_a_ratio_is_of_one_round():
    assert cpu.typical_ratio([2.0, 9.0, 3.0], [1.0, 9.0, 2.0]) == 1.5


def test_the_benchmark(tmp_path, capsys, monkeypatch):
    """A row for each task and layout, and 1 if a ratio is over its limit."""
    file = tmp_path / "cpu.json"
    command = ["cpu", "--model", "lenet5", "--seconds", "0", "--json", str(file)]
    monkeypatch.setattr(cpu, "LIMIT", 100.0)
    monkeypatch.setattr(cpu, "LIMIT_OF_ONE", 100.0)
    assert main(command) == 0
    results = json.loads(file.read_text())
    jsonschema.validate(results, json.loads((ROOT / "bench" / "cpu.schema.json").read_text()))
    assert len(results["rows"]) == len(capsys.readouterr().out.splitlines()) - 1 == 8
    for row in results["rows"]:
        assert row["rounds"] == 11
    monkeypatch.setattr(cpu, "LIMIT", 0.0)
    assert main(command) == 1


EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "cnn").rglob("*.py")
    if any(">>> " in line and "+SKIP" not in line for line in path.read_text().splitlines())
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_docstrings_are_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "nn": nn, "cnn": cnn, "visualize": cnn.visualize}
    failed, attempted = doctest.testmod(import_module(name), extraglobs=names)
    assert (failed, attempted > 0) == (0, True)
