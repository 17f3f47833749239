"""The table of a network's layers: fields against the pixels that do reach a result, and costs."""

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import cnn
from cnn.models import resnet

H, W = 18, 24


def test_the_table():
    text = str(cnn.summary(cnn.models.lenet5(), (2, 1, 32, 32)))
    assert text == (
        "layer         kind                  output  field  parameters      FLOPs\n"
        "features.0    ConvReLUMaxPool2d  2x6x14x14    6x6         156    470,400\n"
        "features.2    ConvReLUMaxPool2d   2x16x5x5  16x16       2,416    960,000\n"
        "classifier.0  Linear                 2x120      -      48,120    192,000\n"
        "classifier.1  ReLU                   2x120      -           0          0\n"
        "classifier.2  Linear                  2x84      -      10,164     40,320\n"
        "classifier.3  ReLU                    2x84      -           0          0\n"
        "classifier.4  Linear                  2x10      -         850      3,360\n"
        "total                                                  61,706  1,666,080"
    )


# Receptive fields.


def chain() -> nn.Module:
    """A window of every kind, one after another."""
    return nn.Sequential(
        *(nn.Conv2d(1, 2, (3, 2), padding=(0, 1)), nn.AvgPool2d((1, 2), 1), nn.ReLU()),
        *(cnn.Conv2d(2, 2, 2, padding="same"), cnn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(2)),
        cnn.ConvReLUMaxPool2d(2, 2, (1, 3), dilation=2, padding=(0, 1), pool_kernel_size=2),
        *(nn.MaxPool2d((1, 2), padding=(0, 1)), nn.AdaptiveAvgPool2d((4, 1))),
    )


def residual() -> nn.Module:
    return nn.Sequential(resnet.BasicBlock(1, 2, 2), resnet.BasicBlock(2, 2))


class Branches(nn.Module):
    """Two branches, each of which sees what the other does not, as functions and modules."""

    def __init__(self):
        super().__init__()
        self.tall = cnn.Conv2d(1, 2, (5, 1), padding="same")
        self.wide = nn.Conv2d(1, 2, (1, 3))
        self.last = nn.Conv2d(4, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        tall = TF.max_pool2d(self.tall(x), (1, 3), 1)
        return self.last(torch.cat([tall, self.wide(x).relu()], 1)[:, [0, 1, 3, 2]])


def reached(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """For each layer which pixels reach which of its results, [H, W, P, Q]: of as many images as
    an image has pixels, each holds a NaN in another. In float64, which torch convolves in the same
    way on all processors.
    """
    x = torch.randn(H * W, 1, H, W, dtype=torch.float64)
    x.view(H * W, H * W).fill_diagonal_(torch.nan)
    found = {}

    def keep(name: str, y: Tensor) -> None:
        found[name] = y.isnan().any(1).cpu().unflatten(0, (H, W))

    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, x, y, name=name: keep(name, y))
    with torch.no_grad():
        model.eval().to(device, x.dtype)(x.to(device))
    return found


@pytest.mark.parametrize("build", [chain, residual, Branches])
def test_fields_hold_just_the_pixels_that_reach_a_result(build, device):
    torch.manual_seed(0)
    model = build()
    layers = cnn.summary(model, (1, 1, H, W)).layers
    pixels = reached(model, device)
    for layer in layers:
        assert layer.field is not None
        assert layer.output_size[-2:] == pixels[layer.name].shape[-2:]
        rows, columns = (pixels[layer.name].any(axes) for axes in ((1, 3), (0, 2)))
        exact = 0
        for axis, seen in enumerate((rows, columns)):
            for place in range(seen.shape[1]):
                first = layer.field.offset[axis] + place * layer.field.stride[axis]
                last = first + layer.field.size[axis] - 1
                within = seen[:, place].nonzero().flatten().tolist()
                if first >= 0 and last < seen.shape[0]:
                    assert (within[0], within[-1]) == (first, last)
                    exact += 1
                else:
                    assert first <= within[0]
                    assert within[-1] <= last
        assert exact, layer


def test_a_gate_of_the_whole_map_sees_all():
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean((2, 3), keepdim=True).sigmoid()

    rows = cnn.summary(nn.Sequential(nn.Conv2d(1, 2, 3, 2), Gate()), (1, 1, 11, 9)).layers
    assert [row.field for row in rows] == [((3, 3), (2, 2), (0, 0)), ((11, 9), (2, 2), (0, 0))]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(9, 9),
        nn.Flatten(),
        nn.Upsample(scale_factor=2),
        nn.ReflectionPad2d(1),
        nn.ConvTranspose2d(2, 2, 3, padding=1),
        cnn.ConvTranspose2d(2, 2, 2, 2),
    ],
    ids=str,
)
def test_fields_are_not_made_up(layer):
    """Not behind layers that see everything or move pixels in other ways."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(), layer, nn.ReLU())
    fields = [row.field and row.field.size for row in cnn.summary(net, (1, 1, 11, 11)).layers]
    assert fields == [(3, 3), (3, 3), None, None]


# Costs.


class Odd(nn.Module):
    """A layer that is called twice, weights in parts, two that share theirs, a tuple, a function
    with products of its own.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.twice = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.parts = weight_norm(cnn.Conv2d(2, 2, 1, bias=False))
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pool(self.parts(self.twice(self.twice(self.norm(x)))))
        return self.other(self.one(x)) @ x


@pytest.mark.parametrize("fails", [False, True])
def test_any_network(fails):
    """Costs are counted once and in full; the network is left as it was, even by a failure."""
    model = Odd().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            cnn.summary(model, (1, 3, 8, 8))
    else:
        found = cnn.summary(model, (1, 2, 8, 8))
        assert [(row.name, row.kind, row.parameters, row.flops) for row in found.layers] == [
            ("norm", "BatchNorm2d", 4, 0),
            ("twice", "Conv2d", 36, 2 * 64 * 36),
            ("twice", "Conv2d", 0, 2 * 64 * 36),
            ("parts", "ParametrizedConv2d", 6, 2 * 64 * 4),
            ("pool", "MaxPool2d", 0, 0),
            ("one", "Linear", 20, 2 * 8 * 16),
            ("other", "Linear", 4, 2 * 8 * 16),
        ]
        assert found.parameters == sum(row.parameters for row in found.layers)
        assert found.flops == sum(row.flops for row in found.layers) + 2 * 2 * 4**3
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_the_input_has_a_dtype():
    (row,) = cnn.summary(nn.Embedding(5, 3), (2, 7), torch.int64).layers
    assert (row.output_size, row.parameters) == ((2, 7, 3), 15)


def test_totals_are_the_models():
    with torch.device("meta"):
        model = cnn.models.resnet50()
    found = cnn.summary(model, (1, 3, 224, 224))
    assert found.parameters == sum(row.parameters for row in found.layers) == 25_557_032
    assert found.flops == sum(row.flops for row in found.layers) == 8_178_368_512
    fields = {row.name: row.field and row.field.size[0] for row in found.layers}
    assert (fields["maxpool"], fields["layer4.2.relu3"], fields["fc"]) == (11, 427, None)
