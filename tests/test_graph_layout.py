"""Networks in NCHW through ``backend="triton_cnn"``: their convolutions run in channels_last, each
operand is copied once, and nothing of it can be seen from outside.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from conftest import GPU
from functorch.compile import nop
from rewritten import run
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor import config
from torch._inductor.utils import get_first_incompatible_cudagraph_node, run_and_get_code
from torch.fx import Graph, GraphModule

from cnn.compile_backend import compile_report, fuse, triton_cnn
from cnn.graphs.layout import ChannelsLast

_ops = torch.ops.triton_cnn


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    triton_cnn.reset()
    yield
    torch._dynamo.reset()


def moving(graphs: list[Graph]) -> Callable[..., Any]:
    """A backend that moves the joint graph, and computes the rest as it is."""

    def partition(joint: GraphModule, inputs: Any, **options: Any) -> Any:
        ChannelsLast()(joint.graph)
        joint.graph.lint()
        joint.recompile()
        graphs.append(joint.graph)
        return default_partition(joint, inputs, **options)

    def infer(gm: GraphModule, inputs: Any) -> Any:
        ChannelsLast()(gm.graph)
        gm.recompile()
        graphs.append(gm.graph)
        return nop(gm, inputs)

    compiler = aot_autograd(
        fw_compiler=nop,
        bw_compiler=nop,
        inference_compiler=infer,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return lambda gm, inputs: compiler(fuse(gm), inputs)


def moved(function: Callable[..., Any], wanted: str = "xvw", **inputs: Tensor) -> Graph:
    """The joint graph, after it was found to give what eager mode gives, in the same strides."""
    wanted = "".join(name for name in wanted if name in inputs)
    expected = run(function, wanted, **inputs)
    graphs: list[Graph] = []
    got = run(torch.compile(function, backend=moving(graphs), fullgraph=True), wanted, **inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)
        assert got[name].stride() == value.stride(), name
    (graph,) = graphs
    return graph


def copies(graph: Graph) -> int:
    return sum(node.target is torch.ops.aten.clone.default for node in graph.nodes)


def images(graph: Graph) -> list[bool]:
    """Whether each image that an operator reads or makes is in channels_last."""
    return [
        t.is_contiguous(memory_format=torch.channels_last)
        for node in graph.nodes
        if "triton_cnn" in str(node.target)
        for t in (*(operand.meta["val"] for operand in node.all_input_nodes), node.meta["val"])
        if isinstance(t, Tensor) and t.dim() == 4
    ]


def operands(device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 8, 8), "v": (4, 3, 3, 3), "w": (6, 4, 3, 3)}
    return {n: torch.randn(s, dtype=torch.float64).to(device) for n, s in shapes.items()}


def chain(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Two convolutions with a normalization and a sum between, and a pooling."""
    y = TF.relu(TF.conv2d(x, v, padding=1))
    y = y + TF.batch_norm(y, None, None, training=True)
    return TF.max_pool2d(TF.relu(TF.conv2d(y, w, padding=1)), 2)


def test_operands_are_copied_once_and_what_lies_between_stays(device):
    graph = moved(lambda x, v, w: chain(x, v, w).flatten(1), **operands(device))
    assert all(images(graph))
    # Both weights and the image; the map that is flattened and its gradient; the image's gradient.
    assert copies(graph) == 6


def test_nothing_in_a_step_prevents_cuda_graphs(device):
    graph = moved(chain, **operands(device))
    assert get_first_incompatible_cudagraph_node(GraphModule({}, graph)) is None


def test_channels_last_operands_are_not_copied(device):
    inputs = {n: t.to(memory_format=torch.channels_last) for n, t in operands(device).items()}
    graph = moved(chain, **inputs)
    assert all(images(graph))
    assert copies(graph) == 0


def test_results_lie_as_in_eager_mode(device):
    def function(x, v, w):
        y = chain(x, v, w)
        return y, y.permute(0, 3, 1, 2), y[:, 1:], y.sum(1), y.mean((2, 3), keepdim=True)

    moved(function, **operands(device))


