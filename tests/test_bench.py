"""The benchmark's commands, on tiny layers: what they measure, keep, refuse and draw."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch

import bench
from bench import kernels, measure, peers, report, suites
from bench.__main__ import COMMANDS, main
from kernels.device import Device
from kernels.geometry import Conv2dGeometry, Pool2dGeometry

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "bench" / "kernels.schema.json").read_text())
H100 = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)
IMAGE = {"N": 2, "H": 6, "W": 5}
SHAPES = [
    {"suite": "a", "name": "conv", **IMAGE, "C": 3, "K": 4, "R": 3, "S": 3, "padding": 1},
    {"suite": "a", "name": "pool", **IMAGE, "C": 4, "kernel": 2, "count": 2},
    {"suite": "b", "name": "deep", **IMAGE, "C": 4, "K": 4, "R": 3, "S": 3, "groups": 4},
    {"suite": "b", "name": "last", **IMAGE, "C": 8, "K": 8, "R": 1, "S": 1, "P": 6, "Q": 5},
    {
        "suite": "b",
        "name": "block",
        **IMAGE,
        "C": 3,
        "K": 4,
        "R": 3,
        "S": 3,
        "pool": {"kernel": 3, "stride": 2, "padding": 1},
    },
]
OPS = (
    *("fprop", "dgrad", "wgrad", "conv_relu", "first_layer", "depthwise"),
    *("max_pool", "max_pool_backward", "conv_relu_max_pool", "conv_relu_max_pool_backward"),
)


@pytest.fixture
def shapes(tmp_path) -> Path:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(SHAPES))
    return path


@pytest.fixture
def run(tmp_path, shapes, monkeypatch, capsys):
    """Run ``bench kernels`` on those shapes; gives the exit code, the rows and stderr's lines.

    git is out of reach: the commit may not change between two runs.
    """
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    file = tmp_path / "kept.json"

    def command(*arguments: str, names: str = "cudnn") -> tuple[int, list[dict], list[str]]:
        tail = ["--shapes", str(shapes), "--peers", names, "--json", str(file)]
        code = main(["kernels", "--device", "cpu", *arguments, *tail])
        return code, checked(file)["rows"], capsys.readouterr().err.splitlines()

    return command


def checked(file: Path) -> dict:
    results = json.loads(file.read_text())
    jsonschema.validate(results, SCHEMA)
    return results


def key(row: dict) -> tuple[str, str, str]:
    return row["suite"], row["layer"], row["op"]


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# kernels


def test_kernels_end_to_end(tmp_path, shapes):
    """Every operator, by the command; FlagGems is there but raises, Inductor does not compile."""
    (tmp_path / "flag_gems.py").write_text("raise ImportError('no such GPU')")
    file = tmp_path / "folder" / "kept.json"
    arguments = ["--shapes", str(shapes), "--op", ",".join(OPS), "--dtype", "bf16", "fp32"]
    process = start(
        ["kernels", "--device", "cpu", *arguments, "--json", str(file)],
        PYTHONPATH=str(tmp_path),
        TORCHDYNAMO_DISABLE="1",
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    results = checked(file)
    assert results["gpu"] == "cpu"
    assert results["torch"] == torch.__version__
    assert f"--json {file}" in results["command"]
    assert set(results["ceilings"]) == {"copy_gbs", "bf16_tflops", "fp32_tflops"}

    rows = results["rows"]
    convolution = ["fprop", "dgrad", "wgrad", "conv_relu"]
    expected = {("b", "last", op) for op in convolution}
    # A first layer's or a depthwise fprop is measured once, under that name.
    expected |= {("a", "conv", op) for op in ("first_layer", "dgrad", "wgrad", "conv_relu")}
    expected |= {("b", "deep", op) for op in ("depthwise", "dgrad", "wgrad", "conv_relu")}
    expected |= {("a", "pool", op) for op in ("max_pool", "max_pool_backward")}
    block = "conv_relu_max_pool"
    expected |= {("b", "block", op) for op in (block, f"{block}_backward")}
    assert len(rows) == 2 * len(expected)
    assert {key(row) for row in rows} == expected
    for row in rows:
        assert list(row["ratio"]) == ["cudnn", "cudnn_nchw", "inductor", "flaggems"]
        assert row["ratio"].pop("flaggems") is None
        assert row["errors"] == {"flaggems": "ImportError: no such GPU"}
        assert all(row["ratio"].values())
        assert row["reference"] == "float64"
        assert row["error"] < (5e-3 if row["dtype"] == "bf16" else 1e-6)
        assert (row["error"] == 0) == row["op"].startswith("max_pool")
        assert (row["tflops"] == 0) == row["op"].startswith("max_pool")
        assert row["count"] == (2 if row["layer"] == "pool" else 1)
        assert key(row)[0] in out
    assert "geometric means" in out
    assert out.count("\n") > len(rows) + 5


def test_a_row_adds_up(run):
    code, (row,), _ = run("--suite", "a", "--op", "fprop", "--dtype", "tf32x3")
    assert code == 0
    small = suites.shrink(suites.layers()[0]).geometry
    assert small.y_shape == (1, 4, 4, 4)
    # The layer is shrunk to 1x3x4x4 pixels and 4 filters of 3x3.
    assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(2 * 4 * 4 * 4 * 27, rel=1e-3)
    moved = 4 * (3 * 16 + 4 * 27 + 4 * 16)
    assert row["gbs"] * row["ms"] * 1e6 == pytest.approx(moved, rel=1e-3)
    assert row["predicted_ms"] is None


def test_a_ratio_is_the_peers_time_over_ours(run, monkeypatch):
    """The ceilings take a copy and a product, then come ours and the peer."""
    times = iter([1.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(measure, "milliseconds", lambda *arguments: next(times))
    _, (row,), _ = run("--suite", "a", "--op", "fprop")
    assert (row["ms"], row["ratio"]) == (2.0, {"cudnn": 1.5})


def test_roofline_is_the_slower_of_products_and_bytes():
    ceilings = {"copy_gbs": 4000.0, "tf32_tflops": 400.0, "bf16_tflops": 800.0}
    dtypes = measure.DTYPES
    roof = measure.roofline_milliseconds
    assert roof(0, 4_000_000, dtypes["bf16"], ceilings) == pytest.approx(1e-3)
    assert roof(8 * 10**11, 4_000_000, dtypes["bf16"], ceilings) == pytest.approx(1.0)
    assert roof(8 * 10**11, 4_000_000, dtypes["tf32x3"], ceilings) == pytest.approx(6.0)


def test_error_is_relative_to_the_reference():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert measure.relative_rms(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert math.isnan(measure.relative_rms(torch.tensor([3.0, math.nan]), reference))
    assert measure.relative_rms(torch.ones(4), torch.zeros(4)) == 2.0


def test_suites_take_turns_within_a_budget_and_resume_goes_on(run):
    """A budget that is spent at once still gives a row each time, of each suite in turn."""
    arguments = ("--op", "fprop,wgrad", "--budget", "1e-9")
    code, rows, errors = run(*arguments)
    assert (code, len(rows)) == (0, 1)
    assert errors == [
        "python -m bench kernels: the budget of 1e-09 s is spent: 1 of 6 rows are there; "
        "--resume continues"
    ]
    for number in (2, 3):
        code, more, _ = run(*arguments, "--resume")
        assert (code, len(more)) == (0, number)
        assert more[:-1] == rows
        rows = more
    code, more, errors = run("--op", "fprop,wgrad", "--resume")
    assert (code, errors) == (0, [])
    assert more[:3] == rows
    assert [key(row)[1:] for row in more] == [
        ("conv", "fprop"),
        ("deep", "fprop"),
        ("conv", "wgrad"),
        ("deep", "wgrad"),
        ("last", "fprop"),
        ("last", "wgrad"),
    ]


def test_a_row_that_lacks_a_peer_is_measured_anew_beside_all(run):
    op = ("--suite", "a", "--op", "fprop,max_pool")
    run(*op)
    _, rows, _ = run(*op, "--resume", names="cudnn_nchw")
    assert [list(row["ratio"]) for row in rows] == [["cudnn", "cudnn_nchw"]] * 2
    assert run(*op, "--resume")[1] == rows


def test_resume_refuses_what_was_measured_elsewhere(run, tmp_path):
    op = ("--suite", "a", "--op", "fprop")
    assert run(*op)[0] == 0
    file = tmp_path / "kept.json"
    results = checked(file)
    code, rows, errors = run(*op)
    assert (code, rows) == (2, results["rows"])
    assert errors == [f"python -m bench kernels: {file} has rows: --resume continues it"]
    for name in ("gpu", "triton", "commit"):
        file.write_text(json.dumps(results | {name: "another"}))
        code, rows, errors = run(*op, "--resume")
        assert (code, rows) == (2, results["rows"])
        told = f"{file} was measured with {name} another, not {results[name]}"
        assert errors == [f"python -m bench kernels: {told}"]


@pytest.mark.parametrize(
    ("one", "difference", "same"),
    [
        ("abc", "", True),
        ("abc", " kernels/planner.py | 2 +-", False),
        ("abc", "unknown", False),  # git knows no such commit
        ("abc-dirty", "", False),
    ],
)
def test_commits_that_change_nothing_measured_are_the_same_code(monkeypatch, one, difference, same):
    monkeypatch.setattr(measure, "_output", lambda *command: difference)
    assert measure.is_same_code(one, "def") is same
    assert measure.is_same_code(one, one)


def test_the_commit_is_named_and_told_where_git_is_not(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    head = measure.identity(cpu, "named")["commit"].removesuffix("-dirty")
    assert head == "named" or len(head) == 40
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    assert measure.identity(cpu, "named")["commit"] == "named"


def test_interruption_keeps_finished_rows(run, monkeypatch):
    """Ctrl-C within the third row."""
    measured = []
    real = kernels.measure_case

    def interrupted(case, *others):
        measured.append(case)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(case, *others)

    monkeypatch.setattr(kernels, "measure_case", interrupted)
    code, rows, errors = run("--op", "fprop,wgrad")
    assert (code, len(rows)) == (130, 2)
    assert "interrupted: 2 of 6 rows are there; --resume continues" in errors[-1]
    code, after, _ = run("--op", "fprop,wgrad", "--resume")
    assert (code, len(after)) == (0, 6)
    assert after[:2] == rows


def test_a_kill_keeps_finished_rows(tmp_path):
    """The file is whole whenever it is read, and after the process was killed."""
    file = tmp_path / "kept.json"
    process = start(["kernels", "--device", "cpu", "--peers", "cudnn", "--json", str(file)])
    try:
        until = time.monotonic() + 120
        rows = 0
        while rows < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            rows = len(checked(file)["rows"]) if file.exists() else 0
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(checked(file)["rows"]) >= rows


@pytest.mark.parametrize("whose", ["ours", "eager"])
def test_whoever_raises_is_null_and_the_run_goes_on(run, monkeypatch, whose):
    def fails(self):
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setattr(peers.Convolution, whose, fails)
    code, (row, other), _ = run("--suite", "a", "--op", "fprop,max_pool")
    told = "RuntimeError: the first line"
    if whose == "ours":
        assert code == 1
        assert row["ms"] is row["error"] is row["ratio"]["cudnn"] is None
        assert row["errors"] == {"ours": told}
    else:
        assert code == 0
        assert row["ms"] > 0
        assert row["ratio"] == {"cudnn": None}
        assert row["errors"] == {"cudnn": told, "reference": told}
    assert "errors" not in other


def test_a_wrong_result_is_an_error_of_ours(run, monkeypatch):
    real = peers.Convolution.ours

    def wrong(self):
        contender = real(self)
        return peers.Contender(lambda *inputs: contender.call(*inputs) * math.nan)

    monkeypatch.setattr(peers.Convolution, "ours", wrong)
    code, (row,), _ = run("--suite", "a", "--op", "fprop")
    assert (code, row["error"]) == (1, None)
    assert row["errors"] == {"ours": "the error is nan"}


def test_where_memory_forbids_float64_the_reference_is_float32(run, monkeypatch):
    real = peers.Convolution.eager

    def narrow(self):
        contender = real(self)

        def call(*inputs):
            if inputs[0].dtype == torch.float64:
                raise torch.OutOfMemoryError
            return contender.call(*inputs)

        return peers.Contender(call)

    monkeypatch.setattr(peers.Convolution, "eager", narrow)
    code, (row,), _ = run("--suite", "a", "--op", "fprop", "--dtype", "fp32")
    assert (code, row["reference"]) == (0, "float32")
    assert row["error"] < 1e-6


def test_torch_is_set_by_its_older_and_its_newer_names():
    """In a process of its own, as the settings are global; reading them raises if they differ."""
    script = """
