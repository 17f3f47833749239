"""Networks leave by torch.export, ONNX, AOTInductor and checkpoints, and come back."""

import copy
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import cnn
import cnn.functional as F
from cnn import exporting
from cnn.errors import UsageError
from cnn.models import resnet
from tests import hand_made
from tests.test_models import narrow_vgg

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of even kernels
CLOSE = {"rtol": 1e-5, "atol": 1e-5, "check_device": False, "check_stride": False}


class Layers(nn.Module):
    """Every function and layer, with what each takes that ONNX says in another way."""

    def __init__(self):
        super().__init__()
        window = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
        self.layers = nn.ModuleDict(
            {
                "same": cnn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 3), groups=2),
                "full": cnn.ConvReLU2d(4, 3, 3, (2, 1), padding="full", bias=False),
                "pooled": cnn.ConvReLUMaxPool2d(4, 5, (3, 2), padding="same", **window),
                "ceil": cnn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=True),
                "dilated": cnn.MaxPool2d((2, 3), 1, (1, 0), (3, 2)),
                "transposed": cnn.ConvTranspose2d(4, 3, 3, 2, 1, 1),
                "groups": cnn.ConvTranspose2d(4, 6, (3, 2), (3, 2), groups=2, bias=False),
                "far": cnn.ConvTranspose2d(4, 3, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 3)),
            }
        )
        self.pool = cnn.MaxPool2d(2, return_indices=True)
        self.wide = cnn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=True, return_indices=True)
        self.unpool = cnn.MaxUnpool2d(2)
        self.bytes = cnn.ConvReLU2d(4, 3, 3, padding=1)
        self.bytes.normalize = [0.02, 0.01, 0.03, 0.02], (-1.0, -2.0, 0.0, 0.5)
        self.sum = cnn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, image: Tensor) -> dict[str, Tensor]:
        found = {name: layer(x) for name, layer in self.layers.items()}
        y, indices = self.pool(x)
        found["unpooled"] = self.unpool(y, indices, x.shape[2:])
        found["wide"], found["indices"] = self.wide(x)
        found["bytes"] = self.bytes(image)
        found["sum"] = F.conv2d(
            *(x, self.sum.weight, self.sum.bias), padding=1, activation="relu", residual=x
        )
        return found


def small(name: str, **options) -> nn.Module:
    """AlexNet or ZFNet for small images, with one linear layer for three of 4096 units."""
    with torch.device("meta"):
        net = getattr(cnn.models, name)(5, image_size=16, **options)
    net.classifier = nn.Linear(256 * 9, 5)
    net.to_empty(device="cpu")
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    return net


def narrow_resnet() -> resnet.ResNet:
    """With statistics of its own in each normalization."""
    net = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), 5, width=2)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return net.eval()


ZOO = {
    "alexnet": lambda: small("alexnet"),
    "zfnet": lambda: small("zfnet", contrast=True),
    "lenet5": lambda: cnn.models.lenet5(in_channels=3, image_size=16),
    "vgg": lambda: narrow_vgg(batch_norm=True),
    "vgg_small": lambda: cnn.models.vgg_small(in_channels=3, image_size=16),
    "resnet": lambda: narrow_resnet().to(memory_format=torch.channels_last),
    "converted": lambda: cnn.convert(hand_made.SegNet()),
}


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleDict({name: build().eval() for name, build in ZOO.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: net(x) for name, net in self.nets.items()}


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """What onnxruntime makes of a file, in which the checker finds nothing."""
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    fed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, fed)]


