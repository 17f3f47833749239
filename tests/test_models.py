"""The networks: names and shapes of their parameters, their cost, and their numbers against the
same networks of torch's layers.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import cnn
from bench.train import eager
from cnn.models import resnet, vgg

# Parameters, and multiply-adds of an image in units of 1e9, as torchvision publishes them. Counted
# by hand: LeNet-5's, 117,600 + 240,000 + 48,000 + 10,080 + 840 multiply-adds, and ZFNet's, in
# millions 170.8 + 415.3 + 149.5 + 224.3 + 149.5 + 37.7 + 16.8 + 4.1.
PUBLISHED = {
    "alexnet": (61_100_840, 0.714),
    "lenet5": (61_706, 0.00041652),
    "resnet101": (44_549_160, 7.801),
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "vgg11": (132_863_336, 7.609),
    "vgg11_bn": (132_868_840, 7.609),
    "vgg13": (133_047_848, 11.308),
    "vgg13_bn": (133_053_736, 11.308),
    "vgg16": (138_357_544, 15.470),
    "vgg16_bn": (138_365_992, 15.470),
    "vgg19": (143_667_240, 19.632),
    "vgg19_bn": (143_678_248, 19.632),
    "vgg_small": (767_370, 0.019696128),
    "zfnet": (62_357_608, 1.168),
}
SMALL = ("lenet5", "vgg_small")  # made for ten classes of 1x32x32 pixels


class Plain(nn.Module):
    """A network of torch's own layers, numbered as they come, as in torchvision."""

    def __init__(self, features: list[nn.Module], classifier: list[nn.Module], side: int):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def plain_lenet5() -> Plain:
    relu_and_pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))  # one number, as in checkpoints
    features = [nn.Conv2d(1, 6, 5), relu_and_pool, nn.Conv2d(6, 16, 5), relu_and_pool]
    hidden = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return Plain(features, [*hidden, nn.Linear(84, 10)], 5)


def after_alexnet(first: list[nn.Module], width: int, num_classes: int, side: int) -> Plain:
    """The layers that AlexNet and ZFNet share, after their first two convolutions."""
    last = [nn.Conv2d(width, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)]
    middle = [nn.Conv2d(384, width, 3, padding=1), nn.ReLU()]
    classifier = [
        *(nn.Dropout(), nn.Linear(256 * side * side, 4096), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, num_classes),
    ]
    return Plain([*first, *middle, *last], classifier, side)


def plain_alexnet(num_classes: int = 1000, small: bool = False) -> Plain:
    first = [
        *(nn.Conv2d(3, 64, 11, *((1, 5) if small else (4, 2))), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
    ]
    return after_alexnet(first, 256, num_classes, 3 if small else 6)


def plain_zfnet(num_classes: int = 1000, small: bool = False) -> Plain:
    first = [
        *(nn.Conv2d(3, 96, 7, *((1, 3) if small else (2, 1))), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(96, 256, 5, *((1, 2) if small else (2, 0))), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
    ]
    return after_alexnet(first, 384, num_classes, 3 if small else 6)


def plain_vgg(stages, batch_norm=False, side=7, hidden=4096, num_classes=1000) -> Plain:
    features, channels = [], 3
    for stage in stages:
        for width in stage:
            features.append(nn.Conv2d(channels, width, 3, padding=1))
            features += [nn.BatchNorm2d(width)] * batch_norm + [nn.ReLU()]
            channels = width
        features.append(nn.MaxPool2d(2))
    classifier = [
        *(nn.Linear(channels * side * side, hidden), nn.ReLU(), nn.Dropout(0)),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0)),
        nn.Linear(hidden, num_classes),
    ]
    return Plain(features, classifier, side)


NARROW = ((3,), (4, 8))