def as_strided(x, v, w):
    return torch.as_strided(chain(x, v, w) * 2, (4, 5), (7, 2), 3)


def viewed(x, v, w):
    return chain(x, v, w).view(-1).view(4, -1) * 2


def handed_to_another_library(x, v, w):
    return torch.ops.test_graph_layout.first_half(chain(x, v, w)) * 2


@torch.library.custom_op("test_graph_layout::first_half", mutates_args=())
def first_half(x: Tensor) -> Tensor:
    """The elements as they lie in memory, which no operator should go by."""
    return x.detach().as_strided((x.numel() // 2,), (1,)).clone()


@first_half.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // 2)


first_half.register_autograd(
    lambda ctx, dy: torch.cat([dy, torch.zeros_like(dy)]).view(ctx.shape),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "shape", inputs[0].shape),
)


@pytest.mark.parametrize("function", [as_strided, viewed, handed_to_another_library])
def test_what_goes_by_strides_finds_them_as_they_were(function, device):
    assert any(images(moved(function, **operands(device))))


def test_an_input_that_inference_changes_is_changed(device):
    def function(x, v, w):
        y = TF.conv2d(x, v[:3], padding=1).relu()
        x.copy_(y)
        return y.sum(1)

    assert all(images(moved(function, "", **operands(device))))


def test_a_pooling_without_a_convolution_is_not_moved(device):
    graph = moved(lambda x: TF.max_pool2d(x, 3, 1, 1), x=operands(device)["x"])
    assert not any(images(graph))
    assert copies(graph) == 0


def test_a_pooling_beside_a_convolution_is_not_moved(device):
    graph = moved(lambda x, v: (TF.max_pool2d(x, 3, 1, 1), TF.conv2d(x, v)), **_two(device))
    (pool,) = (node for node in graph.nodes if node.target is _ops.max_pool2d.default)
    assert pool.all_input_nodes[0].op == "placeholder"


def test_a_transposed_convolution_is(device):
    graph = moved(lambda x, v: TF.conv_transpose2d(x, v[:3], stride=2).relu(), **_two(device))
    assert all(images(graph))


def _two(device: torch.device) -> dict[str, Tensor]:
    return {name: t for name, t in operands(device).items() if name != "w"}


def test_inductors_option_turns_it_off(device):
    with config.patch(layout_optimization=False):
        graph = moved(chain, **operands(device))
    assert copies(graph) == 0
    assert not all(images(graph))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = TF.relu(self.first(x))
        return self.last(TF.max_pool2d(TF.relu(self.second(y)), 2).flatten(1))


@pytest.mark.skipif(GPU, reason="it counts the kernels that Inductor writes for a CPU")
# Importing Inductor warns of one part of torch that another part still uses.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inductor_copies_nothing_between_the_operators(layout):
    """Inductor's kernels copy the map that is flattened, and in backward its gradient, and sum the
    last layer's bias; of a network in NCHW they also move the first operands and a weight.
    """
    torch.manual_seed(0)
    network = Network().to(memory_format=layout)
    x = torch.randn(2, 3, 8, 8).to(memory_format=layout)

    def step() -> Tensor:
        y = torch.compile(network, backend=triton_cnn)(x)
        y.sum().backward()
        return y

    y, (forward, backward) = run_and_get_code(step)
    torch.testing.assert_close(y, network(x))
    assert [p.grad.stride() for p in network.parameters()] == [
        p.stride() for p in network.parameters()
    ]
    moves = 2 if layout == torch.contiguous_format else 0
    assert len(re.findall(r"^ +cpp_fused\w*\(", forward, re.MULTILINE)) == moves + 1
    assert len(re.findall(r"^ +cpp_fused\w*\(", backward, re.MULTILINE)) == 2
    assert compile_report().counts == {"conv2d + relu": 1, "conv2d + relu + max_pool2d": 1}
