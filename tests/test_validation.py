"""Validation chooses what is kept and ends a run early; the test set is for eval alone."""

import math
import random
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import normed
from PIL import Image
from run_folders import assert_same_runs, files, numbers, start_twice
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cnn import __main__ as cli
from cnn import data, models
from cnn.cli.options import interval, interval_text
from cnn.data import Normalize, UnreadableImages
from cnn.errors import FAILURE, UsageError
from cnn.training import checkpoint as checkpoints
from cnn.training.evaluate import Answers, Evaluator, answers

Train = Callable[..., Path]


@pytest.fixture
def train(noise, tmp_path, monkeypatch) -> Train:
    """Train a small network, of which a validation gives one (loss, accuracy) after another."""
    monkeypatch.setattr(models, "create", lambda name, **options: normed(**options))

    def run(*results: tuple[float, float], folder: str = "run", given: str = "") -> Path:
        left = iter(results)
        monkeypatch.setattr(Evaluator, "__call__", lambda *rest: next(left))
        words = given.split() or ["--data", noise, "--batch-size", "48", "--keep-every", "1"]
        words += [] if given else ["--epochs", str(len(results))]
        cli.main(["train", "--device", "cpu", "--output", str(tmp_path / folder), *words])
        assert next(left, None) is None
        return tmp_path / folder

    return run


BEST = {
    "accuracy": ([(0.1, 0.5), (0.3, 0.75), (0.2, 0.625)], 2),
    "loss of equal accuracy": ([(0.3, 0.75), (0.1, 0.5), (0.2, 0.75)], 3),
    "the first of equals": ([(0.3, 0.75), (0.3, 0.75), (0.4, 0.75)], 1),
    "none is right": ([(0.3, 0.0), (0.3, 0.0), (0.2, 0.0)], 3),
}


@pytest.mark.parametrize("case", BEST)
def test_the_best_is_chosen_by_validation(case, train, capsys):
    results, best = BEST[case]
    folder = train(*results)
    assert [(row["val_loss"], row["val_accuracy"]) for row in numbers(folder)] == results
    assert checkpoints.load(folder / "best.pt")["position"]["epoch"] == best
    assert (folder / "best.pt").read_bytes() == (folder / f"epoch-{best}.pt").read_bytes()
    *_, outcome = capsys.readouterr().out.splitlines()
    accuracy = f"validation accuracy {results[best - 1][1]:.4f}"
    assert outcome == f"{folder}/best.pt holds epoch {best} of 3, {accuracy}"


class Untouchable:
    """A data set of which nothing but the length is asked for."""

    def __len__(self):
        return 40


def test_training_does_not_look_at_the_test_set(noise, tmp_path, monkeypatch):
    """Nor does eval, of another part."""

    def load(*args, val):
        return replace(data.load(*args, val=val), test=Untouchable())

    monkeypatch.setattr(cli, "load_data", load)
    monkeypatch.setattr(models, "create", lambda name, **options: normed(**options))
    argv = ["--data", noise, "--batch-size", "48", "--epochs", "1", "--output", str(tmp_path)]
    cli.main(["train", "--device", "cpu", *argv])
    cli.main(["eval", "--device", "cpu", str(tmp_path), "--split", "val"])
    with pytest.raises(SystemExit):
        cli.main(["eval", "--device", "cpu", str(tmp_path)])


PATIENCE = {
    "none": (0, [(0.5, 0.5)] * 5, 5),
    "one": (1, [(0.5, 0.5), (0.4, 0.625), (0.4, 0.625)], 3),
    "two": (2, [(0.5, 0.5), (0.4, 0.375), (0.3, 0.625), (0.4, 0.5), (0.4, 0.5)], 5),
    "a lower loss counts": (2, [(0.5, 0.5), (0.4, 0.5), (0.3, 0.5), (0.2, 0.5), (0.1, 0.5)], 5),
    "from the first": (3, [(0.5, 0.5), (0.6, 0.5), (0.6, 0.5), (0.6, 0.5)], 4),
}