def narrow_vgg(**options) -> vgg.VGG:
    return vgg.VGG(NARROW, 5, hidden=16, dropout=0, init_weights=False, **options)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without numbers."""
    with torch.device("meta"):
        return build()


def shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in model.state_dict().items()]


def test_list_and_create():
    assert cnn.models.list() == list(PUBLISHED)
    options = {"num_classes": 3, "in_channels": 1, "image_size": 32}
    for name in PUBLISHED:
        model = on_meta(lambda name=name: cnn.models.create(name, **options))
        assert model(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 3)
    with pytest.raises(ValueError, match=r"one of alexnet, lenet5, .*, got name='vgg12'"):
        cnn.models.create("vgg12")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """FLOPs are twice the multiply-adds; what the docstrings say of both is right."""
    builder = getattr(cnn.models, name)
    model = on_meta(builder)
    parameters, multiply_adds = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.empty(1, *((1, 32, 32) if name in SMALL else (3, 224, 224)), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(x).shape == (1, 10 if name in SMALL else 1000)
    flops = counter.get_total_flops()
    assert flops == pytest.approx(2e9 * multiply_adds, abs=1 if name in SMALL else 1e6)
    text = " ".join(f"{builder.__doc__} {type(model).__doc__}".split())
    assert f"{parameters:,} parameters" in text
    assert name.endswith("_bn") or f"{flops:,} FLOPs per image" in text


@pytest.mark.parametrize(
    ("name", "least"), [("alexnet", 15), ("lenet5", 16), ("vgg11", 32), ("zfnet", 9)]
)
def test_the_least_image_size(name, least):
    def run(size: int) -> Tensor:
        model = on_meta(lambda: cnn.models.create(name, in_channels=1, image_size=least))
        return model(torch.empty(2, 1, size, size, device="meta"))

    assert run(least).shape[0] == 2
    with pytest.raises(RuntimeError, match=r"too small|shapes cannot be multiplied"):
        run(least - 1)


# Names and shapes of parameters.


def test_lenet5_state_dict_names():
    """Checkpoints stay readable: the names do not change."""
    convolutions = ["features.0", "features.2"]
    linears = ["classifier.0", "classifier.2", "classifier.4"]
    names = [f"{layer}.{p}" for layer in convolutions + linears for p in ("weight", "bias")]
    assert list(cnn.models.lenet5().state_dict()) == names


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "bn"])
@pytest.mark.parametrize(("depth", "stages"), [(11, vgg.A), (13, vgg.B), (16, vgg.D), (19, vgg.E)])
def test_vgg_checkpoints_are_torchvisions(depth, stages, batch_norm):
    assert sum(map(len, stages)) + 3 == depth
    model = on_meta(getattr(cnn.models, f"vgg{depth}" + "_bn" * batch_norm))
    assert shapes(model) == shapes(on_meta(lambda: plain_vgg(stages, batch_norm)))


@pytest.mark.parametrize(
    ("name", "block", "counts"),
    [
        ("resnet18", (3, 3), (2, 2, 2, 2)),
        ("resnet34", (3, 3), (3, 4, 6, 3)),
        ("resnet50", (1, 3, 1), (3, 4, 6, 3)),
        ("resnet101", (1, 3, 1), (3, 4, 23, 3)),
    ],
)
def test_resnet_checkpoints_are_torchvisions(name, block, counts):
    """By rule: ``block`` is the kernel sizes of a block's convolutions."""
    expected = []

    def layer(convolution: str, norm: str, *shape: int) -> None:
        expected.append((f"{convolution}.weight", shape))
        for part in ("weight", "bias", "running_mean", "running_var"):
            expected.append((f"{norm}.{part}", shape[:1]))
        expected.append((f"{norm}.num_batches_tracked", ()))

    layer("conv1", "bn1", 64, 3, 7, 7)
    channels = 64
    for stage, count in enumerate(counts, start=1):
        width = 64 << (stage - 1)
        out = width * (4 if len(block) == 3 else 1)
        for place in range(count):
            prefix, inner = f"layer{stage}.{place}", channels
            for number, kernel in enumerate(block, start=1):
                filters = out if number == len(block) else width
                layer(
                    f"{prefix}.conv{number}", f"{prefix}.bn{number}", filters, inner, *[kernel] * 2
                )
                inner = filters
            if place == 0 and channels != out:
                layer(f"{prefix}.downsample.0", f"{prefix}.downsample.1", out, channels, 1, 1)
            channels = out
    expected += [("fc.weight", (1000, channels)), ("fc.bias", (1000,))]
    assert shapes(on_meta(getattr(cnn.models, name))) == expected


