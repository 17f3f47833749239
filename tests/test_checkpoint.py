"""Checkpoints are whole at any moment, run no code, and say what is wrong with them."""

import os
import re
from pathlib import Path

import pytest
import torch

import cnn
from cnn import checkpoint as checkpoints
from cnn.problem import Problem

CONTENTS = {key: {} for key in checkpoints.KEYS - {"format", "versions"}}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_and_load(tmp_path):
    paths = tmp_path / "best.pt", tmp_path / "last.pt"
    for step in (1, 2):
        checkpoints.save({**CONTENTS, "position": {"step": step}}, *paths)
        for path in paths:
            checkpoint = checkpoints.load(path)
            assert checkpoint["position"] == {"step": step}
            assert checkpoint["versions"]["torch"] == torch.__version__
            assert checkpoint["versions"].keys() == {
                "python",
                "torch",
                "triton",
                "numpy",
                "triton-cnn",
            }
    assert files(tmp_path) == ["best.pt", "last.pt"]


def test_the_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    """And the name before the end: file and folder are synchronised, in this order."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def synchronise(number):
        calls.append(str(Path(f"/proc/self/fd/{number}").readlink()))
        fsync(number)

    def rename(self, target):
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synchronise)
    monkeypatch.setattr(Path, "replace", rename)
    checkpoints.write(tmp_path / "x", b"new")
    part, *rest = calls
    assert re.fullmatch(rf"{tmp_path}/\.x\.\d+\.part", part)
    assert rest == ["rename", str(tmp_path)]


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoints.write(path, b"old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoints.write(path, b"new")
    assert caught.value.filename == str(path)
    assert files(tmp_path) == ["last.pt"]
    assert path.read_bytes() == b"old"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("file")
    checkpoints.write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


class Code:
    """Pickled, it would run code."""

    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


def cut(path: Path) -> None:
    checkpoints.save({**CONTENTS, "state_dict": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


BAD = {
    "none": (lambda path: None, "cannot read {path}: No such file or directory"),
    "folder": (lambda path: path.mkdir(), "cannot read {path}: Is a directory"),
    "text": (lambda path: path.write_text("text"), "{path} is damaged or not a checkpoint"),
    "empty": (lambda path: path.touch(), "{path} is damaged or not a checkpoint"),
    "cut": (cut, "{path} is damaged or not a checkpoint"),
    "code": (lambda path: torch.save({"format": Code()}, path), "{path} is damaged or not a"),
    "list": (lambda path: torch.save([1], path), "{path} is not a checkpoint of python -m cnn"),
    "foreign": (lambda path: torch.save({"epoch": 3}, path), "{path} is not a checkpoint of"),
    "newer": (
        lambda path: torch.save({"format": 99}, path),
        "{path} has format 99, this version reads 1",
    ),
    "lacking": (
        lambda path: (
            checkpoints.save({**CONTENTS} | {"format": 1}, path)
            or torch.save({k: v for k, v in torch.load(path).items() if k != "training"}, path)
        ),
        "{path} lacks training",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_checkpoint_is_named_and_left_alone(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[case]
    path = tmp_path / "x.pt"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(Problem) as caught:
        checkpoints.load(path)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not (tmp_path / "was-run").exists()


def test_a_state_dict_alone_is_a_model_if_it_is_named(tmp_path):
    path = tmp_path / "lenet.pth"
    model = cnn.models.lenet5(num_classes=7, in_channels=3)
    torch.save(model.state_dict(), path)
    parameters, checkpoint = checkpoints.load_parameters(path)
    assert checkpoint is None
    loaded = checkpoints.build("lenet5", parameters, 32, path)
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, size in (("lenet5", 28), ("vgg_small", 32)):
        words = f"does not hold the parameters of {name} for {size}x{size} pixels"
        with pytest.raises(Problem, match=words):
            checkpoints.build(name, parameters, size, path)


def test_a_run_begins_without_what_a_killed_one_was_writing(tmp_path):
    folder = tmp_path / "runs" / "new"
    checkpoints.prepare(folder)
    (folder / ".last.pt.123.part").touch()
    (folder / "last.pt").touch()
    checkpoints.prepare(folder)
    assert files(folder) == ["last.pt"]
