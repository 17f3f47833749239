"""The command line: training, its end and its resumption; testing; predicting; errors."""

import csv
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import normed
from PIL import Image
from run_folders import assert_same_runs, await_file, files, numbers, start_twice
from torch import nn
from torch.utils.data import TensorDataset

import cnn
from cnn import __main__ as cli
from cnn import data, models
from cnn.console import Progress
from cnn.data import Normalize, UnreadableImages
from cnn.training import checkpoint as checkpoints
from cnn.training import log
from cnn.training.distributed import ProcessGroup
from cnn.training.evaluate import Evaluator
from cnn.training.run import Run
from cnn.training.signals import ignore_in_worker
from kernels.device import INTERPRET

EXAMPLES = int(os.environ.get("TRITON_CNN_EXAMPLES", "0"))
RUN = ["last.pt", "best.pt", "best.safetensors", "log.csv", "log.jsonl", "curves.png"]


@pytest.fixture
def few_digits(monkeypatch):
    """48 digits to train with, 24 to validate and 24 to test with: the interpreter takes its time.

    Of them eval asks for those to test with alone.
    """

    def load(*args, val):
        sets = data.load(*args, val=True)
        train, validate, test = (
            TensorDataset(*part[:count])
            for part, count in ((sets.train, 48), (sets.val, 24), (sets.test, 24))
        )
        return replace(sets, train=train, test=test, val=validate if val else None)

    monkeypatch.setattr(cli, "load_data", load)


def test_command_line_trains_through_the_kernels(few_digits, tmp_path, capfd):
    """And ``eval`` tests the best of what it left, with a table of the classes."""
    folder = tmp_path / "run"
    given = ["--batch-size", "32", "--keep-every", "2", "--output", str(folder)]
    cli.main(["train", "--epochs", "2", *given])
    trained, log = capfd.readouterr()
    assert files(folder) == {*RUN, "epoch-2.pt"}
    assert checkpoints.kept(folder) == {2: folder / "epoch-2.pt"}
    assert (folder / "epoch-2.pt").read_bytes() == (folder / "last.pt").read_bytes()
    kernels, outcome = trained.splitlines()
    if INTERPRET:
        assert kernels == "kernels: triton (interpreter)"
    else:
        assert kernels == f"kernels: triton (cuda:{torch.cuda.get_device_name()})"
    task, *lines = log.splitlines()
    assert task.startswith("training lenet5, 61,706 parameters, on c")
    assert task.endswith(
        f"; images of digits: 48 training, 24 validation, 24 test; output in {folder}"
    )
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["images"]) for row in rows] == [("1", "32"), ("2", "32")]
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    accuracy = f"validation accuracy {float(best['val_accuracy']):.4f}"
    assert outcome == f"{folder}/best.pt holds epoch {best['epoch']} of 2, {accuracy}"
    cli.main(["eval", str(folder)])
    table, *tested = re.split(r"(?=kernels|test accuracy)", capfd.readouterr().out)
    right = re.search(r"^(\d+) of 24 images right", table, re.MULTILINE)
    assert tested == [f"{kernels}\n", f"test accuracy {int(right[1]) / 24:.3f}\n"]
    assert re.search(r"precision +recall +f1-score +support\n", table)
    assert len(re.findall(r"^ +\d( +[01]\.\d{3}){3} +\d+$", table, re.MULTILINE)) == 10
    for picture in ("curves.png", "best-confusion.png"):
        assert np.ptp(np.asarray(Image.open(folder / picture))) > 0


@pytest.mark.parametrize("given", [{}, {"fprop_kernel": 1}], ids=["none", "one"])
def test_the_line_on_kernels_comes_from_launches(given, monkeypatch):
    monkeypatch.setattr(cli, "launches", lambda: given)
    assert ("triton" in cli.engine(torch.device("cpu" if INTERPRET else "cuda"))) == bool(given)


def test_accuracy_and_loss_count():
    images = torch.eye(4).mul(255).to(torch.uint8).view(4, 1, 2, 2).repeat(300, 1, 1, 1)
    labels = torch.tensor([0, 1, 2, 0]).repeat(300)
    sets = TensorDataset(images, labels)
    prepare = Normalize(data.Description(("a",), 2, (0.0,), (1.0,)), torch.device("cpu"))
    test = Evaluator(
        sets,
        prepare,
        "off",
        UnreadableImages(sets, "stop", print),
        ProcessGroup(torch.device("cpu")),
        0,
    )
    calls = []
    loss, accuracy = test(nn.Flatten(), lambda: calls.append(0))
    assert accuracy == 0.75
    right = -torch.eye(4)[0].log_softmax(0)
    assert loss == pytest.approx((3 * right[0] + right[1]).item() / 4)
    assert len(calls) == 5


