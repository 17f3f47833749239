"""Data sets that a function of one's own makes."""

import random
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import cnn
from cnn import data
from cnn.data import UNCOUNTED, Augmented, UnreadableImages
from cnn.errors import UsageError


class Colours(Dataset):
    """60 images of three colours, each given in the way that is asked for."""

    classes = ("red", "green", "blue")

    def __init__(self, kind: str = "bytes", size: tuple[int, int] = (32, 32), count: int = 60):
        self.kind, self.size, self.count = kind, size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[object, object]:
        if index >= self.count:
            raise IndexError(index)
        label = index % 3
        pixels = torch.zeros(3, *self.size, dtype=torch.uint8)
        pixels[label] = 255
        match self.kind:
            case "bytes":
                return pixels, label
            case "floats":
                return pixels.double() / 100 - 1, torch.tensor(label)
            case "Pillow":
                return Image.fromarray(pixels.permute(1, 2, 0).numpy()), label
            case "grey":
                return Image.new("L", self.size[::-1], 100 * label), label
            case "array":
                return pixels.permute(1, 2, 0).numpy(), np.int64(label)
            case "drawn":
                drawn = random.random(), np.random.random(), torch.rand(()).item()
                return torch.tensor(drawn)[:, None, None].expand(3, *self.size), label
            case _:
                return eval(self.kind)


@pytest.fixture
def given(monkeypatch):
    """Gives a value the name "made:here" under which functions of one's own are found."""
    module = types.ModuleType("made")
    monkeypatch.setitem(sys.modules, "made", module)

    def name(value: object) -> str:
        module.here = lambda: value
        return "made:here"

    return name


@pytest.mark.parametrize("kind", ["bytes", "Pillow", "array"])
def test_pixels_of_each_kind(kind, given):
    sets = data.load(given({"train": Colours(kind), "test": Colours(kind, (40, 64), 9)}))
    known = sets.description
    assert (known.classes, known.size, known.channels) == (("red", "green", "blue"), 32, 3)
    assert known.pixels
    assert (known.mean, known.std) == data.IMAGENET
    assert (len(sets.train), len(sets.test), sets.val) == (60, 9, None)
    for part in (sets.train, sets.test):
        for index in range(len(part)):
            image, label = part[index]
            assert (image.dtype, image.shape, label) == (torch.uint8, (3, 32, 32), index % 3)
            assert image.amax((1, 2)).tolist() == [255 * (index % 3 == c) for c in range(3)]
    assert not sets.mirrors


def test_grey_pixels_are_normalized_by_a_sample(given):
    sets = data.load(given({"train": Colours("grey"), "test": Colours("grey"), "mirrors": True}))
    assert (sets.description.channels, sets.mirrors) == (1, True)
    levels = torch.tensor([0, 100, 200], dtype=torch.float64) / 255
    assert sets.description.mean == pytest.approx([levels.mean().item()])
    assert sets.description.std == pytest.approx([levels.std(correction=0).item()])


def test_floating_point_is_taken_as_it_is(given):
    sets = data.load(given({"train": Colours("floats"), "test": Colours("floats")}))
    assert not sets.description.pixels
    prepare = data.Normalize(sets.description, torch.device("cpu"))
    images, labels = next(iter(DataLoader(sets.train, 6)))
    expected = torch.stack([Colours("floats")[index][0] for index in range(6)]).float()
    assert torch.equal(prepare(images), expected)
    assert labels.tolist() == [0, 1, 2] * 2
    assert data.load(given(Colours("floats", (40, 50))), size=20).train[0][0].shape == (3, 20, 20)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_no_image(value, given):
    """One of them would end the run as diverged."""
    images = torch.zeros(9, 1, 4, 4)
    images[7, 0, 2, 1] = value
    part = TensorDataset(images, torch.arange(9) % 2)
    sets = data.load(given({"train": part, "test": part, "classes": 2}))
    assert [label for _, label in (sets.train[index] for index in range(9))][6:] == [0, -1 - 7, 0]
    with pytest.raises(UsageError, match="it holds NaN or infinite numbers"):
        sets.train.read(7)


