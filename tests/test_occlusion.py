"""Occlusion: its grid, its numbers against a loop, and that it finds what a network looks at."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import cnn
from cnn.visualize import occlusion
from cnn.visualize.occlusion import covered


def network(classes=5):
    """With what behaves otherwise in training."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    last = nn.Flatten(), nn.Dropout(), nn.Linear(4 * 3 * 4, classes)
    return nn.Sequential(*layers, *last).double()


def picture(*size):
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "stride", "lines", "columns"),
    [
        (2, 2, [0, 2, 4], [0, 2, 4, 6]),
        (3, 2, [0, 2, 4], [0, 2, 4, 6]),
        (4, 2, [-1, 1, 3], [-1, 1, 3, 5]),
        (5, 3, [-1, 2], [-1, 2, 5]),
        (1, 1, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_squares_are_centred_on_cells_and_cover_every_pixel(size, stride, lines, columns):
    model = nn.Sequential(nn.Flatten(), nn.Linear(35, 2))
    corners = occlusion(model, torch.zeros(1, 5, 7), size=size, stride=stride).corners
    assert corners[:, 0, 0].tolist() == lines
    assert corners[0, :, 1].tolist() == columns
    assert corners.tolist() == [[[line, column] for column in columns] for line in lines]
    shown = covered(torch.zeros(1, 5, 7), corners.flatten(0, 1), size, torch.ones(1))
    assert shown.amax(0).eq(1).all()


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_numbers_are_those_of_one_square_after_another(batch):
    model, x = network(), 2 * picture(2, 6, 9) - 1
    state, image = copy.deepcopy(model.state_dict()), x.clone()
    drawn = torch.get_rng_state()
    found = occlusion(model, x, 3, "2", size=4, stride=2, batch=batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training, "modes are restored"
    assert not model[2]._forward_hooks
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(x, image)

    model.eval()
    with torch.no_grad():
        maps = model[:3](x[None])[0]
        number = int(maps.amax((1, 2)).argmax())
        assert (found.layer, found.number, found.class_) == ("2", number, 3)
        assert_close(found.map, maps[number])
        whole = {"probability": model(x[None]).softmax(1)[0, 3], "activation": maps[number].sum()}
        assert found.whole == pytest.approx({name: float(value) for name, value in whole.items()})
        for row, line in enumerate((-1, 1, 3)):
            for place, column in enumerate((-1, 1, 3, 5, 7)):
                hidden = x.clone()
                part = slice(max(line, 0), line + 4), slice(max(column, 0), column + 4)
                hidden[0][part], hidden[1][part] = x.mean((1, 2))
                chances = model(hidden[None]).softmax(1)[0]
                assert_close(found.probability[row, place], chances[3])
                assert found.answers[row, place] == chances.argmax()
                assert_close(found.activation[row, place], model[:3](hidden[None])[0, number].sum())
    assert found.probability.shape == found.answers.shape == found.activation.shape == (3, 5)


def test_defaults():
    """The predicted class, the last maps of more than a pixel, a fourth of a fourth of the side."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
    model, x = nn.Sequential(*layers).eval(), torch.rand(1, 32, 40)
    found = occlusion(model, x)
    assert found.class_ == int(model(x[None]).argmax())
    assert found.classes[found.class_] == f"class {found.class_}"
    assert (found.layer, found.size, found.stride) == ("1", 8, 2)
    assert found.probability.shape == (16, 20)


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        ([[0.0, 1.0], [0.5, 0.5]], [0.5, 0.5]),
        ([[0.0, 2.0], [-3.0, -1.0]], [1.0, -2.0]),
        ([[0.0, 1.0], [0.0, -0.5]], [0.5, -0.25]),
    ],
)
def test_the_square_is_grey(image, grey):
    x = torch.tensor(image)[:, None]
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    found = occlusion(model, x, size=1)
    assert found.level.tolist() == grey
    assert covered(x, torch.tensor([[0, 1]]), 1, found.level)[0, :, 0, 1].tolist() == grey


def test_the_map_with_the_largest_value_falls_where_it_is_covered():
    model = nn.Conv2d(2, 2, 1, bias=False)
    model.weight.data = torch.eye(2)[:, :, None, None]  # each channel is a map
    x = torch.zeros(2, 4, 6)
    x[0] = 0.5
    x[1, 2, 3] = 1
    found = occlusion(nn.Sequential(model), x, size=2, stride=2)
    assert (found.layer, found.number, found.whole) == ("0", 1, {"activation": 1.0})
    assert found.activation.tolist() == [[3, 3, 3], [3, 2, 3]]


def test_numbers_of_16_bits_are_added_in_32():
    model, x = network().bfloat16(), picture(2, 6, 9).bfloat16()
    found = occlusion(model, x, size=3, stride=3)
    assert found.probability.dtype == found.activation.dtype == torch.float32
    found.figure()


def titles(found):
    """The first words of those of its figure's pictures."""
    axes = [axes for axes in found.figure().axes if axes.get_title() and axes.get_visible()]
    return [each.get_title().split()[0] for each in axes]


def test_features_alone_and_classes_alone():
    features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    found = occlusion(features, picture(2, 6, 9).float(), size=2)
    assert found.classes == ()
    assert found.class_ is found.probability is found.answers is None
    assert set(found.whole) == {"activation"}
    assert found.layer == "1"
    assert titles(found) == ["least", "map", "sum"]
    assert "class" not in str(found)
    classes = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    found = occlusion(classes, picture(2, 6, 9).float(), size=2)
    assert found.layer is found.number is found.map is found.activation is None
    assert set(found.whole) == {"probability"}
    assert titles(found) == ["least", "probability", "most"]
    with pytest.raises(ValueError, match=r"model must give \[N, classes\], or maps"):
        occlusion(nn.Sequential(nn.Flatten(0)), torch.rand(1, 4, 4))


def test_a_converted_model_says_the_same(device):
    model, x = network(), picture(2, 6, 9)
    right = occlusion(model, x, layer="3", size=4, stride=4)
    ours = cnn.convert(model).to(device)
    found = occlusion(ours, x.to(device), layer="3", size=4, stride=4)
    for name in ("map", "probability", "answers", "activation"):
        assert_close(getattr(found, name).cpu(), getattr(right, name))
    found.figure()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.rand(1, 2, 6, 9)}, r"x must be floats \[C, H, W\], got torch.float32 \[1, 2,"),
        ({"x": torch.ones(2, 6, 9, dtype=torch.uint8)}, r"x must be floats .* torch.uint8"),
        ({"class_": 5}, r"class_ must be one of the 5 classes .* got class_=5"),
        ({"class_": -1}, r"got class_=-1"),
        ({"layer": "pool"}, r"layer must be one of 0, 1, 2, .*, got layer='pool'"),
        ({"layer": "6"}, r"layer must give maps .* of layer='6'"),
        ({"size": 2, "stride": 3}, r"stride must be from 1 to size=2, got stride=3"),
        ({"size": 0}, r"size=0"),
        ({"batch": 0}, r"batch must be positive, got batch=0"),
        ({"classes": ("a", "b")}, r"classes must be 5 names, got 2"),
    ],
)
def test_errors(options, message):
    model = network().float()
    with pytest.raises(ValueError, match=message):
        occlusion(**{"model": model, "x": torch.rand(2, 6, 9)} | options)
    assert model.training
    with pytest.raises(ValueError, match="class_"):
        occlusion(nn.Sequential(nn.Conv2d(2, 1, 1)), torch.rand(2, 6, 9), 0)


