"""``python -m cnn show``, the images it can be given and the weights it knows of."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import cnn
from cnn import __main__ as cli
from cnn import checkpoint as checkpoints
from cnn import data, show
from cnn.train import Config


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
    "deconvnet": ["--map", "1", "4", "--top", "2"],
    "evolution": ["--epochs", "10", "2", "--count", "2", "--guided"],
}


@pytest.mark.parametrize("what", show.TOOLS)
def test_each_tool_leaves_a_picture_and_a_page(run, tmp_path, capsys, what):
    place = tmp_path / "new" / "shown"
    given = ["--checkpoint", str(run / "last.pt"), "--limit", "3", "--output", str(place)]
    cli.main(["show", what, *given, *COMMANDS[what]])
    *table, picture, page = capsys.readouterr().out.splitlines()
    assert (picture, page) == (f"{place}.png", f"{place}.html")
    with Image.open(picture) as image:
        assert min(image.size) > 100
    assert "data:image/png;base64," in Path(page).read_text()
    assert f"<h1>{what} of {run / 'last.pt'}</h1>" in Path(page).read_text()
    assert {path.name for path in place.parent.iterdir()} == {"shown.png", "shown.html"}