KINDS = {
    "sgd": "--optimizer sgd --schedule cosine --channels-last --label-smoothing 0.1",
    "ema": "--ema 0.9 --schedule constant --augment --workers 2",
    "dropout": "--model vgg_small --weight-decay 0.1",
    "bf16": "--amp bf16",
    "fp16": "--amp fp16",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(kind, cpu, noise, tmp_path):
    """Ctrl-C finishes the step, saves and exits 130 in one line."""
    argv = ["train", "--data", noise, "--epochs", 2, "--batch-size", 24, *KINDS[kind].split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cpu.run(*argv, "--output", whole)[0] == 0
    every_step = [*argv, "--output", parts, "--save-every", 1]
    code, out, err = cpu.run(*every_step, SIGNAL_AFTER_SAVES=3)  # only validation is left
    assert (code, out, err.count("\n")) == (130, "", 2)
    place = f"{parts}/last.pt holds epoch 0 of 2 and 4 steps"
    assert f"\npython -m cnn: interrupted; {place}; resume with: " in err
    code, out, err = cpu.run(*every_step, "--resume", SIGNAL_AFTER_SAVES=3)  # in the next epoch
    assert code == 130
    assert f"{parts}/last.pt holds epoch 1 of 2 and 3 steps; resume with: " in err
    code, out, err = cpu.run("train", "--resume", "--output", parts)
    assert (code, out.splitlines()[0]) == (0, "kernels: aten (cpu)"), err
    assert err.startswith(f"resumed {parts}/last.pt: epoch 1 of 2 and 3 steps\n")
    assert files(parts) == files(whole) == {*RUN}
    assert_same_runs(whole, parts)


def test_a_run_that_is_killed_again_and_again_goes_on_with_the_same_bits(cpu, noise, tmp_path):
    """SIGKILL at drawn moments loses at most the steps since the last checkpoint."""
    draw = random.Random(EXAMPLES)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    kills = 20 * max(1, EXAMPLES)
    argv = ["train", "--data", noise, "--epochs", kills, "--batch-size", 4, "--save-every", 7]
    assert cpu.run(*argv, "--output", whole)[0] == 0
    resume, done = [], []
    for _ in range(kills):
        moment = {"SIGNAL_AFTER_SAVES": draw.randint(1, 2), "SIGNAL_DELAY": draw.uniform(0, 0.03)}
        code, *_ = cpu.run(*argv, "--output", parts, *resume, SIGNAL="SIGKILL", **moment)
        assert code == -signal.SIGKILL
        position = checkpoints.load(parts / "last.pt")["position"]
        assert position["step"] % 7 == 0
        done.append((position["epoch"], position["step"]))
        resume = ["--resume"]
    assert done == sorted({*done})
    assert cpu.run(*argv, "--output", parts, "--resume")[0] == 0
    assert files(parts) == {*RUN}
    assert_same_runs(whole, parts)


def assert_nearly_same(first: Path, second: Path) -> None:
    """Two folders hold the same run to rounding."""
    one, other = (checkpoints.load(folder / "last.pt")["state_dict"] for folder in (first, second))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)
    for row, same in zip(numbers(first), numbers(second), strict=True):
        assert row["images"] == same["images"] == 96
        for name in ("train_loss", "val_loss"):
            assert row[name] == pytest.approx(same[name], rel=1e-4)
        assert row["val_accuracy"] == pytest.approx(same["val_accuracy"], abs=1.5 / 8)


def test_two_processes_train_as_one(cpu, noise, tmp_path):
    """To rounding; stopped, they go on with the same bits, and one goes on with what they did."""
    argv = ["train", "--data", noise, "--epochs", 2, "--batch-size", 24, "--optimizer", "sgd"]
    one, two, parts, less = (tmp_path / name for name in ("one", "two", "parts", "less"))
    assert cpu.run(*argv, "--output", one)[0] == 0
    first, second = start_twice(cpu, *argv, "--output", two)
    assert (first.wait(), second.wait()) == (0, 0), second.err.read_text()
    assert (second.out.read_text(), second.err.read_text()) == ("", "")
    assert first.out.read_text().startswith(f"kernels: aten (cpu)\n{two}/best.pt holds epoch ")
    assert " on cpu in 2 processes; " in first.err.read_text()
    assert files(two) == {*RUN}
    assert_nearly_same(one, two)

    stop = {"SIGNAL": "SIGTERM", "SIGNAL_AFTER_SAVES": 2}  # the first tells the second
    pair = start_twice(cpu, *argv, "--output", parts, "--save-every", 1, **stop)
    assert [fork.wait() for fork in pair] == [143, 143]
    assert checkpoints.load(parts / "last.pt")["position"]["step"] == 3
    assert len(checkpoints.load(parts / "last.pt")["training"]["processes"]) == 2
    shutil.copytree(parts, less)
    pair = start_twice(cpu, "train", "--output", parts, "--resume")
    assert [fork.wait() for fork in pair] == [0, 0]
    assert_same_runs(two, parts)
    assert cpu.run("train", "--output", less, "--resume")[0] == 0
    assert_nearly_same(one, less)


def test_two_processes_validate_the_model_that_is_saved(cpu, noise, tmp_path):
    """Their batch statistics differ; the first's are kept, and validated by both."""
    argv = ["train", "--data", noise, "--epochs", 1, "--batch-size", 24, "--model", "normed"]
    pair = start_twice(cpu, *argv, "--output", tmp_path)
    assert [fork.wait() for fork in pair] == [0, 0], pair[0].err.read_text()
    model = normed()
    model.load_state_dict(checkpoints.load(tmp_path / "last.pt")["state_dict"])
    sets = data.load(noise, val=True)
    alone = torch.device("cpu")
    rest = "off", UnreadableImages(sets.val, "stop", print), ProcessGroup(alone), 0
    validate = Evaluator(sets.val, Normalize(sets.description, alone), *rest)
    loss, _ = validate(model, lambda: None)
    assert numbers(tmp_path)[0]["val_loss"] == pytest.approx(loss, rel=1e-6)


def test_a_second_ctrl_c_ends_at_once(cpu, noise, tmp_path):
    argv = ["train", "--data", noise, "--batch-size", 24, "--output", tmp_path, "--save-every", 1]
    code, out, err = cpu.run(*argv, SIGNAL_AFTER_SAVES=2, SIGNAL_TIMES=2)
    assert (code, out) == (130, "")
    assert err.endswith("\npython -m cnn: interrupted\n")
    assert checkpoints.load(tmp_path / "last.pt")["position"]["step"] == 2


STOPS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_to_all_processes_of_a_run_saves_it(name, cpu, noise, tmp_path):
    """As schedulers and terminals send it: the workers that load images go on until it is saved."""
    argv = ["train", "--data", noise, "--epochs", 100000, "--batch-size", 4, "--workers", 2]
    fork = cpu.start(*argv, "--output", tmp_path, "--save-every", 1, GROUP=1)
    await_file(tmp_path / "last.pt")
    os.killpg(fork.pid, signal.Signals[name])
    assert fork.wait() == 128 + signal.Signals[name], fork.err.read_text()
    *_, line = fork.err.read_text().splitlines()
    position = checkpoints.load(tmp_path / "last.pt")["position"]
    words = f"{tmp_path}/last.pt holds epoch {position['epoch']} of 100000"
    words += f" and {position['step']} steps" if position["step"] else ""
    assert line.startswith(f"python -m cnn: interrupted; {words}; resume with: ")


def test_nohup_keeps_a_run_alive(cpu, noise, tmp_path):
    argv = ["train", "--data", noise, "--epochs", 2, "--batch-size", 24, "--save-every", 1]
    stop = {"SIGNAL": "SIGHUP", "SIGNAL_AFTER_SAVES": 2}
    code, _, err = cpu.run(*argv, "--output", tmp_path / "nohup", IGNORED="SIGHUP", **stop)
    assert code == 0, err
    assert cpu.run(*argv, "--output", tmp_path / "plain", **stop)[0] == 129


def test_a_run_is_saved_when_its_terminal_is_gone(cpu, noise, tmp_path):
    """Then what it tells fails, of a bar as of a line."""
    shown, terminal = os.openpty()
    argv = ["train", "--data", noise, "--epochs", 100000, "--batch-size", 4, "--save-every", 1]
    fork = cpu.start(*argv, "--output", tmp_path, STDERR=os.ttyname(terminal))
    await_file(tmp_path / "last.pt")
    os.close(shown)
    os.close(terminal)
    time.sleep(0.5)
    reached = checkpoints.load(tmp_path / "last.pt")["position"]
    os.kill(fork.pid, signal.SIGHUP)
    assert fork.wait() == 128 + signal.SIGHUP
    position = checkpoints.load(tmp_path / "last.pt")["position"]
    assert (position["epoch"], position["step"]) > (reached["epoch"], reached["step"])


def test_a_worker_ends_with_its_parent_alone():
    """By a SIGTERM of the process that started it, though not by another's."""
    context = multiprocessing.get_context("fork")
    up = context.Event()
    worker = context.Process(target=work, args=(up,), daemon=True)
    worker.start()
    assert up.wait(60)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def work(up) -> None:
    ignore_in_worker(0)
    up.set()
    time.sleep(600)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    progress = Progress("epoch 1/2", 100, 20, "image")
    assert progress.advance(30)
    progress.show(loss="0.5", accuracy="0.75")
    assert progress.advance(49)
    assert not progress.advance(1)  # the end of an epoch has a line of its own
    progress.close()
    assert not Progress("other", 100, 0, "image", quiet=True).advance(10)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"epoch 1/2  50/100  loss 0\.5  accuracy 0\.75  \d+ images/s\n", err)