import torch
from bench.measure import DTYPES, set_torch
cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
for name, precision in (("bf16", "ieee"), ("tf32", "tf32"), ("tf32x3", "ieee"), ("tf32", "tf32")):
    set_torch(DTYPES[name], torch.device("cuda"), search=name == "tf32")
    newer = (cudnn.fp32_precision, cudnn.conv.fp32_precision, matmul.fp32_precision)
    assert newer == (precision,) * 3, (name, newer)
    older = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark)
    assert older == (name == "tf32",) * 3, (name, older)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_planner_predicts_what_ours_will_launch(monkeypatch):
    monkeypatch.setattr(peers, "describe", lambda device: H100)
    g = Conv2dGeometry(32, 64, 56, 56, 64, 3, 3, padding=((1, 1), (1, 1)))
    x, w = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta").to(
            memory_format=torch.channels_last
        )
        for shape in (g.x_shape, g.w_shape)
    )
    for op in suites.CONVOLUTIONS:
        assert 0.01 < peers.Convolution(op, g, "ieee").predicted(x, w) < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert main(["kernels", "--suite", "lenet5_n256"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench kernels: no GPU here")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--suite nowhere", "no suite 'nowhere'; there are resnet50_v1.5, "),
        ("--op fprop,softmax", "'softmax' is none of fprop, dgrad, "),
        ("--dtype fp8", "'fp8' is none of bf16, fp16, "),
        ("--peers matlab", "'matlab' is none of cudnn, "),
        ("--budget nan", "'nan' is not a positive number"),
        ("--resume", "--resume needs --json FILE"),
        ("--shapes /nowhere.json", "cannot read /nowhere.json"),
        ("--suite vgg16 --op depthwise", "no layer of vgg16 has depthwise"),
        ("--suite zfnet --json {}", "is not JSON"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(arguments, told, capsys, tmp_path):
    file = tmp_path / "kept.json"
    file.write_text("{")
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["kernels", "--device", "cpu", *arguments.format(file).split()]))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


