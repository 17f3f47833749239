"""What is left of a network without a layer."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cnn.visualize import ablation

IMAGES = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 3]])
LABELS = torch.tensor([1, 0, 1, 1])


def swap() -> nn.Module:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[0.0, 1], [1, 0]]))
    return nn.Sequential(layer)


BATCHES = {
    "one": [(IMAGES, LABELS)],
    "unequal": [(IMAGES[:1], LABELS[:1]), (IMAGES[1:], LABELS[1:])],
    "uncounted": [(IMAGES, LABELS), (IMAGES, torch.full((4,), -100))],
    "loader": DataLoader(TensorDataset(IMAGES, LABELS), 3),
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    ("how", "accuracy", "losses"),
    [
        ("zero", 0.25, [math.log(2)] * 4),
        # Of the swapped pixels the means are 1 and 1/2.
        ("mean", 0.25, [math.log1p(math.exp(d)) for d in (0.5, -0.5, 0.5, 0.5)]),
    ],
)
def test_by_hand(batches, how, accuracy, losses):
    """The network swaps two pixels. It is right but for the last image, by three."""
    found = ablation(swap(), batches, ["0"], how)
    (removal,) = found.removals
    whole = [math.log1p(math.exp(-1))] * 3 + [math.log1p(math.exp(3))]
    assert (found.images, found.whole.accuracy) == (4, 0.75)
    assert found.whole.loss == pytest.approx(sum(whole) / 4)
    assert removal.score == pytest.approx((accuracy, sum(losses) / 4))
    assert (removal.layers, removal.parameters) == (("0",), 4)


class Constant(nn.Module):
    """Gives the same for each of a layer's maps."""

    def __init__(self, layer: nn.Module, levels: Tensor):
        super().__init__()
        self.layer, self.levels = layer, levels

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.levels.view(-1, *[1] * (y.dim() - 2)).expand_as(y).clone()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    rest = (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 4))
    return nn.Sequential(*layers, *rest).double()


def pictures(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(10, 2, 6, 6, generator=generator, dtype=torch.float64).to(device)
    labels = torch.randint(4, (10,), generator=generator).to(device)
    return [(draw[:7], labels[:7]), (draw[7:], labels[7:])]


def score(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Worked out at once."""
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model(x)
    right = (logits.argmax(1) == labels).double().mean().item()
    return right, nn.functional.cross_entropy(logits, labels).item()


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_as_a_network_whose_layers_are_constant(how, device):
    batches = pictures(device)
    model = network().to(device)
    x = torch.cat([images for images, _ in batches])
    changed = []
    for names in (["0"], ["3"], ["6"], ["0", "3"]):
        other = copy.deepcopy(model)
        for name in names:
            with torch.no_grad():
                y = model[: int(name) + 1](x)
            mean = y.transpose(0, 1).flatten(1).mean(1)
            other[int(name)] = Constant(other[int(name)], mean if how == "mean" else 0 * mean)
        changed.append(score(other, batches))
    found = ablation(model, batches, ["0", "3", "6", ("0", "3")], how)
    assert found.whole == pytest.approx(score(model, batches))
    assert [removal.score for removal in found.removals] == [pytest.approx(s) for s in changed]
    assert [removal.parameters for removal in found.removals] == [57, 84, 112, 141]
    assert ablation(model, batches, how=how).removals == found.removals[:3]


def test_the_table():
    batches = [(IMAGES, LABELS)]
    assert str(ablation(swap(), batches, ["0"], "zero")) == (
        "without  parameters   error   change    loss\n"
        "-                 0  25.00%           0.9971\n"
        "0                 4  75.00%  +50.00%  0.6931"
    )


def test_the_figure():
    batches = pictures(torch.device("cpu"))
    found = ablation(network(), batches, ["0", ("3", "6")])
    figure = found.figure()
    figure.canvas.draw()
    one, other = figure.get_axes()
    assert [text.get_text() for text in one.get_yticklabels()] == ["0", "3 + 6"]
    errors, losses = ([bar.get_width() for bar in axes.patches] for axes in (one, other))
    assert errors == pytest.approx([100 - 100 * r.score.accuracy for r in found.removals])
    assert losses == pytest.approx([r.score.loss for r in found.removals])
    assert other.lines[0].get_xdata()[0] == found.whole.loss
    ablation(network(), batches, []).figure().canvas.draw()


class Tuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.unused = nn.MaxPool2d(2, return_indices=True), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)[0].flatten(1)


@pytest.mark.parametrize(
    ("model", "call", "words"),
    [
        (swap(), {"how": "median"}, "how must be one of mean, zero, got how='median'"),
        (swap(), {"layers": ["1"]}, "layer must be one of 0, got layer='1'"),
        (swap(), {"batches": []}, "batches must be a list or a DataLoader"),
        (swap(), {"batches": iter(BATCHES["one"])}, "got a list_iterator"),
        (swap(), {"batches": [(IMAGES, LABELS + 1)]}, "of the 2 classes .* got labels=2"),
        (swap(), {"batches": [(IMAGES, torch.full((4,), -100))]}, "images with labels"),
        (swap(), {"batches": [(IMAGES[:, None], LABELS)]}, r"logits .* got \[4, 1, 2\]"),
        (Tuples(), {"layers": ["pool"]}, "give a tensor, got layer='pool'"),
        (Tuples(), {"layers": ["unused"]}, "must be called and give a tensor, got layer='unused'"),
    ],
)
def test_bad_arguments(model, call, words):
    batches = [(torch.rand(2, 1, 2, 4), torch.tensor([0, 1]))]
    default = {"batches": batches if isinstance(model, Tuples) else BATCHES["one"]}
    with pytest.raises(ValueError, match=words):
        ablation(model, **default | call)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_logits_may_be_in_a_tuple_or_a_dict():
    class Both(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return {"logits": y, "features": (x, y)}

    plain = ablation(swap(), BATCHES["one"])
    assert ablation(Both(*swap()), BATCHES["one"]) == plain


def test_nothing_is_changed():
    model = nn.Sequential(*network(), nn.Dropout(), nn.BatchNorm1d(4).double())
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    one, two = (ablation(model, pictures(torch.device("cpu"))) for _ in range(2))
    assert one == two
    assert [layer.training for layer in model] == [False] + [True] * 8
    assert not any(layer._forward_hooks for layer in model)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_layers_within_each_other_and_views_of_the_images():
    images = IMAGES.clone()
    model = nn.Sequential(nn.Flatten(), nn.Sequential(swap()))
    found = ablation(model, [(images, LABELS)], ["0", ("1", "1.0.0")], "zero")
    assert [removal.parameters for removal in found.removals] == [0, 4]
    assert images.equal(IMAGES)