def test_tensorboard_gets_each_epoch_where_it_is_installed(monkeypatch, tmp_path):
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, *scalar):
            told.append(scalar)

        def flush(self):
            told.append("flush")

    board = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(log, "find_spec", lambda name: name == "tensorboard")
    rows = [{"epoch": epoch, "val_loss": 0.5 / epoch} for epoch in (1, 2)]
    log.RunLog(tmp_path, rows[:1]).write(rows, last=False)
    assert told == [(str(tmp_path), 2), ("epoch", 2, 2), ("val_loss", 0.25, 2), "flush"]
    assert (tmp_path / "log.csv").read_text() == "epoch,val_loss\n1,0.5\n2,0.25\n"


def test_drawing_without_matplotlib_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = [{"epoch": 1, "train_loss": 1, "val_loss": 1, "train_accuracy": 1, "val_accuracy": 1}]
    log.RunLog(tmp_path, 0).write(rows, last=True)
    line = "drawing curves needs matplotlib: pip install 'triton-cnn[train]'\n"
    assert capsys.readouterr().err == line
    assert files(tmp_path) == {"log.csv", "log.jsonl"}


def test_on_the_cpu_without_the_interpreter_nothing_is_launched(cpu, noise, tmp_path):
    """Twice: the second run replaces the first where it is told to."""
    argv = ["train", "--data", noise, "--epochs", 1, "--batch-size", 24, "--output", tmp_path]
    code, out, _ = cpu.run(*argv)
    (tmp_path / "notes").touch()
    argv += ["--overwrite", "--save-every", 1]
    assert cpu.run(*argv, SIGNAL_AFTER_SAVES=1)[0] == 130
    assert files(tmp_path) == {"last.pt", "notes"}
    assert (code, cpu.run(*argv)[1]) == (0, out)
    best = re.escape(f"{tmp_path}/best.pt holds epoch 1 of 1, validation accuracy")
    assert re.fullmatch(rf"kernels: aten \(cpu\)\n{best} 0\.\d{{4}}\n", out)


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A file with a bit flipped, cut, or with a block of zeros."""
    at = draw.randrange(len(whole))
    other = draw.choice(
        (
            whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :],
            whole[:at],
            whole[:at] + bytes(min(512, len(whole) - at)) + whole[at + 512 :],
        )
    )
    return other if other != whole else damaged(whole, draw)  # the block was one of zeros


def test_no_damage_to_any_file_of_a_run_is_used(cpu, noise, tmp_path):
    """Of checkpoints all is refused, by whatever reads them; logs and curves are made anew."""
    draw = random.Random(EXAMPLES)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["train", "--data", noise, "--epochs", 3, "--batch-size", 24, "--keep-every", 1]
    assert cpu.run(*argv, "--output", whole)[0] == 0
    assert cpu.run(*argv, "--output", parts, SIGNAL_AFTER_SAVES=2)[0] == 130
    show = f"show filters --output {tmp_path}/filters --checkpoint"
    begin = f"train --output {tmp_path}/new --init"
    for path in (*sorted(parts.glob("*.pt")), parts / "best.safetensors"):
        sound = path.read_bytes()
        resume = "train --resume" if path.suffix == ".pt" else begin
        for command in (resume, begin, "eval", "predict", show):
            path.write_bytes(damaged(sound, draw))
            before = {path: path.read_bytes() for path in parts.iterdir()}
            words = [*command.split(), path, *([whole] if command == "predict" else [])]
            code, out, err = cpu.run(*words)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert f"{path} is damaged" in err
            assert before == {path: path.read_bytes() for path in parts.iterdir()}
        path.write_bytes(sound)
    for name in ("log.csv", "log.jsonl"):
        (parts / name).write_bytes(damaged((parts / name).read_bytes(), draw))
    assert cpu.run(*argv, "--output", parts, "--resume")[0] == 0
    assert_same_runs(whole, parts)


PARTS = ["best.pt", "best.safetensors", "epoch-1.pt", "log.csv", "log.jsonl", "curves.png"]


@pytest.fixture(scope="module")
def finished(cpu, noise, tmp_path_factory) -> Path:
    """The folder of a run that is over."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["train", "--data", noise, "--epochs", 1, "--batch-size", 24, "--keep-every", 1]
    assert cpu.run(*argv, "--output", folder)[0] == 0
    return folder


