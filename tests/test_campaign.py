"""The campaign on tiny layers: what it checks, and that no fault hides or ends it."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from triton.backends.compiler import GPUTarget

from bench import campaign, emulator, measure
from bench.__main__ import main
from bench.campaign import items, timing, workers
from bench.campaign.items import Check, Timing
from bench.campaign.summary import summary
from bench.emulator.checks import Report, note
from kernels import device, planner
from kernels.geometry import Conv2dGeometry
from kernels.ops.dispatch import operators
from kernels.problem import Problem

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "bench" / "campaign.schema.json").read_text())
HOPPER = device.typical(GPUTarget("cuda", 90, 32))

# Faults, each in an engine or operator of its own, and a right one among them.
PLANTED = """
import os, sys
from kernels import device
from kernels.conv import depthwise, paired_columns, relu_backward
from kernels.conv.engine import Fprop
from kernels.pool import pool_gradient
from bench.__main__ import main

launch = device.launch
pools = []

def wrong(call, tile):
    depthwise.fprop(call, tile)
    call.y.mul_(1.01)

def moody(kernel, grid, *args, **options):
    launch(kernel, grid, *args, **options)
    if kernel.fn.__name__ == "max_pool2d_kernel":
        pools.append(kernel)
        if len(pools) == 2:
            named = {**dict(zip(kernel.arg_names, args)), **options}
            named["y_ptr"].view(-1)[0] = 100.0

def broken(call, tile):
    raise RuntimeError("no such engine\\nand more")

depthwise.ENGINE.launchers[Fprop] = wrong
device.launch = moody
paired_columns.ENGINE.launchers[Fprop] = broken
relu_backward.relu_backward = lambda *args: None
pool_gradient.write = lambda *args: os.abort()
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
FAULTS = {
    "conv2d depthwise bf16": "the error is",
    "max_pool2d maxpool bf16 nchw": "1 repeats differ, alone",
    "conv2d stem bf16": "RuntimeError: no such engine",
    "relu_backward l3.1.conv2 bf16": "elements are not finite",
    "conv2d_relu_max_pool2d_backward odd+pool bf16": "the process ended by SIGABRT",
}
RIGHT = (
    *("conv2d_dgrad depthwise bf16", "channel_sum l3.1.conv2 bf16"),
    "conv2d_fp8 l3.1.conv2 bf16 bias+relu",
)
NOT_MEASURED = (
    *("product of 8192, bf16", "copy of 1 GiB", "copy of 16 MiB in L2", "clock under load"),
    *("launch of 1 program", "time of fprop l2.1.conv1"),
)


# Python from 3.12 on warns of forks beside threads, which pytest may have.
fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def rows_of(file: Path) -> dict[str, dict]:
    results = json.loads(file.read_text())
    jsonschema.validate(results, SCHEMA)
    return {row["item"]: row for row in results["rows"]}


def engine_of(check: Check) -> str:
    """What runs a convolution on Hopper, also one that is pooled at once."""
    kind, g = measure.DTYPES[check.dtype], check.geometry
    conv = g if isinstance(g, Conv2dGeometry) else g.conv
    layout = "aligned" if check.channels_last else "scattered"
    if conv.C % 8 or conv.K % 8:
        layout = "channels_last" if check.channels_last else "scattered"
    direction = items.DIRECTIONS[check.operator] if g is conv else "fprop"
    problem = Problem(direction, conv, kind.torch, kind.precision, HOPPER, layout)
    if g is conv:
        return planner.plan(problem).engine.name
    engine, _ = planner.plan_pooled(problem, g.pool)
    return engine.name


# What there is to do.


def test_every_operator_and_engine_is_checked_and_wgrad_first():
    found = items.items(HOPPER, timing.CEILINGS, small=False)
    checks = [item for item in found if isinstance(item, Check)]
    assert {check.operator for check in checks} == operators.keys()
    assert checks[0].operator == "conv2d_wgrad"
    assert isinstance(found[0], Check)
    engines = {
        (engine_of(check), items.DIRECTIONS.get(check.operator), check.dtype)
        for check in checks
        if check.operator in (*items.DIRECTIONS, "conv2d_relu_max_pool2d")
    }
    three = ("implicit_gemm", "few_channels", "depthwise")
    expected = {
        (engine, direction, dtype)
        for engine in three
        for direction in items.OPERATORS
        for dtype in items.CHECKED
    }
    expected |= {
        ("descriptor_gemm", direction, dtype)
        for direction in items.OPERATORS
        for dtype in ("bf16", "fp16", "tf32")
    }
    expected |= {
        ("paired_columns", direction, dtype)
        for direction in ("fprop", "wgrad")
        for dtype in ("bf16", "fp16")
    }
    expected |= {("few_channels", None, dtype) for dtype in items.CHECKED}
    expected |= {("implicit_gemm", None, dtype) for dtype in items.CHECKED}
    expected |= {("descriptor_gemm", None, dtype) for dtype in ("bf16", "fp16", "tf32")}
    assert expected <= engines


