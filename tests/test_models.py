"""The networks: names and shapes of their parameters, their cost, and their numbers against the
same networks of torch's layers.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cnn
from cnn.models import vgg

# Parameters, and multiply-adds of an image in units of 1e9, as torchvision publishes them.
# LeNet-5's are counted by hand: 117,600 + 240,000 + 48,000 + 10,080 + 840 multiply-adds.
PUBLISHED = {
    "lenet5": (61_706, 0.00041652),
    "vgg11": (132_863_336, 7.61),
    "vgg11_bn": (132_868_840, 7.61),
    "vgg13": (133_047_848, 11.31),
    "vgg13_bn": (133_053_736, 11.31),
    "vgg16": (138_357_544, 15.47),
    "vgg16_bn": (138_365_992, 15.47),
    "vgg19": (143_667_240, 19.63),
    "vgg19_bn": (143_678_248, 19.63),
}


class Plain(nn.Module):
    """A network of torch's own layers, numbered as they come, as in torchvision."""

    def __init__(self, features: list[nn.Module], classifier: list[nn.Module]):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def plain_lenet5() -> Plain:
    relu_and_pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))  # one number, as in checkpoints
    features = [nn.Conv2d(1, 6, 5), relu_and_pool, nn.Conv2d(6, 16, 5), relu_and_pool]
    last = nn.Linear(84, 10)
    return Plain(features, [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), last])


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
    return Plain(features, classifier)


NARROW = ((3,), (4, 8))


def narrow_vgg() -> nn.Module:
    torch.manual_seed(0)
    return vgg.VGG(NARROW, 5, image_size=8, hidden=16, dropout=0, init_weights=False)


# Pairs of one network and an image size.
PLAIN = {
    "lenet5": (cnn.models.lenet5, plain_lenet5, (1, 32, 32)),
    "narrow vgg": (narrow_vgg, lambda: plain_vgg(NARROW, False, 2, 16, 5), (3, 8, 8)),
}


def on_meta(name: str) -> tuple[nn.Module, Tensor]:
    """A network without numbers, and an image for it."""
    with torch.device("meta"):
        model = cnn.models.create(name)
        return model, torch.empty(1, *((1, 32, 32) if name == "lenet5" else (3, 224, 224)))


def shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in model.state_dict().items()]


def test_list_and_create():
    assert set(cnn.models.list()) == PUBLISHED.keys()
    assert list(cnn.models.list()) == sorted(PUBLISHED)
    with pytest.raises(ValueError, match=r"no model 'vgg12'; there are .*lenet5.* vgg11,"):
        cnn.models.create("vgg12")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """FLOPs are twice the multiply-adds; what a docstring says of either is right."""
    model, x = on_meta(name)
    parameters, multiply_adds = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(x).shape == (1, 10 if name == "lenet5" else 1000)
    flops = counter.get_total_flops()
    assert flops == pytest.approx(2e9 * multiply_adds, abs=0 if name == "lenet5" else 1e7)
    builder = getattr(cnn.models, name)
    text = " ".join(f"{builder.__doc__} {type(model).__doc__}".split())
    assert f"{parameters:,} parameters" in text
    assert name.endswith("_bn") or f"{flops:,} FLOPs an image" in text


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "bn"])
@pytest.mark.parametrize(("depth", "stages"), [(11, vgg.A), (13, vgg.B), (16, vgg.D), (19, vgg.E)])
def test_vgg_checkpoints_are_torchvisions(depth, stages, batch_norm):
    assert sum(map(len, stages)) + 3 == depth
    with torch.device("meta"):
        plain = plain_vgg(stages, batch_norm)
    model, _ = on_meta(f"vgg{depth}" + "_bn" * batch_norm)
    assert shapes(model) == shapes(plain)


def test_vgg_is_fused():
    """All of it: no ReLU or pooling stands apart, and each pooling is a stage's end."""
    model, _ = on_meta("vgg16")
    pooled = [
        name for name, layer in model.features.named_children() if hasattr(layer, "pool_stride")
    ]
    kinds = {type(layer) for layer in model.features}
    assert kinds == {cnn.ConvReLU2d, cnn.ConvReLUMaxPool2d}
    assert pooled == ["2", "7", "14", "21", "28"]


@pytest.mark.parametrize("name", PLAIN)
def test_logits_gradients_and_training_are_those_of_torch(name, device):
    """Against float64; then a few steps of SGD, in which the losses are equal to rounding."""
    build, build_plain, image = PLAIN[name]
    torch.manual_seed(0)
    model, plain = build().to(device), build_plain()
    plain.load_state_dict(model.state_dict())
    exact = build_plain().double()
    exact.load_state_dict(model.state_dict())
    x, labels = torch.randn(4, *image), torch.tensor([1, 3, 4, 0])
    logits, expected = model(x.to(device)), exact(x.double())
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    nn.functional.cross_entropy(logits, labels.to(device)).backward()
    nn.functional.cross_entropy(expected, labels).backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-5)

    losses = []
    for trained, place in ((model, device), (plain, "cpu")):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(trained(x.to(place)), labels.to(place))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
    assert losses[3] < losses[0]


def test_lenet5_state_dict_names():
    """Checkpoints stay readable: the names do not change."""
    convolutions = ["features.0", "features.2"]
    linears = ["classifier.0", "classifier.2", "classifier.4"]
    names = [f"{layer}.{p}" for layer in convolutions + linears for p in ("weight", "bias")]
    assert list(cnn.models.lenet5().state_dict()) == names


@pytest.mark.parametrize("build", [cnn.models.lenet5, narrow_vgg])
def test_one_image_without_a_batch(build, device):
    model = build().to(device)
    x = torch.randn(1, 32, 32) if build is cnn.models.lenet5 else torch.randn(3, 8, 8)
    x = x.to(device)
    torch.testing.assert_close(model(x), model(x[None])[0])


@pytest.mark.parametrize(("num_classes", "in_channels"), [(3, 1), (100, 3)])
def test_classes_and_channels(device, num_classes, in_channels):
    model = cnn.models.lenet5(num_classes, in_channels).to(device)
    assert model(torch.zeros(2, in_channels, 32, 32, device=device)).shape == (2, num_classes)


def test_another_image_size_raises(device):
    model = cnn.models.lenet5().to(device)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(1, 1, 28, 28, device=device))