def test_parts_and_what_is_lacking(given):
    whole = Colours(count=300)
    drawn = data.load(given(whole), seed=3, val=True)
    again, other = (data.load(given(whole), seed=seed, val=True) for seed in (3, 4))
    parts = [part.data.indices for part in (drawn.train, drawn.val, drawn.test)]
    assert sorted(index for part in parts for index in part) == [*range(300)]
    assert again.test.data.indices == parts[2] != other.test.data.indices
    longer = data.load(given(Colours(count=400)), seed=3, val=True)
    for part, known in zip((longer.train, longer.val, longer.test), parts, strict=True):
        assert [index for index in part.data.indices if index < 300] == known
    asked = {"Training": Subset(whole, range(30)), "valid": whole, "TEST": Subset(whole, range(9))}
    sets = data.load(given(asked))
    assert [len(part) for part in (sets.train, sets.val, sets.test)] == [30, 300, 9]
    assert sets.description.classes == Colours.classes
    sets = data.load(given((whole, Subset(whole, range(9)))))
    assert [len(part) for part in (sets.train, sets.test)] == [300, 9]
    numbered = {"train": TensorDataset(torch.zeros(9, 1, 4, 4), torch.arange(9) % 2), "classes": 2}
    assert data.load(given(numbered)).description.classes == ("0", "1")


class Endless(IterableDataset):
    classes = ("a", "b")

    def __iter__(self):
        while True:
            yield torch.zeros(1, 4, 4), 0