def test_figure_and_text():
    model, x = network(12), picture(2, 6, 9)
    names = [f"kind {number}" for number in range(12)]
    found = occlusion(model, x, 7, "2", size=3, stride=1, classes=names)
    many = torch.arange(54).view(6, 9).clamp(max=11)  # kind 11 leads
    found = type(found)(**vars(found) | {"answers": many})
    figure = found.figure()
    image, strongest, activation, probability, answers, legend, *bars = figure.axes
    assert len(bars) == 2
    assert image.get_title() == "least probability of kind 7"
    assert strongest.get_title() == f"map {found.number} of 2"
    assert activation.get_title().startswith(f"sum of map {found.number} of 2\n")
    whole = f"{found.whole['probability']:.3g} without a square"
    assert probability.get_title() == f"probability of kind 7\n{whole}"
    assert answers.get_title() == "most probable class"
    assert_close(torch.tensor(probability.images[-1].get_array()), found.probability.float())
    assert tuple(probability.images[-1].get_extent()) == (-0.5, 8.5, 5.5, -0.5)
    labels = [text.get_text() for text in legend.get_legend().get_texts()]
    assert labels == ["kind 11", *(f"kind {number}" for number in range(8)), "others"]
    shown = torch.tensor(answers.images[-1].get_array())
    assert shown.flatten().tolist() == [*range(1, 9), 9, 9, 9, *[0] * 43]
    figure.draw_without_rendering()
    text = str(found)
    line, column = divmod(int(found.probability.argmin()), 9)
    (told,) = [row.split() for row in text.splitlines() if row.startswith("probability of kind 7")]
    lowest, highest = f"{found.probability.min():.4g}", f"{found.probability.max():.4g}"
    assert told[5:] == [lowest, f"{line - 1},", f"{column - 1}", highest]
    assert [row.split()[-1] for row in text.splitlines()[-12:-10]] == ["43", "1"]