@pytest.mark.parametrize("case", PATIENCE)
def test_a_run_stops_after_epochs_without_a_better_one(case, noise, train, capsys):
    """It says so in a line, and draws its curves; to go on with it changes nothing."""
    patience, results, last = PATIENCE[case]
    argv = f"--data {noise} --batch-size 48 --epochs 5 --patience {patience}"
    folder = train(*results, given=argv)
    line = f"stopped after epoch {last} of 5: none of the last {patience} epochs was better\n"
    out, err = capsys.readouterr()
    assert err.endswith(line) == (last < 5)
    assert len(numbers(folder)) == last
    assert (folder / "curves.png").exists()
    train(given="--resume")
    again, err = capsys.readouterr()
    assert again == out
    assert err.endswith(line) == (last < 5)
    assert len(numbers(folder)) == last


def test_stopping_early_survives_interruptions(cpu, noise, tmp_path):
    """And goes alike in several processes."""
    whole, parts, two = (tmp_path / name for name in ("whole", "parts", "two"))
    argv = ["train", "--data", noise, "--epochs", 60, "--batch-size", 24, "--patience", 2]
    assert cpu.run(*argv, "--output", whole)[0] == 0
    rows = numbers(whole)
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert len(rows) == best["epoch"] + 2 < 60
    code, _, err = cpu.run(*argv, "--output", parts, SIGNAL_AFTER_SAVES=1)
    while code == 130:
        code, out, err = cpu.run("train", "--resume", parts, SIGNAL_AFTER_SAVES=2)
    assert code == 0, err
    assert f"\nstopped after epoch {len(rows)} of 60: none of the last 2 epochs was better\n" in err
    assert f"{parts}/best.pt holds epoch {best['epoch']} of 60, " in out
    assert_same_runs(whole, parts)
    pair = start_twice(cpu, *argv, "--output", two)
    assert [fork.wait() for fork in pair] == [0, 0], pair[1].err.read_text()
    assert len(numbers(two)) == checkpoints.load(two / "last.pt")["position"]["epoch"] < 60
    assert pair[1].err.read_text() == ""


def test_an_interrupted_run_says_how_to_go_on(cpu, noise, tmp_path):
    """By a command that goes on as the run was started."""
    whole, parts = tmp_path / "whole", tmp_path / "it's a run"
    argv = ["train", "--data", noise, "--epochs", 2, "--batch-size", 24, "--seed", 3]
    assert cpu.run(*argv, "--output", whole)[0] == 0
    options = "--workers 1 --save-every 0.5m --keep-every 1 --broken skip"
    code, _, err = cpu.run(
        *argv, "--output", parts, "--overwrite", *options.split(), SIGNAL_AFTER_SAVES=1
    )
    *_, line = err.splitlines()
    place = f"{parts}/last.pt holds epoch 1 of 2 and 1 steps"
    begin = f"python -m cnn: interrupted; {place}; resume with: "
    assert (code, line[: len(begin)]) == (130, begin)
    python, module, name, *command = shlex.split(line.removeprefix(begin))
    assert [python, module, name] == ["python", "-m", "cnn"]
    assert command == ["train", "--resume", str(parts), *options.split()]
    assert cpu.run(*command)[0] == 0
    assert_same_runs(whole, parts)


def test_of_several_processes_one_says_how_to_go_on(cpu, noise, tmp_path):
    argv = ["train", "--data", noise, "--batch-size", 24, "--output", tmp_path, "--save-every", 1]
    pair = start_twice(cpu, *argv, SIGNAL="SIGTERM", SIGNAL_AFTER_SAVES=1)
    assert [fork.wait() for fork in pair] == [143, 143]
    command = f"resume with: torchrun ... -m cnn train --resume {tmp_path} --save-every 1\n"
    assert pair[0].err.read_text().endswith(command)
    assert pair[1].err.read_text() == ""


