"""``bench train`` on a small network: what it keeps, goes on with and refuses."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

import cnn
from bench import measure, train
from bench.__main__ import main

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "bench" / "train.schema.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run it on LeNet-5; gives the exit code, the rows, what it printed and stderr's lines.

    Nothing compiles, and git is out of reach: the commit may not change between two runs.
    """
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    file = tmp_path / "folder" / "kept.json"

    def command(*arguments: str) -> tuple[int, list[dict], str, list[str]]:
        code = main(
            ["train", "--device", "cpu", "--model", "lenet5", "--json", str(file), *arguments]
        )
        results = json.loads(file.read_text())
        jsonschema.validate(results, SCHEMA)
        printed = capsys.readouterr()
        return code, results["rows"], printed.out, printed.err.splitlines()

    return command


@pytest.fixture
def times(monkeypatch):
    """Milliseconds of the steps to come, which are not timed, of one linear layer."""
    known = []
    monkeypatch.setattr(measure, "launched_milliseconds", lambda *_: known.pop(0))
    monkeypatch.setattr(cnn.models, "create", lambda *_, **__: linear())
    return known


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def test_end_to_end(run):
    code, (row,), out, errors = run("--peers", "eager")
    assert (code, errors) == (0, [])
    steps = row["steps"]
    assert list(steps) == ["ours", "eager"]
    assert steps["ours"]["loss"] == pytest.approx(2.3, abs=0.2)  # ten classes, of one likelihood
    for name, step in steps.items():
        assert step["loss"] == pytest.approx(steps["ours"]["loss"], rel=1e-2)
        assert step["images_s"] * step["ms"] == pytest.approx(2e3, rel=1e-3)
        assert f"  {name} " in out


def test_a_ratio_is_the_peers_time_over_ours(run, times, monkeypatch):
    """Ours compiled among them; each is compiled in the mode that was asked for."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    times += [2.0, 1.0, 3.0, 4.0]
    _, (row,), out, _ = run("--compile-mode", "a mode")
    assert row["ratio"] == {"ours_compiled": 0.5, "eager": 1.5, "compiled": 2.0}
    assert row["steps"]["ours"]["images_s"] == 1000.0
    assert " 1.50 of our time" in out
    assert modes == ["a mode"] * 2


def test_a_step_trains():
    torch.manual_seed(0)
    step = train.Step("eager", linear(), "default", torch.device("cpu"))
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 3, 4, 0])
    losses = [step(x, labels).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in step.network.parameters())


def test_resume_measures_what_is_missing_beside_all(run, times):
    times += [2.0, 3.0, 4.0, 5.0, 6.0]
    _, rows, _, _ = run("--peers", "eager")
    assert run("--peers", "eager", "--resume")[1] == rows
    code, after, _, errors = run("--peers", "eager")
    assert (code, after) == (2, rows)
    assert errors[0].endswith("kept.json has rows: --resume continues it")
    _, (row,), _, _ = run("--resume", "--peers", "eager", "compiled")
    assert row["ratio"] == {"eager": 1.25, "compiled": 1.5}
    assert times == []


def test_whoever_raises_is_null_and_the_run_goes_on(run, times, monkeypatch):
    def fails(model):
        raise RuntimeError("the first line\nthe second")

    times += [2.0]
    monkeypatch.setattr(train, "eager", fails)
    code, (row,), out, _ = run("--peers", "eager")
    assert code == 0
    assert row["steps"]["eager"] is row["ratio"]["eager"] is None
    assert row["errors"] == {"eager": "RuntimeError: the first line"}
    assert "[eager: RuntimeError: the first line]" in out


def test_another_loss_is_an_error(run, times, monkeypatch):
    real = train.eager

    def other(model):
        model = real(model)
        nn.init.uniform_(model[1].weight, -1, 1)
        return model

    times += [2.0, 3.0]
    monkeypatch.setattr(train, "eager", other)
    _, (row,), _, _ = run("--peers", "eager")
    assert row["steps"]["eager"] is None
    assert "the first loss is" in row["errors"]["eager"]


def test_ours_that_fails_ends_in_1(run, times, monkeypatch):
    def wrong(*_, **__):
        model = linear()
        nn.init.constant_(model[1].bias, float("nan"))
        return model

    times += [2.0, 3.0]
    monkeypatch.setattr(cnn.models, "create", wrong)
    code, (row,), _, _ = run("--peers")
    assert (code, row["steps"], row["ratio"]) == (1, {"ours": None}, {})
    assert row["errors"] == {"ours": "ValueError: the first loss is nan, ours nan"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_without_a_gpu_it_ends_in_2(capsys):
    assert main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench train: no GPU here")


@pytest.mark.parametrize(
    "wrong", [["--model", "vgg12"], ["--batch-size", "0"], ["--peers", "cudnn"]], ids=" ".join
)
def test_wrong_arguments_end_in_2(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", *wrong])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wrong[1] in line
