"""Models by name and their weights: what train begins with, and what it leaves for Python."""

import argparse
import os
import pickle
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import cnn
from cnn import __main__ as cli
from cnn import data
from cnn.data import IMAGENET
from cnn.errors import UsageError
from cnn.models.classifier import classifiers
from cnn.training import checkpoint as checkpoints
from cnn.training import networks, weights

ROOT = Path(__file__).parents[1]
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def paint(folder: Path, side: int, parts: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """Noisy images of three colours, ten to train with and two in each other part."""
    draw = np.random.default_rng(0)
    for part in parts:
        for name, colour in COLOURS.items():
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(10 if part == "train" else 2):
                noise = draw.integers(0, 80, (side, side, 3), dtype=np.uint8)
                pixels = np.maximum(noise, np.uint8(colour) // 2)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("photos"), 32)


@pytest.fixture(scope="module")
def run(cpu, photos, tmp_path_factory) -> Path:
    """The folder of a whole run of LeNet-5."""
    folder = tmp_path_factory.mktemp("runs") / "lenet5"
    argv = ["--model", "lenet5", "--size", 32, "--epochs", 3, "--batch-size", 10, "--lr", 0.01]
    argv += ["--output", folder]
    code, _, err = cpu.run("train", "--data", f"folder:{photos}", *argv)
    assert code == 0, err
    return folder


def problem(capsys, *argv: object) -> str:
    """The one line in which a command ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
    return err


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# What train leaves.

PREDICTION = """
import cnn
model, transform, classes = cnn.load("run")
logits = model(transform("photos/test/red/0.png")[None])
print(classes[logits.argmax()])
"""


def test_fine_tuning_and_a_prediction(cpu, tmp_path):
    """A ResNet-18 with ImageNet's 1,000 classes learns three others, by one command."""
    photos = paint(tmp_path / "photos", 64)
    torch.save(cnn.models.resnet18().state_dict(), tmp_path / "resnet18-f37072fd.pth")
    argv = ["train", "--model", "resnet18", "--init", tmp_path / "resnet18-f37072fd.pth"]
    argv += ["--data", f"folder:{photos}", "--size", 64, "--freeze", "conv1,bn1,layer1"]
    argv += ["--epochs", 1, "--batch-size", 5, "--optimizer", "sgd", "--output", tmp_path / "run"]
    code, _, err = cpu.run(*argv)
    assert code == 0, err
    told = err.splitlines()
    assert "15 of 62 parameters are frozen; 5 BatchNorm layers among them use and keep" in told[0]
    assert told[1] == f"120 of 122 parameters and buffers loaded from {argv[4]}"
    assert told[2] == "fc is new: it is for 3 classes, not 1000"

    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}  # on torch's functions
    done = subprocess.run(
        [sys.executable, "-c", PREDICTION],
        cwd=tmp_path,
        env={**os.environ, **environment, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("red\n", "")


def test_a_run_is_loaded_from_its_folder_and_from_each_of_its_files(run, photos, tmp_path, cpu):
    image = photos / "test" / "green" / "1.png"
    code, out, _ = cpu.run("predict", run / "best.safetensors", image)
    assert code == 0
    name, chance = out.strip().split("\t")[1:]
    loaded = [cnn.load(path) for path in (run, str(run / "best.pt"), run / "best.safetensors")]
    for trained in loaded:
        model, transform, classes = trained
        assert (model, transform, classes) == (trained.model, trained.transform, trained.classes)
        assert not model.training
        assert classes == ("blue", "green", "red")
        assert same(model.state_dict(), loaded[0].model.state_dict())
        x = transform(image)
        assert (x.shape, x.dtype) == ((3, 32, 32), torch.float32)
        chances = model(x[None]).softmax(1)[0]
        assert classes[int(chances.argmax())] == name == "green"
        assert chances.max().item() == pytest.approx(float(chance), abs=1e-4)
    (tmp_path / "last.pt").write_bytes((run / "last.pt").read_bytes())
    assert cnn.load(tmp_path).classes == classes  # as before the first epoch is whole


def test_a_transform_takes_images_of_every_kind(run, photos):
    transform = cnn.load(run).transform
    path = photos / "test" / "red" / "0.png"
    picture = Image.open(path)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = transform(path)
    mean, std = (torch.tensor(v)[:, None, None] for v in cnn.data.IMAGENET)
    torch.testing.assert_close(expected, (tensor / 255 - mean) / std)
    for image in (str(path), picture, array, tensor):
        assert torch.equal(transform(image), expected)
    batch = transform(torch.stack([tensor, tensor.flip(1)]))
    assert batch.shape == (2, 3, 32, 32)
    assert torch.equal(batch[0], expected)
    assert transform(Image.new("L", (50, 70), 9)).shape == (3, 32, 32)
    assert transform(torch.zeros(3, 99, 50, dtype=torch.uint8)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="it has 4 channels, not 3"):
        transform(torch.zeros(4, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"its dtype is torch\.float32, not uint8"):
        transform(torch.zeros(3, 32, 32))
    with pytest.raises(TypeError, match="it is a list, neither a tensor nor a Pillow image"):
        transform([1, 2])
    with pytest.raises(UsageError, match=r"cannot read nothing\.png"):
        transform("nothing.png")


def test_safetensors_say_all_of_the_model_and_are_the_same_each_time(run, tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint = checkpoints.load(run / "best.pt")
    checkpoint["description"]["classes"] = ('"', "\udcff", "triton-cnn blake2b ")
    checkpoint["config"]["freeze"] = ("conv1", "*")
    turned = checkpoint["state_dict"]["features.0.weight"].to(memory_format=torch.channels_last)
    checkpoint["state_dict"] |= {"features.0.weight": turned, "twin": turned}
    weights.save(checkpoint, path)
    first = path.read_bytes()
    weights.save(checkpoint, path)
    assert path.read_bytes() == first
    parameters, found = weights.read(path)
    assert same(parameters, checkpoint["state_dict"])
    for key in ("config", "description"):
        assert found[key] == checkpoint[key]
    assert same(safetensors.torch.load_file(path), parameters)


# Files of weights.


def lenet(**options) -> nn.Module:
    return cnn.models.lenet5(num_classes=7, in_channels=3, **options)


def wrapped(prefix: str):
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


def within(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As if a part of the model was compiled."""
    return {name.replace("features.", "features._orig_mod."): v for name, v in state.items()}


ARGS = argparse.Namespace(lr=0.1, names=["a"])
SHAPED = {
    "plain": dict,
    "sorted": lambda state: dict(sorted(state.items())),
    "reversed": lambda state: dict(reversed(state.items())),
    "parameters": lambda state: {name: nn.Parameter(value) for name, value in state.items()},
    "parallel": wrapped("module."),
    "compiled": wrapped("_orig_mod."),
    "both": wrapped("module._orig_mod."),
    "both, turned": wrapped("_orig_mod.module."),
    "a part": within,
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **wrapped("module.")(state)},
    "torchvision": lambda state: {"model": state, "epoch": 3, "args": ARGS, "scaler": None},
    "timm": lambda state: {"arch": "x", "state_dict": state, "args": ARGS, "metric": np.float64(3)},
    "lightning": lambda state: {"epoch": 1, "state_dict": wrapped("model.")(state)},
    "tutorial": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "nested": lambda state: {"model": {"state_dict": wrapped("module.")(state), "step": 1}},
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "bfloat16": lambda state: {name: value.bfloat16() for name, value in state.items()},
    "double": lambda state: {name: value.double() for name, value in state.items()},
}


NESTED = {"torchvision", "timm", "lightning", "tutorial", "nested"}
KINDS = [
    (name, kind)
    for name in SHAPED
    for kind in ("pth", "old pth", *(["safetensors"] if name not in NESTED else []))
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_weights_are_found_in_files_of_every_usual_shape(name, kind, tmp_path):
    model = lenet()
    contents = SHAPED[name](model.state_dict())
    path = tmp_path / f"x.{kind.split()[-1]}"
    if kind == "safetensors":
        safetensors.torch.save_file(contents, path)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=kind == "pth")
    parameters, checkpoint = weights.read(path)
    assert checkpoint is None
    loaded = weights.build("lenet5", parameters, 32, path).state_dict()
    bits = {"half": 11, "bfloat16": 8}.get(name, 24)
    for key, value in model.state_dict().items():
        assert (loaded[key].dtype, loaded[key].shape) == (torch.float32, value.shape)
        assert (loaded[key] - value).abs().max() <= value.abs().max() * (
            2.0**-bits if bits < 24 else 0
        )


@pytest.mark.parametrize("name", ["resnet18", "vgg_small"])
def test_buffers_and_other_models_are_found_as_well(name, tmp_path):
    path = tmp_path / "x.pt"
    state = cnn.models.create(name, num_classes=3, in_channels=2, image_size=32).state_dict()
    torch.save(wrapped("module.")(dict(reversed(state.items()))), path)
    loaded = weights.build(name, weights.read(path)[0], 32, path)
    assert same(loaded.state_dict(), state)


def test_batch_normalization_of_before_it_counted(tmp_path):
    """Files of torch 0.4 and before lack num_batches_tracked."""
    path = tmp_path / "x.pt"
    state = cnn.models.resnet18(3).state_dict()
    torch.save({n: v for n, v in state.items() if not n.endswith("_tracked")}, path)
    loaded = weights.build("resnet18", weights.read(path)[0], 224, path)
    assert same(loaded.state_dict(), state)


class Versioned(nn.Linear):
    """Wants to know of what version a file is, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_layers_are_told_their_version(end, tmp_path):
    """Which safetensors do not hold, and which is lost where names are taken apart."""
    model, other = (nn.Sequential(Versioned(3, 2)) for _ in range(2))
    path, state = tmp_path / f"x.{end}", wrapped("module.")(model.state_dict())
    safetensors.torch.save_file(state, path) if end == "safetensors" else torch.save(state, path)
    weights.begin(other, path, "versioned")
    assert same(other.state_dict(), model.state_dict())
    Versioned._version = 3
    try:
        with pytest.raises(UsageError, match=r"parameters of it: load_state_dict refuses them$"):
            weights.fill(other, state, "it", path)
    finally:
        Versioned._version = 2


UNFIT = {
    "another model": (("vgg_small", 32), {}, "it lacks features.1.weight and 5 more"),
    "another size": (("lenet5", 28), {}, "its classifier.0.weight is 120x400, not 120x256"),
    "less": (("lenet5", 32), {"classifier.2.bias": None}, "it lacks classifier.2.bias"),
    "more": (("lenet5", 32), {"x": torch.ones(1)}, "it also holds x"),
    "flat": (("lenet5", 32), {"features.0.weight": torch.ones(9)}, "features.0.weight is 9, not"),
    "number": (("lenet5", 32), {"classifier.4.weight": torch.ones(())}, "weight is a number, not"),
    "integers": (
        ("lenet5", 32),
        {"classifier.2.bias": torch.ones(84, dtype=torch.int8)},
        "its classifier.2.bias is torch.int8, not torch.float32",
    ),
    "complex": (
        ("lenet5", 32),
        {"classifier.2.bias": torch.ones(84, dtype=torch.complex64)},
        "its classifier.2.bias is torch.complex64, not torch.float32",
    ),
    "unknown": (("lenet6", 32), {}, "x.pt names a model lenet6, which is none of alexnet, "),
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit_are_told_apart(case):
    (name, size), change, message = UNFIT[case]
    state = {**lenet().state_dict(), **change}
    parameters = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(UsageError) as caught:
        weights.build(name, parameters, size, Path("x.pt"))
    if name != "lenet6":
        known = f"x.pt does not hold the parameters of {name} for {size}x{size} pixels: "
        assert str(caught.value).startswith(known)
    assert message in str(caught.value)


class Code:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


LOOP: dict = {}
LOOP["model"] = LOOP
HOSTILE = {
    "empty": ("pt", b"", "is damaged or not a checkpoint"),
    "empty safetensors": ("safetensors", b"", "is damaged or not a safetensors file"),
    "text": ("safetensors", b"not weights at all", "is damaged or not a safetensors file"),
    "no end": ("safetensors", header(b'{"a":', 1 << 40), "is damaged or not a safetensors file"),
    "no JSON": ("bin", header(b"{" * 100000), "is damaged or not a safetensors file"),
    "beyond": (
        "safetensors",
        header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}') + b"\0" * 35,
        "is damaged or not a safetensors file",
    ),
    "no tensors": ("safetensors", header(b"{}"), "and holds no weights"),
    "our mark alone": (
        "safetensors",
        header(b'{"__metadata__":{"triton-cnn":"{}"}}'),
        "is damaged: its digest does not match its contents",
    ),
    "code": (
        "pt",
        {"model": Code()},
        "holds posix.mkdir, and reading that could run code: save its state",
    ),
    "a module": (
        "pt",
        nn.Linear(2, 2),
        "holds torch.nn.modules.linear.Linear, and reading that could run code",
    ),
    "bare code": ("pt", pickle.dumps(Code()), "is damaged or not a checkpoint"),
    "a loop": ("pt", LOOP, "and holds no weights"),
    "numbers": ("pt", {"model": {"w": 3}}, "and holds no weights"),
    "no names": ("pt", {1: torch.ones(1)}, "and holds no weights"),
    "one number spread": (
        "pt",
        {"classifier.4.weight": torch.ones(()).expand(1 << 40, 84)},
        "its classifier.4.weight is not a dense tensor of numbers",
    ),
    "sparse": ("pt", {"w": torch.eye(3).to_sparse()}, "its w is not a dense tensor of numbers"),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("case", HOSTILE)
def test_what_holds_no_weights_ends_in_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    end, contents, message = HOSTILE[case]
    path = tmp_path / f"x.{end}"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    for command in (
        ["train", "--output", "run", "--init", path],
        ["eval", path, "--data", "digits", "--model", "lenet5"],
        ["predict", path, "x.png"],
        ["show", "filters", "--model", "lenet5", "--checkpoint", path],
    ):
        assert message in problem(capsys, *command)
    with pytest.raises(UsageError, match=re.escape(message)):
        cnn.load(path)
    assert not Path("was-run").exists()
    assert [p.name for p in Path("run").iterdir()] == [".lock"]


def test_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"cannot read .*/empty/last\.pt: No such file"):
        cnn.load(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"cannot read .*/none: No such file"):
        cnn.load(tmp_path / "none")
    torch.save(lenet().state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UsageError, match="holds only weights, without the model and the classes"):
        cnn.load(tmp_path / "bare.pt")


# What a run begins with.


def test_a_run_begins_with_weights_of_another(run, photos, cpu, tmp_path):
    """Once: it goes on without the file. Layers for other images and classes are new."""
    first = cnn.load(run).model.state_dict()
    start = tmp_path / "start.pt"
    torch.save(first, start)
    argv = ["train", "--data", f"folder:{photos}", "--model", "lenet5", "--size", 32]
    argv += ["--batch-size", 10, "--epochs", 2, "--init"]
    code, _, err = cpu.run(*argv, run, "--output", tmp_path / "a", SIGNAL_AFTER_SAVES=1)
    assert code == 130, err
    told = err.splitlines()
    assert told[0] == f"10 of 10 parameters and buffers loaded from {run}/best.pt"
    code, _, err = cpu.run(*argv, start, "--output", tmp_path / "b", SIGNAL_AFTER_SAVES=1)
    states = [checkpoints.load(tmp_path / name / "last.pt") for name in "ab"]
    assert same(*(state["training"]["model"] for state in states))
    start.unlink()
    code, _, err = cpu.run("train", "--resume", "--output", tmp_path / "b")
    assert code == 0, err
    assert checkpoints.load(tmp_path / "b" / "last.pt")["config"]["init"] == str(start)

    code, _, err = cpu.run("train", "--init", run, "--epochs", 1, "--output", tmp_path / "c")
    told = err.splitlines()
    assert told[:3] == [
        f"6 of 10 parameters and buffers loaded from {run}/best.pt",
        "features.0 is new: it is for 1 channels, not 3",
        "classifier.4 is new: it is for 10 classes, not 3",
    ]
    assert code == 0


def test_only_what_differs_is_new():
    model, other = cnn.models.lenet5(), cnn.models.lenet5(num_classes=3, in_channels=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = Path("x.pt")
    weights_of = {"other": other.state_dict()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "read", lambda path: (weights_of["other"], None))
        weights.begin(model, path, "lenet5")
        for name, value in model.state_dict().items():
            new = name.rpartition(".")[0] in ("features.0", "classifier.4")
            assert torch.equal(value, before[name] if new else other.state_dict()[name]), name
        weights_of["other"] = cnn.models.lenet5(image_size=28).state_dict()
        with pytest.raises(UsageError, match=r"its classifier\.0\.weight is 120x256, not 120x400"):
            weights.begin(model, path, "lenet5")


class Branches(nn.Module):
    """Two convolutions see the image, and one like them does not."""

    def __init__(self, channels: int):
        super().__init__()
        self.stem = nn.ModuleList([nn.Conv2d(channels, 4, 3), nn.Conv2d(channels, 4, 1)])
        self.inner, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)


def test_all_convolutions_that_see_the_image_are_new(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(Branches(3).state_dict(), path)
    assert weights.begin(Branches(1), path, "it") == [
        f"4 of 8 parameters and buffers loaded from {path}",
        "stem.0 is new: it is for 1 channels, not 3",
        "stem.1 is new: it is for 1 channels, not 3",
    ]


def test_a_model_without_convolutions_begins_with_weights(tmp_path):
    first, other = (nn.Sequential(nn.Flatten(), nn.Linear(12, n)) for n in (7, 3))
    torch.save(first.state_dict(), tmp_path / "x.pt")
    told = weights.begin(other, tmp_path / "x.pt", "it")
    assert told[1:] == ["1 is new: it is for 3 classes, not 7"]


def test_classifiers_that_only_help_to_train_are_left_out(tmp_path):
    """Where the model has none. Where it has, and in anything else, all must fit."""
    whole, path = googlenet(), tmp_path / "x.pt"
    model = nn.ModuleDict({name: part for name, part in googlenet().items() if name != "aux1"})
    torch.save(whole.state_dict(), path)
    assert weights.begin(model, path, "it") == [
        f"6 of 6 parameters and buffers loaded from {path}",
        "aux1.fc1.weight and 3 more ignored: they belong to auxiliary classifiers",
    ]
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in model.state_dict().items())
    torch.save(model.state_dict(), path)
    with pytest.raises(UsageError, match=r"it lacks aux1\.fc1\.weight and 3 more"):
        weights.begin(whole, path, "it")


HALF = (0.5,) * 3
NORMALIZED = {
    "timm's": ({"pretrained_cfg": {"mean": [0.5] * 3, "std": HALF}}, (HALF, HALF)),
    "of one channel": ({"pretrained_cfg": {"mean": (0.5,), "std": (0.5,)}}, IMAGENET),
    "untold": ({"pretrained_cfg": {"mean": None}}, IMAGENET),
    "of another kind": ({"pretrained_cfg": "x"}, IMAGENET),
    "torchvision's GoogLeNet": ({"transform_input": False}, (HALF, HALF)),
    "which converts images": ({"transform_input": True}, IMAGENET),
}


@pytest.mark.parametrize("case", NORMALIZED)
def test_photographs_are_normalized_as_a_network_is_used_to(case):
    attributes, expected = NORMALIZED[case]
    model, known = lenet(), data.Description(("a", "b"), 32, *IMAGENET)
    vars(model).update(attributes)
    found = networks.described(model, known)
    assert (found.mean, found.std) == expected
    assert replace(found, mean=known.mean, std=known.std) == known
    measured = replace(known, mean=(0.1,) * 3)
    assert networks.described(model, measured) is measured


def test_a_run_keeps_how_its_photographs_are_normalized(cpu, photos, mine):
    """From the first step to the prediction; and weights alone are tested alike."""
    run, given = mine / "run", ("--model", "mine_too:told", "--data", f"folder:{photos}")
    argv = ["train", *given, "--size", 32, "--epochs", 2, "--batch-size", 10, "--output", run]
    here = {"PYTHONPATH": mine}
    assert cpu.run(*argv, **here, SIGNAL_AFTER_SAVES=1)[0] == 130
    code, _, err = cpu.run("train", "--resume", run, "--model", "mine_too:told", **here)
    assert code == 0, err
    sys.path.insert(0, str(mine))
    from mine_too import Net  # type: ignore[import-not-found]

    model, transform, _ = cnn.load(run, model=Net)
    image = photos / "test" / "blue" / "0.png"
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1) / 255
    torch.testing.assert_close(transform(image), (pixels - 0.5) / 0.5)
    torch.save(model.state_dict(), run / "bare.pt")
    tested = []
    for file, *more in (("best.pt",), ("bare.pt", "--size", 32)):
        code, out, err = cpu.run("eval", run / file, *given, *more, **here)
        assert code == 0, err
        tested.append(re.findall(r"loss .*", out))
    assert tested[0] == tested[1]


def test_frozen_parameters_stay_what_they_are(cpu, photos, run, tmp_path):
    """And so does a frozen layer of batch normalization, with its statistics; also when resumed."""
    argv = ["train", "--model", "normed", "--data", f"folder:{photos}", "--size", 32]
    argv += ["--batch-size", 10, "--epochs", 2, "--output", tmp_path / "run"]
    freeze = "--freeze", "0.weight,1", "--freeze", "4.b*"
    code, _, err = cpu.run(*argv, *freeze, "--weight-decay", 0.5, SIGNAL_AFTER_SAVES=1)
    assert code == 130
    told = "4 of 6 parameters are frozen; 1 BatchNorm layers among them use and keep their stat"
    assert err.startswith(told)
    first = checkpoints.load(tmp_path / "run" / "last.pt")
    assert first["config"]["freeze"] == ("0.weight", "1", "4.b*")
    code, _, err = cpu.run("train", "--resume", "--output", tmp_path / "run")
    assert (code, err.startswith(told)) == (0, True), err
    last = checkpoints.load(tmp_path / "run" / "last.pt")
    states = [checkpoint["training"]["model"] for checkpoint in (first, last)]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {"0.bias", "4.weight"}
    assert states[1]["1.running_mean"].abs().max() == 0
    assert len(last["training"]["optimizer"]["param_groups"][0]["params"]) == 2


def test_of_a_layer_of_batch_normalization_all_must_be_frozen():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    weights.freeze(model, ("1.weight",))
    weights.training(model.eval())
    assert all(module.training for module in model.modules())
    weights.freeze(model, ("1.*",))
    weights.training(model)
    assert [module.training for module in model] == [True, False, True]


# Models by name.

MINE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels=3):
        pool = nn.AdaptiveAvgPool2d(4)
        first = nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.MaxPool2d(2)
        super().__init__(*first, pool, nn.Flatten(), nn.Linear(128, num_classes))
        self.tied = self[5].weight

def none(): return {}
def bare(): return nn.Flatten()
def thousand(): return nn.Sequential(nn.Conv2d(3, 1000, 32), nn.Flatten())
def pair(num_classes): return Pair()
def broken(num_classes): raise OSError("no such\\nnet")
def failing(num_classes): return Failing()
def extra(num_classes): return Extra()
def frozen(num_classes): return Net(num_classes).requires_grad_(False)
def told(num_classes):
    net = Net(num_classes)
    net.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return net
def ends(): raise SystemExit("usage: net")
class Pair(Net):
    def __init__(self): super().__init__(3)
    def forward(self, x): return x, x
class Extra(Pair):
    def get_extra_state(self): return {"a": 1}
class Failing(Pair):
    def forward(self, x): raise KeyError("x")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The folder in which the module "mine_too" is found."""
    (tmp_path / "mine_too.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine_too", raising=False)
    return tmp_path


def test_commands_take_a_model_of_ones_own(cpu, photos, mine):
    """By its name, which has to be given again: a checkpoint does not choose what code runs."""
    here = {"PYTHONPATH": mine}
    run, output = mine / "run", ("--output", mine / "run")
    argv = ["train", "--model", "mine_too:Net", "--data", f"folder:{photos}", "--size", 32]
    argv += ["--lr", 0.01, "--batch-size", 10, *output]
    code, _, err = cpu.run(*argv, "--epochs", 3, **here, SIGNAL_AFTER_SAVES=1)
    assert (code, f"train --resume {run} --model mine_too:Net\n" in err) == (130, True), err
    code, _, err = cpu.run("train", "--resume", run, "--model", "mine_too:Net", **here)
    assert code == 0, err
    image, last = photos / "test" / "blue" / "0.png", run / "last.pt"
    given = "--model", "mine_too:Net"
    show = "show", "filters", "--checkpoint", last, "--output", mine / "filters"
    for path, *command in (
        (last, "train", "--resume", last),
        (last, "eval", last),
        (last, "predict", last, image),
        (run / "best.safetensors", "predict", run / "best.safetensors", image),
        (last, *show),
    ):
        code, out, err = cpu.run(*command, **here)
        refused = f"{path} names a model that is code: to run it, give --model mine_too:Net\n"
        assert (code, out, err) == (2, "", f"python -m cnn: {refused}")
        code, out, err = cpu.run(*command, *given, **here)
        assert code == 0, err
        if command[0] == "predict":
            assert out.split("\t")[1] == "blue"
    with pytest.raises(
        UsageError, match="names a model that is code: give model=, mine_too:Net itself"
    ):
        cnn.load(run)
    sys.path.insert(0, str(mine))
    from mine_too import Net  # type: ignore[import-not-found]

    for model in (Net, Net(3), lambda num_classes: Net(num_classes)):
        loaded, transform, classes = cnn.load(run, model=model)
        assert classes[int(loaded(transform(image)[None]).argmax())] == "blue"
        assert type(loaded[0]) is cnn.Conv2d
    with pytest.raises(UsageError, match="is 3x128, not 4x128"):
        cnn.load(run, model=Net(4))


NO_MODEL = {
    "none": "--model: mine_too:none returns a dict, not a torch.nn.Module",
    "bare": "--model: mine_too:bare returns a Flatten without parameters",
    "thousand": "--model: mine_too:thousand returns [1, 1000] for an image, not [1, 3]",
    "pair": "--model: mine_too:pair returns tuple for an image, not [1, 3]",
    "ends": "--model: mine_too:ends() fails: SystemExit: usage: net",
    "broken": "--model: mine_too:broken() fails: OSError: no such\\nnet",
    "failing": "--size: mine_too:failing does not take 32x32 pixels: KeyError: 'x'",
    "extra": "--model: mine_too:extra keeps _extra_state, not a tensor: no file can hold it",
    "frozen": "--freeze: nothing is left to train",
    "missing": "--model: mine_too:missing() fails: AttributeError: module 'mine_too' has no",
}


@pytest.mark.parametrize("name", NO_MODEL)
def test_a_function_that_gives_no_model(name, photos, mine, capsys):
    """In the current folder it is found where the command is not python -m cnn, too."""
    argv = "train", "--data", f"folder:{photos}", "--size", "32", "--batch-size", "8"
    assert NO_MODEL[name] in problem(capsys, *argv, "--model", f"mine_too:{name}")


class Ones(nn.Linear):
    """Knows what it was made with."""

    def __init__(self, *given: object, **options: object):
        super().__init__(1, 1)
        self.taken = given, options


def test_a_function_gets_what_it_has_parameters_for():
    given = {"num_classes": 3, "in_channels": 1, "image_size": 32}
    for function, taken in (
        (lambda: Ones(), {}),
        (lambda num_classes, more=2: Ones(num_classes=num_classes), {"num_classes": 3}),
        (lambda **options: Ones(**options), given),
    ):
        assert networks.create(function, **given).taken == ((), taken)


@pytest.fixture
def libraries(monkeypatch) -> dict[str, types.ModuleType]:
    """Stand-ins for timm and torchvision, which keep what they were asked for."""
    asked: list = []

    class Small(nn.Module):
        def __init__(self, classes: int, channels: int):
            super().__init__()
            self.stem = nn.Conv2d(channels, 4, 3, bias=False)
            self.fc = nn.Linear(4, classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.stem(x).mean((2, 3)))

    def create_model(name, pretrained, num_classes=1000, in_chans=3):
        asked.append((name, pretrained))
        return Small(num_classes, in_chans)

    def get_model(name, weights, num_classes=1000, **options):
        asked.append((name, weights, options))
        return Small(num_classes, 3)

    timm, torchvision = types.ModuleType("timm"), types.ModuleType("torchvision")
    timm.list_models = lambda: ["resnet18", "resnet50"]
    timm.create_model = create_model
    torchvision.models = types.ModuleType("torchvision.models")
    torchvision.models.list_models = lambda module: ["resnet18", "googlenet"]
    torchvision.models.get_model = get_model
    for module in (timm, torchvision, torchvision.models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_models_of_timm_and_of_torchvision(libraries, capsys):
    """Of the names that these list, without weights, which would be downloaded."""
    options = {"num_classes": 5, "in_channels": 1, "image_size": 32}
    for name in ("timm:resnet18", "timm:resnet50.a1_in1k", "torchvision:resnet18"):
        model = networks.create(name, **options)
        assert type(model.stem) is cnn.Conv2d
        assert (model.stem.in_channels, model.fc.out_features) == (1, 5)
        assert networks.create(name).fc.out_features == 1000
        assert not networks.runs_code(name)
    assert libraries[:4:2] == [("resnet18", False), ("resnet50.a1_in1k", False)]
    assert libraries[4] == ("resnet18", None, {})
    networks.create("torchvision:googlenet", **options)
    assert libraries[-1] == ("googlenet", None, {"aux_logits": False, "init_weights": True})
    for name, message in (
        ("timm:resnet-18", "--model: timm has no 'resnet-18': did you mean resnet18 or resnet50?"),
        ("timm:hf-hub:x/y", "--model: timm has no 'hf-hub:x/y'"),
        ("torchvision:resnet", "--model: torchvision has no 'resnet': did you mean resnet18?"),
    ):
        assert message in problem(capsys, "show", "architecture", "--model", name)


def test_a_library_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = "python -m cnn: --model: cannot import timm: "
    assert problem(capsys, "show", "maps", "--model", "timm:resnet18").startswith(message)


def test_unknown_names_are_told_what_they_may_mean(capsys):
    with pytest.raises(ValueError, match=r"got name='resnet-18': did you mean resnet18 or "):
        cnn.models.create("resnet-18")
    for argv, meant in (
        (("train", "--model", "vgg-16"), "did you mean vgg16"),
        (("train", "--data", "fashionmnist"), "did you mean fashion-mnist?"),
        (("eval", "x.pt", "--data", "cifar-10"), "did you mean cifar10?"),
        (("show", "maps", "--model", "alexnett"), "did you mean alexnet or"),
    ):
        assert meant in problem(capsys, *argv)


# Classifiers.


def squeezenet() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 10, 1, bias=False), nn.ReLU()
    )
    model.num_classes = 10  # type: ignore[assignment]
    return model


def googlenet() -> nn.Module:
    inner = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 10)})
    parts = {"stem": nn.Conv2d(3, 4, 3), "inner": nn.Linear(4, 10), "fc": nn.Linear(4, 10)}
    return nn.ModuleDict({**parts, "aux1": inner})


class Timm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Conv2d(4, 10, 1)
        self.last = nn.Linear(4, 10)

    def get_classifier(self):
        return self.head, self.body

    def reset_classifier(self, num_classes, global_pool=None):
        self.head, self.body = nn.Conv2d(4, num_classes, 1), nn.Linear(3, num_classes)


class Levit(nn.Module):
    """Of timm's: its head is a module of two layers."""

    def __init__(self):
        super().__init__()
        self.body, self.after = nn.Linear(3, 4), nn.Linear(10, 10)
        self.reset_classifier(10)

    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes):
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, num_classes))


CLASSIFIERS = {
    **{
        name: (lambda name=name: cnn.models.create(name, image_size=32), None)
        for name in (*("lenet5", "resnet18", "vgg11", "vgg_small"),)
    },
    "squeezenet": (squeezenet, ["2"]),
    "converted": (lambda: cnn.convert(squeezenet()), ["2"]),
    "googlenet": (googlenet, ["aux1.fc2", "fc"]),
    "timm": (Timm, ["head", "body"]),
    "levit": (Levit, ["head.1"]),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifier_and_nothing_else_is_new(name):
    build, expected = CLASSIFIERS[name]
    model = build().to(torch.float64).eval()
    expected = expected or [[n for n, _ in model.named_modules()][-1]]
    assert [*classifiers(model)] == expected
    before, layers = dict(model.named_parameters()), dict(model.named_modules())
    assert cnn.models.reset_classifier(model, 3) is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    new = {n for n in before if after[n] is not before[n] and not n.startswith("head.0")}
    assert new == {n for n in before if n.rpartition(".")[0] in expected}
    for n in new:
        assert (after[n].shape, after[n].dtype) == ((3, *before[n].shape[1:]), torch.float64)
        assert after[n].requires_grad
        assert after[n].abs().max() > 0
    for n in expected if name not in ("timm", "levit") else ():
        layer = model.get_submodule(n)
        assert layer is layers[n]
        assert not layer.training
        assert re.search("out_features=3|[0-9]+, 3,", layer.extra_repr())
    assert getattr(model, "num_classes", 3) == 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_what_has_no_classifier():
    with pytest.raises(
        ValueError, match="model must have a linear layer or a 1x1 convolution, got"
    ):
        cnn.models.reset_classifier(nn.Sequential(nn.Conv2d(3, 4, 3)), 3)
    for count in (0, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match=f"num_classes must be a positive int, .*={count!r}"):
            cnn.models.reset_classifier(lenet(), count)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got model=3"):
        cnn.models.reset_classifier(3, 3)  # type: ignore[type-var]