# suites


def test_the_suites_are_whole():
    layers = suites.layers()
    geometries = [layer.geometry for layer in layers]
    assert sum(isinstance(g, Conv2dGeometry) for g in geometries) == 138
    assert sum(isinstance(g, Pool2dGeometry) for g in geometries) == 20
    assert sum(isinstance(g, suites.Block) for g in geometries) == 11
    assert len({layer[:2] for layer in layers}) == 169
    flops = sum(
        layer.count * layer.geometry.flops
        for layer in layers
        if layer.suite == "resnet50_v1.5" and isinstance(layer.geometry, Conv2dGeometry)
    )
    assert flops / 256 == pytest.approx(2 * 4.09e9, rel=0.01)  # the 4.1 G multiply-adds of an image


def test_every_layer_can_be_shrunk():
    for layer in suites.layers():
        g = suites.shrink(layer).geometry
        if isinstance(g, suites.Block):
            assert g.pool.x_shape == g.conv.y_shape
            assert min(g.pool.y_shape) >= 1
            g = g.conv
        assert 1 <= g.P <= 4
        assert 1 <= g.Q <= 4
        assert g.N == 1
        if isinstance(g, Conv2dGeometry):
            whole = layer.geometry
            whole = whole.conv if isinstance(whole, suites.Block) else whole
            assert (g.groups == g.C > 1) == (whole.groups == whole.C > 1)


