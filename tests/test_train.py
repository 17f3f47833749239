"""The digits, the training loop, checkpoints and the command line."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cnn import __main__ as cli
from cnn.data import digits
from cnn.train import accuracy, fit, load, save
from kernels.device import INTERPRET

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture(scope="module")
def data():
    return digits()


def test_digits_are_all_there_once(data):
    train, test = data
    assert (len(train), len(test)) == (1437, 360)
    images = torch.cat([train.tensors[0], test.tensors[0]])
    assert images.shape == (1797, 1, 32, 32)
    assert images.dtype == torch.float32
    # UCI's test set holds 1,797 digits, of each about 180; a few of its images are nearly alike.
    labels = torch.cat([train.tensors[1], test.tensors[1]])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(images.flatten(1).unique(dim=0)) == 1797


def test_digits_are_normalised_by_the_training_set(data):
    train, test = data
    assert train.tensors[0].mean().abs() < 1e-5
    assert abs(train.tensors[0].var() - 1) < 1e-5
    assert test.tensors[0].mean().abs() > 1e-5


def test_digits_are_split_the_same_way_each_time_and_evenly(data):
    for first, second in zip(data, digits(), strict=True):
        assert all(map(torch.equal, first.tensors, second.tensors))
    shares = [part.tensors[1].bincount() / len(part) for part in data]
    torch.testing.assert_close(*shares, rtol=0, atol=2 / 360)


def test_digits_take_a_size():
    train, _ = digits(size=8)
    assert train.tensors[0].shape == (1437, 1, 8, 8)
    assert len(train.tensors[0].unique()) == 17  # each pixel is a count from 0 to 16


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_fit_learns_and_repeats_itself_bit_by_bit():
    train, test = digits(size=8)
    cpu = torch.device("cpu")
    runs = []
    for _ in range(2):
        model = linear(0)
        losses = list(fit(model, train, epochs=4, batch_size=64, lr=0.05, seed=3, device=cpu))
        runs.append((losses, model[1].weight))
        assert accuracy(model, test, cpu) > 0.9
    (losses, weight), (again, same) = runs
    assert losses == again
    assert torch.equal(weight, same)
    assert losses[-1] < losses[0] / 2


def test_another_seed_takes_the_images_in_another_order():
    train, _ = digits(size=8)
    first, second = (
        list(fit(linear(0), train, epochs=1, batch_size=64, lr=0.05, seed=seed, device="cpu"))
        for seed in (0, 1)
    )
    assert first != second


def test_accuracy_counts():
    identity = nn.Flatten()
    images = torch.eye(4).repeat(300, 1)
    labels = torch.tensor([0, 1, 2, 0]).repeat(300)
    assert accuracy(identity, TensorDataset(images, labels), torch.device("cpu")) == 0.75


def test_save_and_load(tmp_path):
    path = tmp_path / "model.pt"
    for epochs in (1, 2):
        save({"model": "m", "state_dict": {"w": torch.ones(2)}, "epochs": epochs}, path)
        assert load(path)["epochs"] == epochs
    assert files(tmp_path) == ["model.pt"]


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save({"model": "old", "state_dict": {}}, path)

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save({"model": "new", "state_dict": {}}, path)
    assert files(tmp_path) == ["model.pt"]
    assert load(path)["model"] == "old"


@pytest.fixture
def few_digits(data, monkeypatch):
    """The digits with 48 images to train on and 24 to test: the interpreter takes its time."""
    train, test = (TensorDataset(*part[:count]) for part, count in zip(data, (48, 24), strict=True))
    monkeypatch.setitem(cli.DATA, "digits", lambda: (train, test))


def test_command_line_trains_through_the_kernels(few_digits, tmp_path, capfd):
    """And leaves a checkpoint of the model; a second run gives the same one."""
    states = []
    for name in ("first.pt", "second.pt"):
        path = tmp_path / name
        cli.main(["train", "--epochs", "2", "--output", str(path)])
        trained, log = capfd.readouterr()
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        assert checkpoint.keys() == {"model", "state_dict", "epochs", "accuracy"}
        assert (checkpoint["model"], checkpoint["epochs"]) == ("lenet5", 2)
        states.append(checkpoint["state_dict"])
    kernels, result = trained.splitlines()
    if INTERPRET:
        assert kernels == "kernels: triton (interpreter)"
    else:
        assert kernels == f"kernels: triton (cuda:{torch.cuda.get_device_name()})"
    assert result == f"test accuracy {checkpoint['accuracy']:.3f}"
    assert [line.split("  ")[0] for line in log.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    for first, second in zip(states[0].values(), states[1].values(), strict=True):
        assert torch.equal(first, second)
    cli.main(["eval", str(path)])
    assert capfd.readouterr().out == trained


@pytest.mark.parametrize("given", [{}, {"fprop_kernel": 1}], ids=["none", "one"])
def test_the_line_on_kernels_comes_from_launches(given, monkeypatch, capsys):
    monkeypatch.setattr(cli, "launches", lambda: given)
    cli.report(torch.device("cpu" if INTERPRET else "cuda"), 0.5)
    assert ("triton" in capsys.readouterr().out) == bool(given)


BAD = {
    "": "arguments are required",
    "train --epochs 0": "--epochs: '0' is not a whole number from 1",
    "train --epochs many": "--epochs: 'many' is not",
    "train --batch-size -1": "--batch-size: '-1' is not",
    "train --batch-size 1.5": "--batch-size: '1.5' is not",
    "train --lr 0": "--lr: '0' is not a positive number",
    "train --lr nan": "--lr: 'nan' is not",
    "train --lr inf": "--lr: 'inf' is not",
    "train --seed -3": "--seed: '-3' is not",
    "train --device tpu7": "--device: 'tpu7' is not a device",
    "train --device meta": "--device: 'meta' is neither cpu nor cuda",
    "train --device cuda:99": "this machine has no 'cuda:99'",
    "train --data mnist": "--data: invalid choice: 'mnist'",
    "train --model resnet1": "--model: invalid choice: 'resnet1'",
    "train --output {tmp}/none/model.pt": "cannot write {tmp}/none/model.pt: No such file",
    "train --output {tmp}": "cannot write {tmp}: not a regular file",
    "train --output {tmp}/text/model.pt": "cannot write {tmp}/text/model.pt: Not a directory",
    "eval": "arguments are required: checkpoint",
    "eval {tmp}/none.pt": "cannot read {tmp}/none.pt: No such file",
    "eval {tmp}": "cannot read {tmp}: Is a directory",
    "eval {tmp}/text": "{tmp}/text is not a checkpoint",
    "eval {tmp}/list.pt": "{tmp}/list.pt is not a checkpoint",
    "eval {tmp}/unknown.pt": "{tmp}/unknown.pt holds no model that this version knows",
    "eval {tmp}/other.pt": "{tmp}/other.pt holds no model that this version knows",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=list(BAD))
def test_bad_arguments_get_one_line_and_exit_code_2(line, message, tmp_path, capsys):
    (tmp_path / "text").write_text("not a checkpoint")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"model": "unknown", "state_dict": {}}, tmp_path / "unknown.pt")
    torch.save({"model": "lenet5", "state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit) as stop:
        cli.main(line.format(tmp=tmp_path).split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message.format(tmp=tmp_path) in err


def run_on_aten(*arguments: str, **options) -> subprocess.Popen:
    """The command line in a process of its own without the interpreter, on the CPU: quick."""
    # Where the tests' own starter ignores Ctrl-C, its children would too.
    script = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.argv[0] = 'cnn'; runpy.run_module('cnn', run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--device", "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_on_the_cpu_without_the_interpreter_nothing_is_launched(tmp_path):
    with run_on_aten("train", "--epochs", "1", cwd=tmp_path) as process:
        out, _ = process.communicate()
    assert process.returncode == 0
    assert re.fullmatch(r"kernels: aten \(cpu\)\ntest accuracy 0\.\d{3}\n", out)
    assert files(tmp_path) == ["lenet5-digits.pt"]


def test_ctrl_c_keeps_the_last_epoch(tmp_path):
    path = tmp_path / "model.pt"
    with run_on_aten("train", "--epochs", "100000", "--output", str(path)) as process:
        assert process.stderr.readline().startswith("epoch 1/100000")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    epochs = load(path)["epochs"]
    assert (
        err.splitlines()[-1] == f"python -m cnn: interrupted; {path} holds epoch {epochs} of 100000"
    )
    assert files(tmp_path) == ["model.pt"]