@pytest.mark.parametrize("name", PARTS)
def test_no_result_of_a_run_is_replaced_unless_it_is_said(name, cpu, noise, finished, tmp_path):
    """Not by a new run, and not by one that goes on from elsewhere."""
    shutil.copy(finished / name, tmp_path)
    before = (tmp_path / name).read_bytes()
    argv = ["train", "--data", noise, "--epochs", 1, "--batch-size", 24, "--output", tmp_path]
    line = f"python -m cnn: {tmp_path} holds a run: --resume it, --overwrite it, or name another"
    for more in ([], ["--resume", finished / "last.pt"], ["--lr", 1e30]):
        code, out, err = cpu.run(*argv, *more)
        assert (code, out) == (2, "")
        assert err.startswith(line)
        assert files(tmp_path) == {name}
        assert (tmp_path / name).read_bytes() == before
    code, out, err = cpu.run(*argv, "--overwrite", "--save-every", 1, SIGNAL_AFTER_SAVES=1)
    assert (code, files(tmp_path)) == (130, {"last.pt"})


def test_a_folder_has_one_run_at_a_time(cpu, noise, tmp_path):
    """A second start is refused, a killed run keeps nobody out."""
    argv = ["train", "--data", noise, "--batch-size", 4, "--output", tmp_path]
    argv += ["--workers", 1, "--save-every", 1]
    first = cpu.start(*argv, "--epochs", 100000)
    await_file(tmp_path / "last.pt")
    for more in ([], ["--overwrite"], ["--resume"]):
        code, out, err = cpu.run(*argv, *more)
        line = f"python -m cnn: {tmp_path} is in use by another run: name another --output\n"
        assert (code, out, err) == (2, "", line)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    resumed = "train", "--resume", tmp_path / "last.pt", "--save-every", 1
    code, out, err = cpu.run(*resumed, SIGNAL_AFTER_SAVES=1)
    assert code == 130, err