def test_all_tiles_of_wgrad_are_checked():
    found = items.items(HOPPER, timing.CEILINGS, small=False)
    checked = {
        item.forced.tile
        for item in found
        if isinstance(item, Check) and item.layer == "l2.1.conv2" and item.forced
    }
    g = next(item.geometry for item in found if item.name == "conv2d_wgrad l2.1.conv2 bf16")
    assert isinstance(g, Conv2dGeometry)
    bf16 = measure.DTYPES["bf16"].torch
    family = planner.family(Problem("wgrad", g, bf16, "ieee", HOPPER, "aligned"))
    assert checked == {plan.tile for plan in family}


def test_three_tiles_of_seven_layers_are_timed_the_planners_choice_first():
    found = [
        item
        for item in items.items(HOPPER, timing.CEILINGS, small=False)
        if isinstance(item, Timing)
    ]
    layers = {(item.layer, item.direction) for item in found}
    assert len(layers) == 7 * 3
    for key in layers:
        mine = [item for item in found if (item.layer, item.direction) == key]
        assert [item.contender for item in mine][:2] == ["cudnn", "ours"]
        ranks = [item.rank for item in mine if item.contender == "ours"]
        assert ranks == [0, 1, 2]
    assert [item.rank for item in found] == sorted(item.rank for item in found)


def test_small_layers_keep_their_engines():
    """But wgrad, which is free to choose by size, and groups, whose 16 channels fill no block."""
    large, small = (
        {item.name: item for item in items.items(HOPPER, (), small) if isinstance(item, Check)}
        for small in (False, True)
    )
    names = [
        name
        for name, check in large.items()
        if check.operator in ("conv2d", "conv2d_dgrad")
        and check.layer != "grouped"
        and check.forced is None
    ]
    assert len(names) > 50
    for name in names:
        engines = {engine_of(checks[name]) for checks in (large, small)}
        assert len(engines) == 1, (name, engines)


# A run.


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The exit code, rows and output of a run with faults."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    command = [folder / "planted.py", "campaign", "--device", "cpu", "--minutes", 10]
    command += ["--json", folder / "kept.json", "--only", *FAULTS, *RIGHT, *NOT_MEASURED]
    done = run(*command, TRITON_INTERPRET="1")
    return SimpleNamespace(
        code=done.returncode, rows=rows_of(folder / "kept.json"), out=done.stdout, err=done.stderr
    )


def test_each_fault_is_its_rows_result_and_the_exit_code(planted):
    assert planted.code == 1, planted.err
    for name, reason in FAULTS.items():
        assert not planted.rows[name]["ok"]
        assert reason in planted.rows[name]["reason"]
        assert f"FAILED {name}: " in planted.out
        assert "\n" not in planted.rows[name]["reason"]
    assert "nothing was left out" in planted.out
    assert f"checks: {len(FAULTS) + len(RIGHT)} done, {len(FAULTS)} failed" in planted.out


def test_the_rest_goes_on(planted):
    assert len(planted.rows) > len(FAULTS) + len(RIGHT)
    for name in RIGHT:
        row = planted.rows[name]
        assert row["ok"]
        assert 0 < row["error"] <= row["bound"] < 6e-3
        assert row["differing"] == {"alone": 0}
        assert row["kernels"]


def test_a_cpu_gives_no_times(planted):
    for row in planted.rows.values():
        assert row.get("value") is None
        assert row.get("ms") is None
    assert len([row for row in planted.rows.values() if row["kind"] == "timing"]) == 2
    assert planted.out.count("not measured") == len(NOT_MEASURED) + 1


@fork
def test_a_run_goes_on_where_another_ended(tmp_path, capfd):
    file = tmp_path / "kept.json"
    command = ["campaign", "--device", "cpu", "--json", str(file), "--only", *RIGHT]
    assert main([*command, "channel_sum l3.1.conv2 fp16"]) == 0
    rows = rows_of(file)
    assert len(rows) == len(RIGHT) + 1
    assert main(command) == 2
    assert "--resume continues it" in capfd.readouterr().err
    assert main([*command, "channel_sum l3.1.conv2 fp32", "--resume"]) == 0
    assert capfd.readouterr().out.count("ok  ") == 1
    assert {**rows_of(file), **rows} == rows_of(file)
    assert len(rows_of(file)) == len(RIGHT) + 2