REFUSED = {
    "nothing": (lambda: None, "returns a NoneType, which has no length or no index"),
    "a stream": (lambda: Endless(), "returns a Endless, which has no length or no index"),
    "no train": (lambda: {"test": Colours()}, "returns no training set"),
    "empty": (lambda: Colours(count=0), "returns no training image"),
    "empty test": (
        lambda: {"train": Colours(), "test": Colours(count=0)},
        "returns no test image",
    ),
    "no classes": (
        lambda: TensorDataset(torch.zeros(9, 1, 4, 4), torch.zeros(9)),
        'made:here returns no "classes": give their names or number',
    ),
    "one class": (
        lambda: {"train": Colours(), "classes": ["a"]},
        "the classes of made:here must be two or more",
    ),
    "twice": (lambda: {"train": Colours(), "classes": ["a", "a"]}, "and must differ"),
    "integers": (
        lambda: {
            "train": TensorDataset(torch.zeros(9, 1, 4, 4).int(), torch.zeros(9)),
            "classes": 2,
        },
        r"its dtype is torch.int32, neither uint8 nor floating point",
    ),
    "shape": (
        lambda: {"train": TensorDataset(torch.zeros(9, 1, 2, 4, 4), torch.zeros(9)), "classes": 2},
        r"its shape is \[1, 2, 4, 4\]",
    ),
    "empty val": (
        lambda: {"train": Colours("grey"), "test": Colours("grey"), "val": []},
        "returns no validation image",
    ),
    "no label of its classes": (
        lambda: {"train": [(torch.zeros(1, 4, 4, dtype=torch.uint8), 7)] * 9, "classes": 2},
        "training image 0 of made:here: its label 7 is not in 0 to 1",
    ),
    "no image": (lambda: Colours("1 / 0"), "cannot read any image of made:here: division by zero"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_data_set(case, given):
    make, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        data.load(given(make()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("made:nowhere", r"made:nowhere\(\) fails: AttributeError"),
        ("no_such_module:f", r"fails: ModuleNotFoundError"),
        ("random:random", r"returns a float"),
        ("json:loads", r"fails: TypeError"),
        ("sys:exit", r"sys:exit\(\) fails: SystemExit"),
        ("imagenet", "'imagenet' is none of digits, .*, and no MODULE:FUNCTION"),
        ("a b:c", "'a b:c' is none of"),
    ],
)
def test_names_that_make_no_data_set(name, message, given):
    given(None)
    with pytest.raises(UsageError, match=message):
        data.load(name)


class Odd(Colours):
    """Some images cannot be had, each for its reason."""

    def __getitem__(self, index: int) -> tuple[object, object]:
        image, label = super().__getitem__(index)
        match index:
            case 3:
                raise RuntimeError("no such record")
            case 4:
                return image, 3
            case 5:
                return image[:1], label
            case 6:
                return image.float(), label
            case 7:
                return "image", label
            case 8:
                return image, 0.5
            case 9:
                return {"image": image, "label": label}
            case 10:
                sys.exit(0)
        return image, label


def test_images_that_cannot_be_had_are_broken(given):
    sets = data.load(given({"train": Odd(count=12), "test": Colours()}))
    told = []
    watch = UnreadableImages(sets.train, "skip", told.append)
    labels = torch.cat([watch(labels) for _, labels in DataLoader(sets.train, 5)])
    assert labels.eq(UNCOUNTED).nonzero().flatten().tolist() == [*range(3, 11)]
    name = "cannot read training image {} of made:here: {}; skipped"
    reasons = [
        "no such record",
        "its label 3 is not in 0 to 2",
        "it has 1 channels, not 3",
        "its dtype is torch.float32, not uint8",
        "it is a str, neither a tensor nor a Pillow image",
        "its label 0.5 is not in 0 to 2",
        "it is a dict, not (image, label)",
        "it ends the program",
    ]
    assert told == [name.format(3 + i, reason) for i, reason in enumerate(reasons)]
    with pytest.raises(UsageError, match="no such record"):
        UnreadableImages(sets.train, "stop", told.append)(labels.new_tensor([-1 - 3]))


def test_what_a_data_set_draws_is_fixed(given):
    """By seed, epoch and index, in any order; other draws are not touched."""
    sets = data.load(given({"train": Colours("drawn"), "test": Colours("drawn")}))

    def images(seed: int, epoch: int, *indices: int) -> list[list[float]]:
        augmented = Augmented(sets.train, seed, shift=False, mirror=False)
        return [augmented[epoch, index][0][:, 0, 0].tolist() for index in indices]

    def state() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = state()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = images(0, 0, 1, 2, 3)
    assert state() == expected
    assert first == images(0, 0, 3, 2, 1)[::-1]
    every = [*first, *images(1, 0, 1), *images(0, 1, 1)]
    assert len({number for numbers in every for number in numbers}) == 15
    test: Tensor = sets.test[4][0]
    assert torch.equal(test, sets.test[4][0])


MODULE = """
import torch
from torch.utils.data import TensorDataset

def colours(count=48):
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] = 255
    return {"train": TensorDataset(images, labels), "classes": ["red", "green", "$blue$"]}

def floats():
    made = colours()
    images, labels = made["train"].tensors
    return {**made, "train": TensorDataset(images / 100 - 1, labels)}

def four():
    made = colours()
    images, labels = made["train"].tensors
    return {**made, "train": TensorDataset(images[:, [0, 1, 2, 0]], labels)}
"""


@pytest.fixture
def module(tmp_path):
    """The environment in which the module "mine" is found."""
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def test_commands_take_a_function(cpu, module):
    argv = ["--model", "lenet5", "--batch-size", 8, "--output", module / "run"]
    mine = {"PYTHONPATH": module}
    code, out, err = cpu.run("train", "--data", "mine:colours", "--epochs", 6, *argv, **mine)
    assert code == 0, err
    code, out, err = cpu.run("eval", module / "run/last.pt", "--data", "mine:colours", **mine)
    assert code == 0, err
    assert out.endswith("test accuracy 1.000\n")
    Image.new("RGB", (50, 60), (0, 255, 0)).save(module / "x.png")
    code, out, err = cpu.run("predict", module / "run/last.pt", module / "x.png")
    assert (code, out.split("\t")[1]) == (0, "green")


def test_no_file_has_images_of_four_channels(cpu, module):
    run, mine = module / "run", {"PYTHONPATH": module}
    argv = ["--model", "lenet5", "--batch-size", 8, "--epochs", 1, "--output", run]
    code, _, err = cpu.run("train", "--data", "mine:four", *argv, **mine)
    assert code == 0, err
    Image.new("RGBA", (40, 40)).save(module / "x.png")
    code, out, err = cpu.run("predict", run, module / "x.png")
    words = f"{run}/best.pt was trained on images of 4 channels: a file has 1 or 3"
    assert (code, out, err) == (2, "", f"python -m cnn: {words}\n")
    _, transform, _ = cnn.load(run)
    assert transform(torch.zeros(4, 32, 32, dtype=torch.uint8)).shape == (4, 32, 32)
    with pytest.raises(UsageError, match="and has no 4 channels"):
        transform(module / "x.png")


def test_a_checkpoint_does_not_choose_what_code_runs(cpu, module):
    argv = ["--model", "lenet5", "--batch-size", 8, "--output", module / "run", "--epochs", 1]
    mine = {"PYTHONPATH": module}
    code, _, err = cpu.run("train", "--data", "mine:floats", *argv, **mine)
    assert code == 0, err
    last = module / "run/last.pt"
    message = f"python -m cnn: {last} names data that is code: to run it, give --data mine:floats\n"
    assert cpu.run("eval", last, **mine) == (2, "", message)
    assert cpu.run("train", "--resume", last, **mine) == (2, "", message)
    show = "show", "maps", "--checkpoint", last, "--output", module / "m"
    code, out, err = cpu.run(*show, **mine)
    assert (code, out) == (2, "")
    assert err.endswith("names data that is code: to run it, give --data mine:floats\n")
    code, out, err = cpu.run("train", "--resume", last, "--data", "mine:colours", **mine)
    assert (code, out) == (2, "")
    assert "--data: mine:colours contradicts mine:floats" in err
    code, out, err = cpu.run("predict", last, module, **mine)
    assert (code, out) == (2, "")
    assert "was trained on floating-point images, which no image file holds" in err
    code, _, err = cpu.run(*show, "--data", "mine:floats", **mine)
    assert code == 0, err
