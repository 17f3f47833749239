"""Folders of images: what is a class, a part or an image in them, and how parts are drawn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cnn import data
from cnn.errors import UsageError

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def picture(path: Path, colour: tuple[int, int, int] = (9, 9, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path)
    return path


def photos(folder: Path, classes: str = "blue red", count: int = 10) -> Path:
    """A folder for each class, of ``count`` images, the second of which lies deeper."""
    for name in classes.split():
        for number in range(count):
            place = folder / name / ("deep" if number == 1 else "")
            picture(place / f"{number}.png", COLOURS.get(name, (9, 9, 9)))
    return folder


def flat(folder: Path, count: int = 10) -> Path:
    """Images without classes."""
    for number in range(count):
        picture(folder / f"{number}.png")
    return folder


def load(folder: Path, **options) -> data.Data:
    return data.load(f"folder:{folder}", **{"size": 8, **options})


def names(part: data.ImageFiles, folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in part.paths}


def parts(folder: Path, **options) -> dict[str, str]:
    """The part of each file."""
    sets = load(folder, val=True, **options)
    pairs = (("train", sets.train), ("val", sets.val), ("test", sets.test))
    return {name: part for part, images in pairs for name in names(images, folder)}


def test_images_and_labels(tmp_path):
    sets = load(photos(tmp_path))
    assert sets.description.classes == ("blue", "red")
    assert len(names(sets.train, tmp_path) | names(sets.test, tmp_path)) == 20
    for part in (sets.train, sets.test):
        for index, path in enumerate(part.paths):
            image, label = part[index]
            assert (image.dtype, image.shape) == (torch.uint8, (3, 8, 8))
            assert label == path.is_relative_to(tmp_path / "red")
            assert tuple(image[:, 0, 0].tolist()) == [*COLOURS.values()][label]
    assert data.load(f"folder:{tmp_path}").train[0][0].shape == (3, 224, 224)


# Parts.


def test_shares_of_parts(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (tmp_path / "b").mkdir()
    for number in range(2000):  # of which none is read
        (folder / f"{number}.png").touch()
        (tmp_path / "b" / f"{number}.png").touch()
    drawn = [*parts(tmp_path).values()]
    assert drawn.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    assert drawn.count("val") / 4000 == pytest.approx(0.1, abs=0.02)
    sets = load(tmp_path)
    assert sets.val is None
    assert len(sets.train) == drawn.count("train") + drawn.count("val")
    assert sets.description == load(tmp_path, val=True).description


def test_the_seed_draws_parts(tmp_path):
    photos(tmp_path)
    first, again, other = (parts(tmp_path, seed=seed) for seed in (0, 0, 2**63 - 1))
    assert first == again != other


def test_a_new_a_renamed_or_a_lost_file_moves_no_other(tmp_path):
    before = parts(photos(tmp_path, count=40))
    for number in range(100, 160):
        picture(tmp_path / "blue" / f"{number}.png")
    after = parts(tmp_path)
    assert before.items() < after.items()
    moved = [after.pop(name) for name in ("blue/0.png", "red/3.png")]
    (tmp_path / "blue" / "0.png").rename(tmp_path / "red" / "100.png")
    (tmp_path / "red" / "3.png").unlink()
    rest = parts(tmp_path)
    del rest["red/100.png"]
    assert rest == after
    assert len(moved) == 2


def test_a_split_stays_after_a_copy_to_a_mac_and_in_any_locale(tmp_path):
    """There é is two characters; and in Latin-1, a file's two bytes of é are."""
    for form, folder in (("\u00e9", "plain"), ("e\u0301", "mac")):
        for name in ("t", "caf" + form):
            for number in range(30):
                picture(tmp_path / folder / name / f"{form}{number}.png")
    plain, mac = (load(tmp_path / name).description for name in ("plain", "mac"))
    assert plain == mac
    assert plain.classes == ("caf\u00e9", "t")
    code = (
        "import sys; from cnn import data; sets = data.load(f'folder:{sys.argv[1]}', 8);"
        "print(ascii(sets.description.classes), sets.description.identity, sys.flags.utf8_mode,"
        "sys.getfilesystemencoding())"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "plain")]
    told = subprocess.run(
        argv,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.split(" 0 ")[0] == f"{plain.classes!a} {plain.identity}"
    assert "ascii" in told


PARTS = {
    "train val test": ("train", "val", "test"),
    "Train Valid Test": ("Train", "Valid", "Test"),
    "TRAINING VALIDATION TESTING": ("TRAINING", "VALIDATION", "TESTING"),
    "training dev test": ("training", "dev", "test"),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_folder_may_come_split(case, tmp_path):
    train, val, test = PARTS[case]
    photos(tmp_path / train)
    photos(tmp_path / val, count=3)
    photos(tmp_path / test, count=2)
    (tmp_path / "notes").mkdir()
    sets = load(tmp_path)
    assert sets.description.classes == ("blue", "red")
    assert [len(part) for part in (sets.train, sets.val, sets.test)] == [20, 6, 4]
    assert names(sets.test, tmp_path / test) == {
        f"{name}/{number}" for name in COLOURS for number in ("0.png", "deep/1.png")
    }
    assert sets.notes == ()


@pytest.mark.parametrize("given", ["train", "train test", "train val"])
def test_parts_that_are_lacking_are_drawn_from_those_to_train_with(given, tmp_path):
    counts = {"train": 60, "val": 3, "test": 2}
    for part in given.split():
        photos(tmp_path / part, count=counts[part])
    drawn = parts(tmp_path)
    for part, count in counts.items():
        own = {name for name, each in drawn.items() if each == part}
        if part == "train":
            assert own < names(load(tmp_path).train, tmp_path) | {*drawn}
        elif part in given:
            assert len(own) == 2 * count
        else:
            assert 4 < len(own) < 40
            assert all(name.startswith("train/") for name in own)
    assert len(drawn) == sum(2 * counts[part] for part in given.split())
    whole = load(tmp_path)
    note = f"{tmp_path} has no test part: {len(whole.test)} images of train are used for it"
    assert whole.notes == (() if "test" in given else (note,))
    assert {name for name, part in drawn.items() if part == "test"} == names(whole.test, tmp_path)


def test_a_part_is_never_empty_and_lacking_classes_are_told(tmp_path):
    for count in range(2, 12):
        folder = photos(tmp_path / f"{count}", "a b c", count)
        sets = load(folder, val=True)
        for part, use in ((sets.train, "training"), (sets.val, "validation"), (sets.test, "test")):
            assert len(part)
            lacking = {0, 1, 2} - {*part.labels}
            told = [note for note in sets.notes if f"no {use} image" in note]
            assert len(told) == bool(lacking)
            for label in lacking:
                assert "abc"[label] in told[0].rpartition(": ")[2].split(", ")


# Classes.

CLASSES = {
    "a class called train": ("boat car train", "boat car train"),
    "a class called test": ("control test", "control test"),
    "Mac and Windows": ("__MACOSX a b $RECYCLE.BIN", "a b"),
    "hidden": ("a b .git .ipynb_checkpoints", "a b"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_what_is_a_class(case, tmp_path):
    folders, classes = CLASSES[case]
    for name in folders.split():
        flat(tmp_path / name)
    assert load(tmp_path).description.classes == tuple(classes.split())


def test_a_class_may_be_a_link_and_may_be_empty(tmp_path):
    photos(tmp_path / "far", "c", 8)
    photos(tmp_path / "set", "a b")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "far" / "c")
    (tmp_path / "set" / "none").mkdir()
    sets = load(tmp_path / "set")
    assert sets.description.classes == ("a", "b", "c", "none")
    assert {*sets.train.labels} == {0, 1, 2}
    assert f"{tmp_path}/set holds no training image of: none" in sets.notes


def two(folder: Path, first: str, second: str) -> Path:
    photos(folder / first)
    photos(folder / second)
    return folder


REFUSED = {
    "no folder": (lambda folder: folder / "none", "none is not a folder"),
    "a file": (lambda folder: picture(folder / "x.png"), "x.png is not a folder"),
    "nothing": (lambda folder: folder, "holds no training image"),
    "flat": (flat, "holds no training image"),
    "few": (lambda folder: photos(folder, count=1), "holds training images of only one class"),
    "one class": (
        lambda folder: photos(folder, "images"),
        "holds training images of only one class, images: give a folder with a folder for each",
    ),
    "one class of two": (
        lambda folder: (photos(folder, "a"), (folder / "b").mkdir())[0],
        "holds training images of only one class, a",
    ),
    "one class in train": (
        lambda folder: (photos(folder / "train", "a"), photos(folder / "test", "a"))[0].parent,
        "holds training images of only one class, a",
    ),
    "a class only to test": (
        lambda folder: (photos(folder / "train"), photos(folder / "test", "red horse"))[0].parent,
        "test holds the class horse, but .*train does not",
    ),
    "a class only to validate": (
        lambda folder: (photos(folder / "train"), photos(folder / "Dev", "Red red"))[0].parent,
        "Dev holds the class Red, but .*train does not",
    ),
    "two to train with": (
        lambda folder: two(folder, "train", "Training"),
        "two training folders: Training and train",
    ),
    "two to validate with": (
        lambda folder: two(photos(folder / "train").parent, "val", "dev"),
        "two validation folders: dev and val",
    ),
    "no train": (lambda folder: two(folder, "val", "test"), "holds test and val, .* but no train"),
    "parts without classes": (
        lambda folder: (flat(folder / "train"), flat(folder / "test"))[0].parent,
        "(train|test) holds no folders of classes",
    ),
    "test without classes": (
        lambda folder: (photos(folder / "train"), flat(folder / "test"))[0].parent,
        "test holds no folders of classes",
    ),
    "part or class": (
        lambda folder: (
            (photos(folder / "train", "steam electric"), flat(folder / "boat"))[0].parent
        ),
        "train can be a part or a class: rename it, or give .*train",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_hold_no_data_set(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as caught:
        load(make(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_one_class_in_two_spellings(tmp_path):
    for name in ("caf\u00e9", "cafe\u0301", "t"):
        picture(tmp_path / name / "x.png")
    with pytest.raises(UsageError, match="two folders of the class caf\u00e9"):
        load(tmp_path)


# Images.


def test_what_is_an_image(tmp_path):
    photos(tmp_path, "a b", 3)
    expected = names(load(tmp_path).train, tmp_path) | names(load(tmp_path).test, tmp_path)
    sound = (tmp_path / "a" / "0.png").read_bytes()
    for name in ("._0.png", ".hidden.png", ".ipynb_checkpoints/0-checkpoint.png", "notes.txt"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(sound)
    for name in ("__MACOSX/0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "deep/.git/x.png"):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(sound)
    picture(tmp_path / "a" / "folder.jpg" / "inside.PNG")
    picture(tmp_path / "b" / "X.JPEG")
    expected |= {"a/folder.jpg/inside.PNG", "b/X.JPEG", "b/gone.png", "b/around.png"}
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b" / "gone.png").symlink_to("nowhere")
    (tmp_path / "b" / "around.png").symlink_to("around.png")
    (tmp_path / "b" / "null.png").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    sets = load(tmp_path)
    assert names(sets.train, tmp_path) | names(sets.test, tmp_path) == expected
    for part in (sets.train, sets.test):
        for index, path in enumerate(part.paths):
            broken = path.name in ("gone.png", "around.png")
            assert (part[index][1] < 0) == broken, path


def test_images_in_no_class_are_told(tmp_path):
    photos(tmp_path)
    picture(tmp_path / "loose.png")
    (tmp_path / "readme.txt").touch()
    picture(tmp_path / ".hidden.png")
    note = f"{tmp_path} holds 1 images outside class folders: they are unused"
    assert note in load(tmp_path).notes


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    """And is not taken for an empty one."""
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    photos(tmp_path)
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UsageError, match=r"cannot read .*deep: Permission denied"):
        load(tmp_path)


# Commands.

TRAIN = ["train", "--model", "lenet5", "--size", 32, "--epochs", 1, "--batch-size", 8]


def test_a_run_keeps_its_split(cpu, tmp_path):
    """With its own seed, in ``eval`` and ``--resume``; a folder that has changed is told."""
    folder, run = photos(tmp_path / "set", count=30), tmp_path / "run"
    tests = {name for name, part in parts(folder, seed=7).items() if part == "test"}
    argv = [*TRAIN, "--data", f"folder:{folder}", "--seed", 7, "--output", run]
    code, _, err = cpu.run(*argv, "--epochs", 2)
    assert code == 0, err
    code, out, err = cpu.run("eval", run / "last.pt")
    assert code == 0, err
    assert f" of {len(tests)} images right" in out
    assert "has changed" not in err
    elsewhere = folder.rename(tmp_path / "elsewhere")
    code, _, err = cpu.run(*("train", "--resume", "--data", f"folder:{elsewhere}", "--output", run))
    assert code == 0, err
    for number in range(100, 130):
        picture(elsewhere / "red" / f"{number}.png")
    argv = ["eval", run / "last.pt", "--data", f"folder:{elsewhere}"]
    code, out, err = cpu.run(*argv)
    assert code == 0, err
    assert f"folder:{elsewhere} has changed since the training" in err
    for number in range(100, 130):
        (elsewhere / "red" / f"{number}.png").unlink()
    (elsewhere / "red" / "0.png").rename(elsewhere / "red" / "00.png")
    code, _, err = cpu.run("train", "--resume", "--data", f"folder:{elsewhere}", "--output", run)
    assert code == 2
    assert re.search("holds (other|.* training images, .*) when .*last.pt was saved", err)


def test_commands_tell_what_is_odd_about_a_folder(cpu, tmp_path):
    photos(tmp_path / "set" / "train")
    photos(tmp_path / "set" / "test", "red")
    argv = [*TRAIN, "--data", f"folder:{tmp_path}/set", "--output", tmp_path / "run"]
    note = f"{tmp_path}/set holds no test image of: blue\n"
    code, _, err = cpu.run(*argv)
    assert (code, err.startswith(note)) == (0, True)
    code, _, err = cpu.run("eval", tmp_path / "run" / "last.pt")
    assert (code, err.startswith(note)) == (0, True)


def test_classes_that_differ_are_named(cpu, tmp_path):
    argv = [*TRAIN, "--data", f"folder:{photos(tmp_path / 'set')}", "--output", tmp_path / "run"]
    assert cpu.run(*argv)[0] == 0
    other = photos(tmp_path / "other", "blue red yellow")
    code, out, err = cpu.run("eval", tmp_path / "run" / "last.pt", "--data", f"folder:{other}")
    assert (code, out) == (2, "")
    assert re.search("its classes are not those of .*last.pt: only one of them has yellow", err)
