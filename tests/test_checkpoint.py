"""Checkpoints are whole at any moment, run no code, and say what is wrong with them."""

import errno
import os
import random
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from io import BytesIO
from pathlib import Path

import pytest
import torch
import triton

import cnn
from cnn.errors import UsageError
from cnn.files import write
from cnn.training import checkpoint as checkpoints
from cnn.training import weights

CONTENTS = {key: {} for key in checkpoints.KEYS - {"format", "versions"}}

EXAMPLES = int(os.environ.get("TRITON_CNN_EXAMPLES", "0"))
FLIPS = 300 * max(1, EXAMPLES)


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


def test_versions_need_no_installed_packages(monkeypatch):
    """A checkout has no metadata, and those of ROCm's or a nightly Triton have another name."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    known = checkpoints.versions()
    assert known["triton"] == triton.__version__
    assert known["triton-cnn"] == cnn.__version__


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
    write(tmp_path / "x", b"new")
    part, *rest = calls
    assert re.fullmatch(rf"{tmp_path}/\.x\.\d+\.part", part)
    assert rest == ["rename", str(tmp_path)]


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write(path, b"old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(path, b"new")
    assert caught.value.filename == str(path)
    assert files(tmp_path) == ["last.pt"]
    assert path.read_bytes() == b"old"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


class Code:
    """Pickled, it would run code."""

    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


def cut(path: Path) -> None:
    checkpoints.save({**CONTENTS, "state_dict": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def sealed(contents: object, path: Path) -> None:
    file = BytesIO()
    torch.save(contents, file)
    checkpoints.seal(file)
    path.write_bytes(file.getvalue())


WHOLE = {**CONTENTS, "format": checkpoints.FORMAT, "versions": {}}
BAD = {
    "none": (lambda path: None, "cannot read {path}: No such file or directory"),
    "folder": (lambda path: path.mkdir(), "cannot read {path}: Is a directory"),
    "text": (lambda path: path.write_text("text"), "{path} is damaged or not a checkpoint"),
    "empty": (lambda path: path.touch(), "{path} is damaged or not a checkpoint"),
    "cut": (cut, "{path} is damaged or not a checkpoint"),
    "code": (lambda path: torch.save({"format": Code()}, path), "{path} holds getattr, and rea"),
    "list": (lambda path: sealed([1], path), "{path} is not a checkpoint of python -m cnn"),
    "foreign": (lambda path: torch.save({"epoch": 3}, path), "{path} is not a checkpoint of"),
    "newer": (
        lambda path: sealed({"format": 99}, path),
        f"{{path}} has format 99, this version reads {checkpoints.FORMAT}",
    ),
    "lacking": (
        lambda path: sealed({k: v for k, v in WHOLE.items() if k != "training"}, path),
        "{path} lacks training",
    ),
    "without digest": (
        lambda path: torch.save(WHOLE, path),
        "{path} is damaged: it lacks the digest at its end",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_checkpoint_is_named_and_left_alone(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[case]
    path = tmp_path / "x.pt"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UsageError) as caught:
        checkpoints.load(path)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not (tmp_path / "was-run").exists()


def damages(whole: bytes) -> Iterator[bytes]:
    """The file with a bit flipped, with its end cut off, or with a block of zeros."""
    draw = random.Random(EXAMPLES)
    for _ in range(FLIPS):
        at = draw.randrange(len(whole))
        yield whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
    for end in (-1, -2, -22, *(draw.randrange(len(whole)) for _ in range(FLIPS // 4))):
        yield whole[:end]
    for block in range(0, len(whole), 4096):
        zeros = bytes(len(whole[block : block + 4096]))
        yield whole[:block] + zeros + whole[block + 4096 :]
    yield whole + b"\0"


def test_no_damage_is_taken_for_a_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    state = cnn.models.lenet5().state_dict()
    checkpoints.save({**CONTENTS, "state_dict": state}, path)
    assert torch.load(path).keys() == checkpoints.KEYS
    for contents in damages(path.read_bytes()):
        path.write_bytes(contents)
        for read in (checkpoints.load, weights.read):
            with pytest.raises(UsageError, match=f"^{path} is (damaged|not a checkpoint)"):
                read(path)


def test_no_damage_of_safetensors_is_used(tmp_path):
    """Nor are they taken for another's, which have no digest."""
    path = tmp_path / "best.safetensors"
    about = {"config": {"model": "lenet5"}, "description": {"classes": ("a", "b")}}
    weights.save({**about, "state_dict": cnn.models.lenet5().state_dict()}, path)
    parameters, found = weights.read(path)
    assert (len(parameters), found["config"]) == (10, about["config"])
    for contents in damages(path.read_bytes()):
        path.write_bytes(contents)
        with pytest.raises(UsageError, match=f"^{path} is damaged"):
            weights.read(path)


def test_no_damage_of_bare_parameters_changes_them(tmp_path):
    """A CRC guards each tensor and its name; between them nothing is read."""
    path = tmp_path / "bare.pt"
    state = cnn.models.lenet5().state_dict()
    torch.save(state, path)
    taken = 0
    for contents in damages(path.read_bytes()):
        path.write_bytes(contents)
        try:
            found, _ = weights.read(path)
        except UsageError:
            continue
        taken += 1
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    assert taken < 10


def test_parameters_without_crcs_can_be_read(tmp_path):
    path = tmp_path / "bare.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert weights.read(path)[0]["w"].tolist() == [1, 1, 1]


def test_a_run_begins_without_what_a_killed_one_was_writing(tmp_path):
    folder = tmp_path / "runs" / "new"
    with checkpoints.claimed(folder):
        assert files(folder) == [".lock"]
    parts = ".last.pt.123.part", ".epoch-3.pt.123.part", ".last.pt.try.9.part"
    for name in (*parts, ".last-confusion.png.9.part"):
        (folder / name).touch()
    (folder / "last.pt").touch()
    with checkpoints.claimed(folder):
        assert files(folder) == [".last-confusion.png.9.part", ".lock", "last.pt"]


def test_a_pipe_in_place_of_the_lock_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UsageError, match="cannot write"), checkpoints.claimed(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "given"),
    [
        (errno.EAGAIN, "{folder} is in use by another run: name another --output"),
        (errno.EACCES, "{folder} is in use by another run: name another --output"),
        (errno.EIO, "cannot lock {folder}: Input/output error"),
        (errno.ENOSYS, False),
        (errno.ENOLCK, False),
    ],
)
def test_a_lock_that_is_refused(number, given, tmp_path, monkeypatch):
    """By another run, by an error, or by a file system that knows none: then there is a run."""

    def refuse(file, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints.fcntl, "lockf", refuse)
    if given is False:
        with checkpoints.claimed(tmp_path) as locked:
            assert locked is False
        return
    with pytest.raises(UsageError) as caught, checkpoints.claimed(tmp_path):
        pass
    assert str(caught.value) == given.format(folder=tmp_path)