def test_an_interval_is_written_as_it_is_read():
    draw = random.Random(0)
    for text in ("1", "500", "10m", "0.1m", *(f"{draw.uniform(0, 1e4)}m" for _ in range(100))):
        value, minutes = interval(text)
        again, unit = interval(interval_text(value, minutes))
        assert (again, unit) == (pytest.approx(value, rel=1e-14), minutes)


def test_a_run_in_another_folder_takes_its_best_along(train, tmp_path, capsys):
    run = train((1.0, 0.5), (1.0, 0.25), (1.0, 0.25))
    other = train((1.0, 0.25), folder="other", given=f"--resume {run}/epoch-2.pt")
    assert (other / "best.pt").read_bytes() == (run / "best.pt").read_bytes()
    assert capsys.readouterr().out.endswith(
        f"{other}/best.pt holds epoch 1 of 3, validation accuracy 0.5000\n"
    )
    shutil.copy(run / "epoch-2.pt", tmp_path)
    train((1.0, 0.25), folder="alone", given=f"--resume {tmp_path}/epoch-2.pt")
    line = "alone/best.pt is missing; the best was epoch 1 of 3, validation accuracy 0.5000\n"
    assert capsys.readouterr().out.endswith(line)


@pytest.mark.parametrize("later", ["later", "damaged"])
def test_a_run_takes_no_other_best_along(later, train):
    run = train((1.0, 0.5), (1.0, 0.25), (1.0, 0.75 if later == "later" else 0.25))
    if later == "damaged":
        (run / "best.pt").write_bytes(b"PK\3\4 cut")
    other = train((1.0, 0.25), folder="other", given=f"--resume {run}/epoch-2.pt")
    assert not (other / "best.pt").exists()