def test_emulated_for_hopper(tmp_path):
    """The binaries of a GPU, compiled ahead by other processes than the one that runs them."""
    file = tmp_path / "kept.json"
    names = ["conv2d_wgrad l3.0.down bf16", "relu_backward l3.1.conv2 bf16", "launch of 1 program"]
    command = ["-m", "bench", "campaign", "--device", "cpu", "--emulate", "sm_90", "--minutes", 10]
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = run(*command, "--jobs", 1, "--json", file, "--only", *names, **cache)
    assert done.returncode == 0, done.stderr
    rows = rows_of(file)
    assert rows.keys() == {*names}
    assert rows[names[0]]["chosen"].startswith("descriptor_gemm")
    assert rows[names[0]]["kernels"] == ["wgrad_kernel"]
    assert all(rows[name]["compile_s"] == 0 for name in names[:2])


def test_what_the_emulator_finds_is_a_failure():
    emulator.clear()
    assert campaign._found() == {}
    for kind in ("race", "copy not waited for"):
        note(Report(kind, "wgrad_kernel", "ld.shared", "a read"))
    reason = "race: a read in wgrad_kernel, ld.shared"
    assert campaign._found() == {"ok": False, "reason": reason}
    assert campaign._found() == {}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--emulate", "sm_90"], "--emulate is for --device cpu"),
        (["--minutes", "0"], "'0' is not a positive number of minutes"),
    ],
)
def test_what_cannot_be_used(arguments, reason, capfd):
    """Exit code 2 and one line."""
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["campaign", *arguments]))
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert reason in err
    assert err.count("\n") == 1


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no GPU here" in campaign._server("cuda", None, "unknown")("machine")


def test_the_summary_puts_tiles_beside_cudnn_and_predictions():
    asked = items.items(HOPPER, timing.CEILINGS, small=False)
    cudnn, ours = [item for item in asked if isinstance(item, Timing)][:2]
    check, ceiling = asked[0], next(item for item in asked if isinstance(item, items.Ceiling))
    rows = [campaign.failed(item, "") | {"ok": True} for item in (check, ceiling, cudnn, ours)]
    rows[0] |= {"error": 0.001, "bound": 0.004}
    rows[1] |= {"value": 790.0, "unit": "TFLOP/s"}
    rows[2] |= {"ms": 0.3, "tflops": 600.0}
    rows[3] |= {"ms": 0.2, "tflops": 900.0, "predicted_ms": 0.15, "limit": "memory"}
    rows[3] |= {"chosen": str(ours.forced)}
    lines = summary(rows, asked).splitlines()
    assert f"{ceiling.name}: 790 TFLOP/s" in lines[1]
    (tile,) = [line for line in lines if line.startswith(ours.layer)]
    assert tile.split()[-4:] == ["0.2000", "900", "0.75", "1.50"]
    assert f"  the largest error is 0.25 of its bound: {check.name}" in lines
    assert lines[-1].startswith("left out, as time was over: ")
    assert lines[-1].endswith(f"the first is {asked[1].name}")


# Time.


def test_the_budget_is_kept(monkeypatch, capsys):
    """By a clock that each item moves by seven seconds: three minutes hold 25 of them."""
    now = [1000.0]
    monkeypatch.setattr(campaign.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(campaign._Campaign, "_ask", lambda self, request: answer(request))
    machine = campaign.Machine(dict.fromkeys(("gpu", "commit"), "none"), HOPPER, None)
    asked = []

    def answer(request):
        if request == "machine":
            return machine
        asked.append(request)
        now[0] += 7.0
        return campaign.failed(request, "no time was taken") | {"ok": True, "error": 0, "bound": 0}

    parser = argparse.ArgumentParser()
    campaign.add_arguments(parser)
    parser.set_defaults(command="python -m bench campaign", started=1000.0)
    args = parser.parse_args(["--device", "cpu", "--emulate", "sm_90"])
    assert campaign.run(args) == 0
    assert len(asked) == 25
    assert now[0] <= 1180.0
    found = items.items(HOPPER, timing.CEILINGS, small=True)
    assert asked == found[:25]
    assert f"the first is {found[25].name}" in capsys.readouterr().out


@fork
def test_a_worker_that_does_not_answer_is_ended():
    worker = workers.Worker(lambda: time.sleep)
    assert worker.ask(0.0, 60.0) is None
    with pytest.raises(workers.Late, match="more than 1 s"):
        worker.ask(600.0, 0.6)
    assert not worker._process.is_alive()


@fork
def test_a_worker_that_ends_says_how():
    worker = workers.Worker(lambda: os._exit)
    with pytest.raises(workers.Death, match="with exit code 3"):
        worker.ask(3, 60.0)


@fork
def test_whoever_waits_for_a_compiler_does_not_wait_for_a_dead_one(tmp_path):
    def compile_(task):
        if task == "dies":
            os._exit(1)
        if task == "fails":
            raise ValueError(task)
        (tmp_path / task).touch()

    ahead = workers.Compilers(compile_, ["one", "fails", "dies", "never"], 1)
    for index in range(4):
        ahead.wait(index, time.monotonic() + 60.0)
    ahead.end()
    assert {path.name for path in tmp_path.iterdir()} == {"one"}