# What a network looks at, where that is known.

SIDE = 14
OBJECTS = (".........", "#.#.#.#.#", "####.####")  # nothing, a cross, a ring; 3x3 bright pixels
OTHERS = (".........", "...###...", ".#..#..#.")  # nothing, lines; dark


def stamp(pattern):
    return torch.tensor([mark == "#" for mark in pattern]).float().view(3, 3)


def scenes(count, seed):
    """Images [N, 1, SIDE, SIDE] of one object and one other thing, each of three kinds, apart.

    With both kinds [2, N] and both places [2, N, 2]: the first line and column.
    """
    draw = torch.Generator().manual_seed(seed)
    x = 0.45 + 0.1 * torch.rand(count, 1, SIDE, SIDE, generator=draw)
    kinds = torch.randint(3, (2, count), generator=draw)
    places = torch.randint(SIDE - 2, (2, count, 2), generator=draw)
    near = (places[0] - places[1]).abs().amax(1) < 6
    places[1][near] = (places[0][near] + 6) % (SIDE - 2)
    stamps = [
        [level * stamp(each) for each in row] for level, row in ((0.4, OBJECTS), (-0.4, OTHERS))
    ]
    for row, kind, place in zip(stamps, kinds, places, strict=True):
        for image, which, (line, column) in zip(x, kind.tolist(), place.tolist(), strict=True):
            image[0, line : line + 3, column : column + 3] += row[which]
    return x, kinds, places


def trained(x, kinds):
    """A network that tells the kinds apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x), kinds).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("watched", [0, 1], ids=["object", "other thing"])
def test_the_least_probable_square_covers_what_the_network_tells_apart(watched):
    """In all images; and the network, which is blind to the other thing, does not show that."""
    size = 5
    x, kinds, _ = scenes(128, seed=0)
    model = trained(x, kinds[watched])
    x, kinds, places = scenes(12, seed=1)
    assert torch.equal(model(x).argmax(1), kinds[watched])
    seen = kinds[watched] > 0
    assert 6 <= seen.sum() < 12
    for image, kind, place in zip(
        x[seen], kinds[watched, seen], places[watched, seen], strict=True
    ):
        found = occlusion(model, image, int(kind), size=size, stride=1)
        offset = found.corners - place
        whole = ((offset <= 0) & (offset + size >= 3)).all(-1)
        apart = ((offset >= 3) | (offset + size <= 0)).any(-1)
        assert found.probability[whole].max() < 0.2 < 0.8 < found.probability[apart].min()
        least = offset.flatten(0, 1)[found.probability.argmin()]
        assert ((least <= 1) & (least + size > 1)).all(), "the square covers the middle"
        assert (found.answers[apart] == kind).all()
        assert (found.answers[whole] == 0).all()