def test_a_file_of_shapes_replaces_suites_of_its_names(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{**SHAPES[0], "suite": "vgg16"}]))
    replaced = [layer for layer in suites.layers(path) if layer.suite == "vgg16"]
    assert [layer.name for layer in replaced] == ["conv"]
    assert any(layer.suite == "zfnet" for layer in suites.layers(path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"N": 0}, "row 1: N=0 is not a whole number from 1"),
        ({"C": "3"}, "row 1: C='3' is not a whole number"),
        ({"stride": [1, 2, 3]}, r"row 1: stride=\[1, 2, 3\] is neither"),
        ({"stride": 0}, "row 1: stride=0 is neither"),
        ({"groups": 2}, "row 1: groups=2 do not divide both C=3 and K=4"),
        ({"P": 9}, "row 1: the output is 6x5, not 9x5"),
        ({"R": 30}, "row 1: the output is -21x5"),
        ({"name": "last", "suite": "b"}, "b last is there twice"),
    ],
)
def test_shapes_that_cannot_be_are_refused(tmp_path, change, told):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{**SHAPES[0], **change}, SHAPES[3]]))
    with pytest.raises(ValueError, match=told):
        suites.read(path)


def test_a_layer_without_a_size_is_refused(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{k: v for k, v in SHAPES[0].items() if k != "K"}]))
    with pytest.raises(ValueError, match="row 1 has no 'K'"):
        suites.read(path)


# report