@pytest.mark.parametrize("pair", range(5 * max(1, EXAMPLES)))
def test_of_two_starts_at_once_one_is_a_whole_run(pair, cpu, noise, tmp_path):
    argv = ["train", "--data", noise, "--batch-size", 24, "--epochs", 2, "--save-every", 1]
    seeds = 2 * pair, 2 * pair + 1
    both = [cpu.start(*argv, "--seed", seed, "--output", tmp_path) for seed in seeds]
    codes = [fork.wait() for fork in both]
    # If one ends before the other starts, what it has left is in the other's way.
    assert sorted(codes) == [0, 2], [fork.err.read_text() for fork in both]
    checkpoint = checkpoints.load(tmp_path / "last.pt")
    assert checkpoint["config"]["seed"] == seeds[codes.index(0)]
    assert checkpoint["position"]["epoch"] == 2


def test_a_run_goes_back_to_its_best_only_if_it_is_said(cpu, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    argv = ["train", "--resume", run / "best.pt"]
    assert cpu.run(*argv)[0] == 2
    assert {path: path.read_bytes() for path in run.iterdir()} == {
        run / path.name: path.read_bytes() for path in finished.iterdir()
    }
    code, _, err = cpu.run(*argv, "--overwrite")
    assert (code, files(run)) == (0, files(finished)), err


def test_a_run_that_was_killed_before_its_last_checkpoint(cpu, finished, tmp_path):
    """Of the first epoch, after its best: a line says how to go on, and so it goes on."""
    for name in ("best.pt", "best.safetensors", "log.csv"):
        shutil.copy(finished / name, tmp_path)
    argv = "train", "--resume"
    code, out, err = cpu.run(*argv, tmp_path)
    best = tmp_path / "best.pt"
    hint = f"--resume {best} --overwrite continues from its best"
    lacking = f"python -m cnn: cannot read {tmp_path}/last.pt: No such file or directory; {hint}\n"
    assert (code, out, err) == (2, "", lacking)
    code, _, err = cpu.run(*argv, best, "--overwrite")
    assert code == 0, err
    assert f"resumed {best}: epoch 1 of 1" in err


def test_a_finished_run_is_whole_in_another_folder(cpu, finished, tmp_path):
    code, _, err = cpu.run("train", "--resume", finished, "--output", tmp_path)
    assert (code, files(tmp_path)) == (0, files(finished) - {"epoch-1.pt", "curves.png"}), err
    assert_same_runs(finished, tmp_path)
    assert (tmp_path / "best.pt").read_bytes() == (finished / "best.pt").read_bytes()


def changed(part: str, **changes: object):
    """A part of a checkpoint with other values, or without those that are None."""

    def change(checkpoint: dict) -> None:
        values = {**checkpoint[part], **changes}
        checkpoint[part] = {key: value for key, value in values.items() if value is not None}

    return change


MALFORMED = {
    "the configuration in {} holds warp, which this version": changed("config", warp=1),
    "the configuration in {} has lr='fast', which is not float | None": changed(
        "config", lr="fast"
    ),
    "the configuration in {} has optimizer='adam', none of adamw": changed(
        "config", optimizer="adam"
    ),
    "the configuration in {} has model=None, which is not str": changed("config", model=None),
    "{} has position=3, which is not dict": lambda checkpoint: checkpoint.update(position=3),
    "the position in {} has step='1', which is not int": changed("position", step="1"),
    "the position in {} lacks results of its 1 epochs": changed(
        "position", rows=[{"epoch": 1, "val_accuracy": 0.5}]
    ),
    "the position in {} lacks results of its 2 epochs": changed("position", epoch=2),
    "the description in {} lacks mean": changed("description", mean=None),
    "the description in {} has 1 means and 2 deviations": changed("description", std=(1.0, 1.0)),
    "{} has a parameter x=1, which is not a tensor": changed("state_dict", x=1),
    "{} does not fit this run: KeyError: 'optimizer'": changed("training", optimizer=None),
    "{} does not fit this run: TypeError: ": changed("training", model=3),
    "{} does not fit this run: RuntimeError: ": changed("training", model={}),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_a_checkpoint_that_is_no_whole_run_is_named(message, finished, tmp_path, capsys):
    """As another version may write it: sealed, but not as this one has it."""
    path, other = tmp_path / "last.pt", tmp_path / "other"
    checkpoint = checkpoints.load(finished / "last.pt")
    MALFORMED[message](checkpoint)
    file = BytesIO()
    torch.save(checkpoint, file)
    checkpoints.seal(file)
    path.write_bytes(file.getvalue())
    shutil.copytree(finished, other)
    for more in ([], ["--output", str(other), "--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--resume", str(path), "--device", "cpu", *more])
        err = capsys.readouterr().err
        assert (stop.value.code, err.count("\n")) == (2, 1)
        assert message.format(path) in err
    assert (files(tmp_path), path.read_bytes()) == ({"last.pt", "other"}, file.getvalue())
    assert files(other) == files(finished)


def paint(folder: Path) -> Path:
    """Twelve images each of blue and of red, and a broken one."""
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (32, 40), colour).save(folder / name / f"{number}.png")
    (folder / "red" / "broken.png").write_text("no image")
    return folder


def test_a_folder_of_images_with_a_broken_one(cpu, tmp_path):
    """It stops the program, or does not count. The model then names images; its file is tested."""
    images, run = paint(tmp_path / "images"), tmp_path / "run"
    source = "--data", f"folder:{images}", "--size", 32
    argv = ["train", *source, "--epochs", 8, "--batch-size", 10, "--output", run]
    code, out, err = cpu.run(*argv, "--seed", 4)
    reason = f"cannot read {images}/red/broken.png: cannot identify image file"
    assert (code, out) == (1, "")
    assert err.endswith(f"\npython -m cnn: {reason}; --broken skip continues without it\n")
    code, out, err = cpu.run(*argv, "--seed", 4, "--broken", "skip", "--workers", 1)
    assert code == 0, err
    assert f"\n{reason}; skipped\nepoch 1/8" in err
    assert "1 unreadable images skipped" in err
    assert out.endswith(", validation accuracy 1.0000\n")

    red, broken, blue = images / "red/3.png", images / "red/broken.png", images / "blue"
    code, out, err = cpu.run("predict", run / "best.pt", red, broken, blue, "--top", 3)
    assert (code, err) == (1, f"python -m cnn: {reason}; skipped\n")
    first, *others = [line.split("\t") for line in out.splitlines()]
    assert first[:2] == [str(red), "red"]
    assert float(first[2]) + float(first[4]) == pytest.approx(1, abs=1e-3)
    assert [line[:2] for line in others] == [[str(path), "blue"] for path in sorted(blue.iterdir())]

    weights, picture = tmp_path / "weights.pth", tmp_path / "confusion.png"
    torch.save(checkpoints.load(run / "last.pt")["state_dict"], weights)
    argv = ["eval", weights, *source, "--model", "lenet5", "--limit", 3]
    code, out, err = cpu.run(*argv, "--confusion", picture)
    assert code == 0, err
    assert "3 of 3 images right, " in out
    assert out.endswith("test accuracy 1.000\n")
    assert picture.exists()


def test_a_run_that_diverges_stops(cpu, tmp_path):
    argv = ["train", "--optimizer", "sgd", "--lr", 1e20, "--schedule", "constant"]
    code, out, err = cpu.run(*argv, "--output", tmp_path / "run")
    assert (code, out, err.count("\n")) == (1, "", 2)
    assert re.search(r"the loss of epoch 1 is (nan|inf): lower --lr; nothing was saved", err)


def poison_model(run: Run) -> None:
    with torch.no_grad():
        next(run.model.parameters())[0] = torch.nan


def poison_optimizer(run: Run) -> None:
    next(iter(run.optimizer.state.values()))["exp_avg"][0] = torch.inf


def poison_statistics(run: Run) -> None:
    norm = next(module for module in run.model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_var[0] = torch.nan


DIVERGED = {
    "loss": ("the loss of epoch 2 is nan", 2, poison_model),
    "parameters": ("not all parameters of epoch 2 are finite", 4, poison_model),
    "optimizer": ("not all parameters of epoch 2 are finite", 4, poison_optimizer),
    "loss within an epoch": ("the loss of epoch 2 is nan", 2, poison_model),
    "parameters within an epoch": ("not all parameters of epoch 2 are finite", 2, poison_optimizer),
    "statistics within it": ("not all parameters of epoch 2 are finite", 2, poison_statistics),
    "validation": ("the validation loss of epoch 2 is nan", None, None),
}


@pytest.mark.parametrize("case", DIVERGED)
def test_a_run_that_diverges_leaves_what_was_good(case, noise, tmp_path, monkeypatch, capsys):
    """Whatever tells of it first: nothing is saved any more, and the end is no success."""
    message, at, poison = DIVERGED[case]
    step, evaluate = Run._step, Evaluator.__call__

    def poisoned(run, *batch):
        step(run, *batch)
        if run.position.epoch == 1 and run.position.step + 1 == at:
            poison(run)

    def failing(validate, *rest):
        loss, accuracy = evaluate(validate, *rest)
        return (torch.nan, 1.0) if (tmp_path / "last.pt").exists() and not at else (loss, accuracy)

    monkeypatch.setattr(Run, "_step", poisoned)
    monkeypatch.setattr(Evaluator, "__call__", failing)
    monkeypatch.setattr(models, "create", lambda name, **options: normed(**options))
    argv = ["train", "--data", noise, "--epochs", "3", "--batch-size", "24", "--device", "cpu"]
    argv += ["--save-every", "3" if "within" in case else "1000", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 1
    *_, line = capsys.readouterr().err.splitlines()
    kept = f"{tmp_path}/last.pt holds epoch 1 of 3"
    assert line == f"python -m cnn: {message}: lower --lr; {kept}"
    last, best = (checkpoints.load(tmp_path / name) for name in ("last.pt", "best.pt"))
    assert last["position"]["epoch"] == best["position"]["epoch"] == 1
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert len(numbers(tmp_path)) == 1


def test_a_loss_that_is_shown_as_nan_ends_the_run(noise, tmp_path, monkeypatch, capsys):
    """Hours may pass until the next checkpoint."""
    step, steps = Run._step, []

    def poisoned(run, *batch):
        step(run, *batch)
        steps.append(run.position.step)
        poison_model(run)

    monkeypatch.setattr(Run, "_step", poisoned)
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    monkeypatch.setattr(models, "create", lambda name, **options: normed(**options))
    argv = ["train", "--data", noise, "--batch-size", "24", "--device", "cpu"]
    with pytest.raises(SystemExit):
        cli.main([*argv, "--output", str(tmp_path)])
    assert capsys.readouterr().err.endswith(
        "the loss of epoch 1 is nan: lower --lr; nothing was saved\n"
    )
    assert (steps, files(tmp_path)) == ([0, 1], set())


def test_all_processes_end_if_a_run_diverges(cpu, noise, tmp_path):
    argv = ["train", "--data", noise, "--batch-size", 24, "--lr", 1e30, "--schedule", "constant"]
    pair = start_twice(cpu, *argv, "--output", tmp_path)
    assert [fork.wait() for fork in pair] == [1, 1]
    for fork in pair:
        assert "loss of epoch 1 is nan: lower --lr; nothing was saved" in fork.err.read_text()
    assert files(tmp_path) == set()


def test_a_log_is_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.RunLog(Path(), []).write([{"epoch": 1, "train_loss": math.nan}], last=True)


BAD = {
    "": "arguments are required",
    "train --epochs 0": "--epochs: '0' is not a whole number from 1",
    "train --epochs many": "--epochs: 'many' is not",
    "train --batch-size -1": "--batch-size: '-1' is not",
    "train --batch-size 1.5": "--batch-size: '1.5' is not",
    "train --batch-size 1296": "--batch-size: 1296 is more than the 1295 training images",
    "train --lr 0": "--lr: '0' is not a positive number",
    "train --lr nan": "--lr: 'nan' is not",
    "train --lr inf": "--lr: 'inf' is not",
    "train --ema 1": "--ema: '1' is not a number from 0 to less than 1",
    "train --label-smoothing -1": "--label-smoothing: '-1' is not",
    "train --weight-decay x": "--weight-decay: 'x' is not a number from 0",
    "train --seed -3": "--seed: '-3' is not",
    "train --save-every 0": "--save-every: '0' is neither steps, as 500, nor minutes, as 10m",
    "train --save-every 5h": "--save-every: '5h' is neither steps, as 500, nor minutes, as 10m",
    "train --device tpu7": "--device: 'tpu7' is not a device",
    "train --device meta": "--device: 'meta' is neither cpu nor cuda",
    "train --device cuda:99": "this machine has no 'cuda:99'",
    "train --data imagenet": "--data: 'imagenet' is none of digits, faces, mnist, fashion",
    "train --data mnist:{tmp}/none": "{tmp}/none is not a folder",
    "train --data digits:{tmp}": "digits come with scikit-learn and take no path",
    "train --data cifar10": "cifar10 needs a place: give it as cifar10:FOLDER",
    "train --model resnet-18": "'resnet-18' is none of alexnet, lenet5, resnet101, resnet18, ",
    "train --model resnet-50": "timm:NAME or torchvision:NAME: did you mean resnet50 or resnet",
    "train --model timm": "'timm' is none of alexnet",
    "train --data fashion": "did you mean fashion-mnist?",
    "train --init {tmp}/none.pt": "cannot read {tmp}/none.pt: No such file",
    "train --init {tmp}/text": "{tmp}/text is damaged or not a checkpoint",
    "train --init {tmp}/bad": "{tmp}/bad/best.pt: No such file",
    "train --init {tmp}/list.pt": "{tmp}/list.pt is not a checkpoint of python -m cnn train, and",
    "train --init {tmp}/bare.pt --model vgg_small": "of vgg_small: it lacks features.1.weight and",
    "train --freeze dense": "--freeze: 'dense' matches none of features.0.weight to classifier.4",
    "train --freeze classifier,features": "--freeze: nothing is left to train",
    "train --resume {tmp}/last.pt --freeze features": "--freeze: ('features',) contradicts () of",
    "train --resume {tmp}/last.pt --init {tmp}/bare.pt": "contradicts None of {tmp}/last.pt",
    "train --size 15": "--size: lenet5 does not take 15x15 pixels",
    "train --amp fp8": "--amp: invalid choice: 'fp8'",
    "train --sync-bn --device cpu": "--sync-bn: torch's SyncBatchNorm needs GPUs",
    "train --output {tmp}/text": "cannot write {tmp}/text: File exists",
    "train --output {tmp}/text/run": "cannot write {tmp}/text/run: Not a directory",
    "train --output {tmp}": "{tmp} holds a run: --resume it, --overwrite it, or name another",
    "train --resume --output {tmp}/none": "cannot read {tmp}/none/last.pt: No such file",
    "train --resume --output {tmp}/bad": "{tmp}/bad/last.pt is damaged or not a checkpoint",
    "train --resume {tmp}/list.pt": "{tmp}/list.pt is not a checkpoint of python -m cnn train",
    "train --resume {tmp}/last.pt --lr 0.5": "--lr: 0.5 contradicts 0.25 of {tmp}/last.pt",
    "train --resume {tmp}/last.pt --patience 3": "--patience: 3 contradicts 0 of {tmp}/last.pt",
    "train --patience -1": "--patience: '-1' is not a whole number from 0",
    "train --resume {tmp}/last.pt --augment": "--augment: True contradicts False of",
    "train --resume {tmp}/last.pt --data mnist": "--data: mnist contradicts digits of",
    "train --resume {tmp}/last.pt --output {tmp}/bad": "{tmp}/bad holds a run",
    "train --resume {tmp}/last.pt": "--data: digits is not what {tmp}/last.pt was trained on",
    "eval": "arguments are required: checkpoint",
    "eval {tmp}/none.pt": "cannot read {tmp}/none.pt: No such file",
    "eval {tmp}": "cannot read {tmp}/best.pt: No such file",
    "eval {tmp}/last.pt --split all": "--split: invalid choice: 'all'",
    "predict {tmp} x.png": "cannot read {tmp}/best.pt: No such file",
    "show maps --checkpoint {tmp}": "cannot read {tmp}/best.pt: No such file",
    "eval {tmp} --what \x1b[31m": "unrecognized arguments: --what \\x1b[31m",
    "train --resume {tmp}/bad": "{tmp}/bad/last.pt is damaged or not a checkpoint",
    "eval {tmp}/text": "{tmp}/text is damaged or not a checkpoint",
    "eval {tmp}/list.pt": "{tmp}/list.pt is not a checkpoint",
    "eval {tmp}/bare.pt": "{tmp}/bare.pt holds only parameters: give --model, their network",
    "eval {tmp}/bare.pt --model lenet5": "only parameters: give --data, the images to test on",
    "eval {tmp}/bare.pt --data digits --model vgg_small": "{tmp}/bare.pt does not hold the parame",
    "eval {tmp}/bare.pt --data digits --model lenet5 --size 16": "of lenet5 for 16x16 pixels",
    "eval {tmp}/rgb.pt --data digits --model lenet5": "its features.0.weight is 6x3x5x5, not 6x1",
    "eval {tmp}/last.pt --model vgg_small": "--model: vgg_small contradicts lenet5 of",
    "eval {tmp}/last.pt --size 28": "--size: 28 contradicts 32 of {tmp}/last.pt",
    "eval {tmp}/last.pt": "--data: its classes are not those of {tmp}/last.pt",
    "predict {tmp}/last.pt": "arguments are required: images",
    "predict {tmp}/last.pt {tmp}/bad": "{tmp}/bad holds no image",
    "predict {tmp}/bare.pt x.png": "{tmp}/bare.pt holds only parameters, without class names",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=list(BAD))
def test_bad_arguments_get_one_line_and_exit_code_2(line, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("not a checkpoint")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "last.pt").write_bytes(b"PK\3\4 cut")
    torch.save([1], tmp_path / "list.pt")
    state = cnn.models.lenet5(num_classes=2).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save(cnn.models.lenet5(in_channels=3).state_dict(), tmp_path / "rgb.pt")
    described = {"classes": ("a", "b"), "size": 32, "mean": (0.5,), "std": (0.5,)}
    contents = {"config": {"model": "lenet5", "lr": 0.25}, "description": described}
    contents |= {"state_dict": state, "position": {}, "training": {}}
    config = {**vars(cli.Config()), **contents["config"]}
    checkpoints.save({**contents, "config": config}, tmp_path / "last.pt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        cli.main(line.format(tmp=tmp_path).split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message.format(tmp=tmp_path) in err
    assert before.items() <= {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}.items()


def test_intervals_are_steps_or_minutes():
    args = cli.parser().parse_args(["train", "--save-every", "1.5m"])
    assert args.save_every == (90.0, True)
    args = cli.parser().parse_args(["train", "--save-every", "20"])
    assert args.save_every == (20, False)


def test_an_error_is_one_line_unless_debug(monkeypatch, capsys):
    def fail(args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "predict", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "x", "y"])
    assert stop.value.code == 1
    assert (
        capsys.readouterr().err == "python -m cnn: RuntimeError: two lines (--debug shows where)\n"
    )
    with pytest.raises(RuntimeError):
        cli.main(["predict", "x", "y", "--debug"])