# Numbers.


@pytest.mark.parametrize(
    ("build", "build_plain", "image"),
    [
        pytest.param(cnn.models.lenet5, plain_lenet5, (1, 32, 32), id="lenet5"),
        pytest.param(
            lambda: narrow_vgg(image_size=8),
            lambda: plain_vgg(NARROW, False, 2, 16, 5),
            (3, 8, 8),
            id="vgg",
        ),
    ],
)
def test_logits_gradients_and_training_are_those_of_torch(build, build_plain, image, device):
    """Against float64; then a few steps of SGD, in which the losses are equal to rounding."""
    torch.manual_seed(0)
    model, plain = build().to(device), build_plain()
    plain.load_state_dict(model.state_dict())
    exact = build_plain().double()
    exact.load_state_dict(model.state_dict())
    x, labels = torch.randn(4, *image), torch.tensor([1, 3, 4, 0])
    logits, expected = model(x.to(device)), exact(x.double())
    assert logits.shape == expected.shape
    assert_close(logits.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    TF.cross_entropy(logits, labels.to(device)).backward()
    TF.cross_entropy(expected, labels).backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-5)

    losses = []
    for trained, place in ((model, device), (plain, "cpu")):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            loss = TF.cross_entropy(trained(x.to(place)), labels.to(place))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
    assert losses[3] < losses[0]


@pytest.mark.parametrize("small", [False, True], ids=["64", "32"])
@pytest.mark.parametrize("name", ["alexnet", "zfnet"])
def test_alexnet_and_zfnet_are_built_of_the_layers_they_say(name, small):
    """Taken apart into torch's layers; the interpreter would take long over the fused ones."""
    torch.manual_seed(0)
    side = 32 if small else 64
    model = cnn.models.create(name, num_classes=3, image_size=side).eval()
    build_plain = plain_alexnet if name == "alexnet" else plain_zfnet
    plain = on_meta(lambda: build_plain(3, small)).eval()
    assert shapes(plain) == shapes(model)
    plain.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 3, side, side)
    assert_close(eager(model)(x), plain(x))


@pytest.mark.parametrize("build", [cnn.models.vgg16, cnn.models.alexnet, cnn.models.zfnet])
def test_what_can_be_fused_is(build):
    """No ReLU or pooling stands apart among the features."""
    parts = (cnn.Conv2d, nn.MaxPool2d, nn.ReLU)
    kinds = {type(layer) for layer in on_meta(build).features if isinstance(layer, parts)}
    assert kinds == {cnn.ConvReLU2d, cnn.ConvReLUMaxPool2d}


def test_zfnet_normalizes_where_figure_3_does():
    model = on_meta(lambda: cnn.models.zfnet(contrast=True))
    seen = []
    for layer in model.features:
        layer.register_forward_hook(lambda layer, _, y: seen.append((type(layer), y.shape[-1])))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    pooled, norm = cnn.ConvReLUMaxPool2d, nn.LocalResponseNorm
    assert seen == [
        *((pooled, 55), (norm, 55), (pooled, 13), (norm, 13)),
        *((cnn.ConvReLU2d, 13), (cnn.ConvReLU2d, 13), (pooled, 6)),
    ]