def made_up(**changes) -> dict:
    """Results of a GPU that is none: a memory-bound, a compute-bound and a failed row, a pool."""
    usual = {"suite": "net", "dtype": "bf16", "predicted_ms": None, "reference": "float64"}
    rates = {"ms": 1.0, "tflops": 100.0, "gbs": 2000.0, "roofline_share": 0.5, "error": 1e-3}
    none = dict.fromkeys(rates)
    rows = [
        {"layer": "one", "op": "fprop", "count": 3, **rates, "ratio": {"cudnn": 2.0}},
        {"layer": "two", "op": "fprop", "count": 1, **rates, "ratio": {"cudnn": 0.5}},
        {"layer": "three", "op": "fprop", "count": 5, **none, "ratio": {"cudnn": None}},
        {"layer": "pool", "op": "max_pool", "count": 1, **rates, "ratio": {"inductor": 1.25}},
    ]
    rows[0]["predicted_ms"] = 1.5
    rows[2]["errors"] = {"ours": "RuntimeError: no"}
    rows[3]["tflops"] = 0.0
    names = {"gpu": "Made-up 100", "driver": "1.2", "torch": "2", "triton": "3", "cudnn": "9"}
    ceilings = {"copy_gbs": 4000.0, "bf16_tflops": 800.0}
    run = {"commit": "0123456789abcdef", "command": "none", "ceilings": ceilings}
    return {**names, **run, "rows": [{**usual, **row} for row in rows], **changes}


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with one file."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "gpu.json").write_text(json.dumps(made_up()))
    return folder


def test_geometric_means_weigh_a_layer_by_its_count():
    rows = made_up()["rows"]
    assert report.geometric_mean(rows, "cudnn") == pytest.approx((2**3 / 2) ** (1 / 4))
    assert report.geometric_mean(rows, "inductor") == 1.25
    assert report.geometric_mean(rows, "flaggems") is None


def test_the_summary_has_means_and_the_worst_rows():
    text = report.summary(made_up()["rows"])
    assert "1.414" in text
    assert "off by 50% (median)" in text
    assert "1 rows failed" in text
    worst = text.split("worst rows")[1]
    assert worst.index("two") < worst.index("pool") < worst.index("one") < worst.index("three")


def test_report_draws_and_writes_the_table(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["report", "--results", str(results), "--readme", str(readme)]
    assert main(arguments) == 0
    names = ["gpu-net-bf16.png", "gpu-roofline.png"]
    charts = [results / name for name in names]
    assert sorted(results.glob("*.png")) == charts
    first = [chart.read_bytes() for chart in charts]
    assert all(chart.startswith(b"\x89PNG") and len(chart) > 5000 for chart in first)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "Made-up 100, driver 1.2, PyTorch 2, Triton 3, commit `0123456789ab`." in text
    assert "| net | bf16 | fprop | 100 | 2000 | 50% | 1.41 | - |" in text
    assert "| net | bf16 | max_pool | - | 2000 | 50% | - | 1.25 |" in text

    assert main(arguments) == 0
    assert readme.read_text() == text
    assert [chart.read_bytes() for chart in charts] == first


def test_report_prints_the_table_and_leaves_the_readme(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("without markers")
    arguments = ["report", "--results", str(results), "--readme", str(readme)]
    assert main([*arguments, "--stdout"]) == 0
    assert "| net | bf16 | fprop |" in capsys.readouterr().out
    assert readme.read_text() == "without markers"
    assert main(arguments) == 2
    assert "has no lines" in capsys.readouterr().err.splitlines()[-1]


def test_report_without_measurements_says_so(tmp_path, capsys):
    (tmp_path / "compiled.json").write_text('{"arch": "sm_90", "rows": []}')
    assert main(["report", "--results", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"python -m bench report: no measurements in {tmp_path}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"gpu": "cpu"}, "measures nothing"), ({"commit": 3}, r"$.commit: 3 is not of type")],
)
def test_report_takes_measurements_alone(results, capsys, changes, told):
    (results / "gpu.json").write_text(json.dumps(made_up(**changes)))
    assert main(["report", "--results", str(results), "--stdout"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


# the command line


def test_a_command_that_fails_to_load_leaves_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("raise ZeroDivisionError")
    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(tmp_path)])
    monkeypatch.setitem(COMMANDS, "broken", "fails")
    monkeypatch.setitem(COMMANDS, "missing", "is not there")
    assert main(["report", "--results", str(tmp_path)]) == 1
    with pytest.raises(ZeroDivisionError):
        main(["broken"])
    with pytest.raises(SystemExit) as ended:
        main(["missing"])
    assert ended.value.code == 2
    assert "invalid choice: 'missing'" in capsys.readouterr().err