def compare(found: Iterable[Tensor], right: dict[str, Tensor]) -> None:
    for y, (name, t) in zip(found, right.items(), strict=True):
        assert_close(y, t, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def operators(program: torch.export.ExportedProgram) -> list[str]:
    """The names of this library's, sorted."""
    names = {str(node.target) for node in program.graph.nodes}
    return sorted(name.split(".")[1] for name in names if name.startswith("triton_cnn."))


@pytest.fixture(scope="module")
def layers() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


@pytest.fixture(scope="module")
def case(layers) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs of three images, and what the layers make of them."""
    inputs = torch.randn(3, 4, 10, 11), torch.randint(0, 256, (3, 4, 5, 6)).byte()
    with torch.no_grad():
        return inputs, layers(*inputs)


BATCH = {0: torch.export.Dim("batch")}


def two_of(inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """An example for any number of images."""
    return tuple(t[:2] for t in inputs)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_finds_atens_operators_alone(strict, layers, case):
    inputs, right = case
    shapes = (BATCH, BATCH)
    with torch.no_grad():
        program = torch.export.export(layers, two_of(inputs), dynamic_shapes=shapes, strict=strict)
    assert operators(program) == []
    compare(program.module()(*inputs).values(), right)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_operators_if_asked_to(strict, layers, case, tmp_path):
    (inputs, right), shapes = case, (BATCH, BATCH)
    options = {"dynamic_shapes": shapes, "strict": strict}
    with torch.no_grad():
        exported = cnn.export(layers, two_of(inputs), kernels=True, **options)
        without = cnn.export(layers, two_of(inputs), **options)
    torch.export.save(exported, tmp_path / "layers.pt2")
    loaded = torch.export.load(tmp_path / "layers.pt2")
    kept = ["conv2d", "conv2d_bytes", "conv2d_dgrad", "conv2d_relu_max_pool2d", "max_pool2d"]
    assert operators(exported) == operators(loaded) == [*kept, "max_unpool2d"]
    assert operators(without) == []
    compare(loaded.module()(*inputs).values(), right)


def test_every_layer_in_onnx(layers, case, tmp_path):
    """By an example of one image, for any number of them."""
    path, (inputs, right) = tmp_path / "layers.onnx", case
    before = copy.deepcopy(layers.state_dict())
    cnn.export_onnx(layers, tuple(t[:1] for t in inputs), path, dynamic_batch=True)
    assert_close(layers.state_dict(), before, rtol=0, atol=0)
    compare(run(path, *inputs), right)
    compare(run(path, *(t[:1] for t in inputs)), {name: y[:1] for name, y in right.items()})
    graph = onnx.load(path).graph
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in graph.input] == ["batch"] * 2
    assert {"sum.weight", "layers.pooled.bias"} <= {weight.name for weight in graph.initializer}


def test_the_zoo_in_onnx(tmp_path):
    torch.manual_seed(0)
    zoo, x = Zoo().eval(), torch.randn(2, 3, 16, 16)
    cnn.export_onnx(zoo, x, tmp_path / "zoo.onnx")
    with torch.no_grad():  # by torch's operators, which the interpreter is slower than
        right = torch.export.export(zoo, (x,)).module()(x)
    compare(run(tmp_path / "zoo.onnx", x), right)


def test_options_and_other_axes(tmp_path):
    """Sizes that vary, by torch's dynamic_shapes; inputs by name; torch's own options."""
    layer = cnn.MaxPool2d(2).eval()
    axes = {"input": {2: torch.export.Dim("height", min=4)}}
    kwargs = {"input": torch.randn(1, 2, 6, 4)}
    path = tmp_path / "pool.onnx"
    names = {"input_names": ["x"], "output_names": ["y"], "opset_version": 18}
    made = cnn.export_onnx(layer, (), path, kwargs=kwargs, dynamic_shapes=axes, **names)
    assert made is not None
    assert [value.name for value in made.model.graph.inputs] == ["x"]
    assert onnx.load(path).opset_import[0].version == 18
    x = torch.randn(1, 2, 8, 4)
    assert_close(run(path, x)[0], layer(x), rtol=0, atol=0)


# What cannot be exported ends in one line.


def test_bad_arguments(monkeypatch):
    layer, x = cnn.Conv2d(1, 1, 1).eval(), torch.ones(1, 1, 2, 2)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got model=<built-in"):
        cnn.export_onnx(torch.relu, x)
    with pytest.raises(ValueError, match=r"eval mode, got one in training mode"):
        cnn.export_onnx(cnn.Conv2d(1, 1, 1), x)
    with pytest.raises(ValueError, match=r"dynamic_batch takes no dynamic_shapes, got \{\}"):
        cnn.export_onnx(layer, x, dynamic_batch=True, dynamic_shapes={})
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else name)
    text = r"^exporting to ONNX needs onnxscript: pip install 'triton-cnn\[export\]'$"
    with pytest.raises(UsageError, match=text):
        cnn.export_onnx(layer, x)


# AOTInductor.


# Warnings of torch's about itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.isinstance")
def test_aotinductor_packages_operators_and_atens(tmp_path, monkeypatch):
    """In one package, as compiling takes long: calls of an operator, and of torch's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    quick = {"aot_inductor.precompile_headers": False}  # they take half of the time
    torch.manual_seed(0)
    first = cnn.ConvReLU2d(1, 2, 3, padding="same")
    second = cnn.ConvReLUMaxPool2d(2, 3, 3, pool_kernel_size=2)
    batch, x = ({0: torch.export.Dim("batch")},), torch.randn(3, 1, 7, 6)
    with torch.no_grad():
        of_aten = torch.export.export(first, (x,), dynamic_shapes=batch).module()
        program = cnn.export(
            nn.Sequential(of_aten, second), (x,), kernels=True, dynamic_shapes=batch
        )
        assert operators(program) == ["conv2d_relu_max_pool2d"]
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
        )
        package = torch._inductor.aoti_load_package(path)
        for images in (x, x[:2]):
            assert_close(package(images), second(first(images)), **CLOSE)