def resnet_reference(state: dict[str, Tensor], x: Tensor, counts, strides, small) -> Tensor:
    """The network in training as functions of its state; ``strides`` are of a block's convolutions
    where it halves the map. Each entry of ``state`` is taken out.
    """

    def normalized(x: Tensor, convolution: str, norm: str, stride: int, relu: bool) -> Tensor:
        w, gain, bias = (state.pop(f"{convolution}.weight"), *pop(norm, "weight", "bias"))
        pop(norm, "running_mean", "running_var", "num_batches_tracked")
        y = TF.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        y = TF.batch_norm(y, None, None, gain, bias, training=True)
        return y.relu() if relu else y

    def pop(prefix: str, *names: str) -> list[Tensor]:
        return [state.pop(f"{prefix}.{name}") for name in names]

    x = normalized(x, "conv1", "bn1", 1 if small else 2, True)
    x = x if small else TF.max_pool2d(x, 3, 2, 1)
    for stage, count in enumerate(counts, start=1):
        for place in range(count):
            prefix, y = f"layer{stage}.{place}", x
            halves = stage > 1 and place == 0
            for number, stride in enumerate(strides, start=1):
                names = f"{prefix}.conv{number}", f"{prefix}.bn{number}"
                y = normalized(y, *names, stride if halves else 1, number < len(strides))
            names = f"{prefix}.downsample.0", f"{prefix}.downsample.1"
            if f"{names[0]}.weight" in state:
                x = normalized(x, *names, 2 if halves else 1, False)
            x = (x + y).relu()
    weight, bias = pop("fc", "weight", "bias")
    return TF.linear(x.mean((2, 3)), weight, bias)


@pytest.mark.parametrize(
    ("block", "strides", "counts", "small"),
    [
        (resnet.BasicBlock, (2, 1), (1, 2, 1, 1), False),
        (resnet.Bottleneck, (1, 2, 1), (2, 1, 1, 1), True),
    ],
    ids=["basic", "bottleneck"],
)
def test_resnet(block, strides, counts, small, device):
    """On torch's layers in training, by its formula, and on ours in eval mode."""
    torch.manual_seed(0)
    options = {"width": 2, "image_size": 32 if small else 64}
    model = resnet.ResNet(block, counts, 5, **options).double()
    plain = eager(model)
    x = torch.randn(3, 3, 10, 8, dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    leaves = [state[name].requires_grad_() for name, _ in model.named_parameters()]
    right = resnet_reference(state, x, counts, strides, small)
    assert not state
    y = plain(x)
    assert_close(y, right)
    dy = torch.randn_like(right)
    ours = torch.autograd.grad(y, list(plain.parameters()), dy)
    assert_close(ours, torch.autograd.grad(right, leaves, dy))

    model.load_state_dict(plain.state_dict())  # with running statistics
    model.to(device).eval()
    assert_close(model(x.to(device)).cpu(), plain.eval()(x))


@pytest.mark.parametrize(
    ("block", "last"), [(resnet.BasicBlock, "bn2"), (resnet.Bottleneck, "bn3")]
)
def test_residual_blocks_may_begin_as_their_shortcuts(block, last):
    model = resnet.ResNet(block, (1, 1, 1, 1), width=2, zero_init_residual=True)
    gains = {n: p for n, p in model.named_parameters() if "bn" in n and n.endswith("weight")}
    zero = [n for n, p in gains.items() if not p.any()]
    assert zero == [f"layer{stage}.0.{last}.weight" for stage in range(1, 5)]


@pytest.mark.parametrize("build", [cnn.models.lenet5, lambda: narrow_vgg(image_size=32)])
def test_one_image_without_a_batch(build, device):
    model = build().to(device)
    channels = next(model.parameters()).shape[1]
    x = torch.randn(channels, 32, 32, device=device)
    assert_close(model(x), model(x[None])[0])


@pytest.mark.parametrize(("num_classes", "in_channels"), [(3, 1), (100, 3)])
def test_classes_and_channels(device, num_classes, in_channels):
    model = cnn.models.lenet5(num_classes, in_channels).to(device)
    assert model(torch.zeros(2, in_channels, 32, 32, device=device)).shape == (2, num_classes)


def test_another_image_size_raises(device):
    model = cnn.models.lenet5().to(device)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(1, 1, 28, 28, device=device))
    assert cnn.models.lenet5(image_size=28)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_vgg_small(device):
    """Its logits are those of torch's layers."""
    torch.manual_seed(0)
    model = cnn.models.vgg_small(image_size=16).eval()
    x = torch.randn(2, 1, 16, 16)
    y = x
    for layer, pool in zip(model.features, (True, True, False, True), strict=True):
        y = nn.functional.conv2d(y, layer.weight, layer.bias, padding=1).relu()
        y = nn.functional.max_pool2d(y, 2) if pool else y
    expected = model.classifier(y.flatten(1))
    logits = model.to(device)(x.to(device)).cpu()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