@pytest.fixture(scope="module")
def finished(cpu, noise, tmp_path_factory) -> Path:
    """The folder of a run whose best epoch is not its last."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["train", "--data", noise, "--epochs", 60, "--batch-size", 24, "--patience", 1]
    assert cpu.run(*argv, "--output", folder)[0] == 0
    return folder


def shown(out: str) -> str:
    """What a command has said, but for its speed."""
    return re.sub(r"\d+ images/s", "", out)


def test_a_folder_stands_for_its_best_checkpoint(cpu, finished, tmp_path):
    """And to go on with, for its last."""
    image, picture = tmp_path / "x.png", tmp_path / "map"
    Image.new("L", (28, 28), 200).save(image)
    show = f"show maps --image {image} --output {picture} --checkpoint"
    for command, rest in (("eval", []), ("predict", [image]), (show, [])):
        said = []
        for place in (finished, finished / "best.pt"):
            code, out, err = cpu.run(*command.split(), place, *rest)
            assert code == 0, err
            said.append((shown(out), *(path.read_bytes() for path in tmp_path.glob("map.png"))))
        assert said[0] == said[1]
    code, out, err = cpu.run("train", "--resume", finished)
    last = checkpoints.load(finished / "last.pt")["position"]["epoch"]
    assert code == 0, err
    assert err.startswith(f"resumed {finished}/last.pt: epoch {last} of 60\n")


def test_the_working_folder_can_be_a_run(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    cli.main(["train", "--resume", "."])
    assert capsys.readouterr().err.startswith("resumed last.pt: epoch ")


def test_eval_takes_any_part(cpu, finished):
    """The accuracies of the parts are those of the log; their confusions are drawn apart."""
    found = {}
    for split, count in (("train", 96), ("val", 8), ("test", 40)):
        given = [] if split == "test" else ["--split", split]
        code, out, err = cpu.run("eval", finished, *given)
        assert (code, err) == (0, "")
        right = re.search(rf"^(\d+) of {count} images right, \d+ images/s$", out, re.MULTILINE)
        scores = r"^loss (\d\.\d{4})  top-1 accuracy (\d\.\d{4})  top-5 accuracy (\d\.\d{4})$"
        loss, first, fifth = map(float, re.search(scores, out, re.MULTILINE).groups())
        assert fifth >= first == round(int(right[1]) / count, 4)
        *_, kernels, line = out.splitlines()
        assert kernels == "kernels: aten (cpu)"
        name = {"train": "training", "val": "validation", "test": "test"}[split]
        assert line == f"{name} accuracy {int(right[1]) / count:.3f}"
        found[split] = loss, first
    best = max(numbers(finished), key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert found["val"] == (round(best["val_loss"], 4), round(best["val_accuracy"], 4))
    pictures = {"best-confusion.png", "best-val-confusion.png", "best-train-confusion.png"}
    assert pictures <= files(finished)


def test_eval_in_a_folder_that_cannot_be_written(cpu, finished, tmp_path):
    """Tells what it found; only a picture that was asked for must be."""
    run, picture = tmp_path / "run", tmp_path / "run" / "best-confusion.png"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("*-confusion.png"))
    picture.mkdir()
    code, out, err = cpu.run("eval", run)
    assert (code, err) == (0, f"{picture}: Is a directory\n")
    assert "confusion matrix" not in out
    assert out.splitlines()[-1].startswith("test accuracy 0.")
    code, out, err = cpu.run("eval", run, "--confusion", picture)
    assert (code, err) == (1, f"python -m cnn: {picture}: Is a directory\n")


def score(logits: Tensor, labels: list[int]) -> Answers:
    """What ``answers`` gives for a model that gives ``logits`` [N, classes]."""
    images = torch.arange(len(logits), dtype=torch.float32)[:, None, None, None]
    sets = TensorDataset(images, torch.tensor(labels))

    class Lookup(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits[x.flatten().long()]

    known = data.Description(("a", "b"), 1, (0.0,), (1.0,), pixels=False)
    prepare = Normalize(known, torch.device("cpu"))
    return answers(Lookup(), sets, prepare, "off", UnreadableImages(sets, "skip", print), 0)


def test_scores_of_a_worked_example():
    logits = torch.tensor([[6, 5, 4, 3, 2, 1.0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 9]])
    labels = [1, 5, 5]
    found = score(logits, labels)
    assert (found.right(), found.right(5)) == (1, 2)  # of equals the first five are likeliest
    assert found.ranked.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 0, 1, 2, 3]]
    rows = zip(logits.double().log_softmax(1), labels, strict=True)
    assert found.loss == pytest.approx(-sum(row[label].item() for row, label in rows) / 3)
    assert str(found) == f"loss {found.loss:.4f}  top-1 accuracy 0.3333  top-5 accuracy 0.6667"


def test_five_classes_have_no_top_five():
    found = score(torch.eye(5), [0, 1, 2, 3, 3])
    assert str(found) == f"loss {found.loss:.4f}  top-1 accuracy 0.8000"


class Files(TensorDataset):
    """Images of which one cannot be read."""

    def read(self, index: int) -> Tensor:
        raise UsageError(f"cannot read {index}", FAILURE)


def test_images_that_cannot_be_read_do_not_count():
    images = torch.tensor([[1, 0], [0, 0], [0, 0]], dtype=torch.uint8).mul(255).view(3, 1, 1, 2)
    sets, told = Files(images, torch.tensor([0, -2, 1])), []
    prepare = Normalize(data.Description(("a", "b"), 1, (0.0,), (1.0,)), torch.device("cpu"))
    found = answers(
        nn.Flatten(), sets, prepare, "off", UnreadableImages(sets, "skip", told.append), 0
    )
    assert (found.labels.tolist(), found.right(), told) == ([0, 1], 1, ["cannot read 1; skipped"])
    losses = math.log(1 + math.exp(-1)), math.log(2)
    assert found.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    with pytest.raises(UsageError, match=r"^cannot read 1; --broken skip continues without it$"):
        answers(nn.Flatten(), sets, prepare, "off", UnreadableImages(sets, "stop", print), 0)
