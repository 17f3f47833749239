"""Networks of torchvision and of timm, if those are installed, through the backend "triton_cnn".

The rewritten graph goes through AOTAutograd and no further; images are small, for the interpreter.
"""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any

import pytest
import torch
from rewritten import rewritten
from torch import Tensor, nn

from cnn.compile_backend import compile_report

pytestmark = pytest.mark.slow

FUSED = {
    "alexnet": {"conv2d + relu": 2, "conv2d + relu + max_pool2d": 3},
    "vgg16": {"conv2d + relu": 8, "conv2d + relu + max_pool2d": 5},
    "squeezenet1_0": {"conv2d + relu": 26, "max_pool2d": 3},
    "squeezenet1_1": {"conv2d + relu": 26, "max_pool2d": 3},
}
"""What becomes of the convolutions and poolings of networks without BatchNorm: all are fused."""

TORCHVISION = (
    *FUSED,
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("efficientnet_b0", "regnet_y_400mf", "densenet121", "inception_v3", "convnext_tiny"),
    "segmentation.deeplabv3_resnet50",
)
TIMM = (
    *("resnet18", "convnext_atto", "mobilenetv3_small_050", "regnety_002", "efficientnet_lite0"),
    *("densenet121", "repvgg_a0", "hrnet_w18_small"),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "segmentation.deeplabv3_resnet50": {"weights_backbone": None},
}


def torchvision(name: str) -> nn.Module:
    package = pytest.importorskip("torchvision")
    family, _, builder = name.rpartition(".")
    zoo = import_module(f"torchvision.models.{family}") if family else package.models
    return getattr(zoo, builder)(**OPTIONS.get(name, {}))


def timm(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name)


def without_chance(model: nn.Module) -> nn.Module:
    """The model in float64, with no layer that draws numbers."""
    for layer in model.modules():
        for name in ("p", "drop_prob"):
            if isinstance(vars(layer).get(name), float):
                setattr(layer, name, 0.0)
    return model.double()


def step(network: Callable[..., Any], model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The result of ``network``, the gradients that it leaves in ``model``, and the buffers."""
    images = images.clone().requires_grad_()
    y = network(images)
    y = y["out"] if isinstance(y, dict) else y
    y.square().mean().backward()
    leaves = {"images": images, **dict(model.named_parameters())}
    gradients = {f"gradient of {name}": t.grad for name, t in leaves.items() if t.grad is not None}
    return {"y": y.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("zoo", "name"),
    [*((torchvision, name) for name in TORCHVISION), *((timm, name) for name in TIMM)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_network_is_compiled_and_agrees_with_eager_mode(
    zoo: Callable[[str], nn.Module], name: str, training: bool
):
    torch.compiler.reset()
    model = without_chance(zoo(name)).train(training)
    twin = deepcopy(model)
    side = 80 if name == "inception_v3" else 64
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    wanted = step(model, model, images)
    found = step(torch.compile(twin, backend=rewritten), twin, images)
    became = Counter(row.became for row in compile_report().rows)
    if zoo is torchvision and name in FUSED:
        assert became == FUSED[name]
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    assert sum(n for what, n in became.items() if what.startswith("conv2d")) == convolutions
    assert found.keys() == wanted.keys()
    # Before a normalization, and in a layer that nothing reads, gradients are 0 but for rounding.
    largest = max(float(t.norm()) for key, t in wanted.items() if key.startswith("gradient"))
    for key, value in wanted.items():
        value = value.double()  # counts of batches are integers
        error = float((found[key] - value).norm())
        assert error <= 1e-7 * float(value.norm()) + 1e-12 * max(largest, 1.0), key
