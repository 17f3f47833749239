"""The kernels' machine code, compiled for GPUs that are not here.

No kernel spills in 16 bits, products use tensor cores, and those of ResNet-50 are fed fast enough.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import compiled, selection
from bench.__main__ import main
from kernels import device
from kernels.conv.engine import Call, Dgrad, Engine, Fprop, Plan, Wgrad
from kernels.geometry import Conv2dGeometry
from kernels.tile import Tile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
PRODUCTS = {
    ("conv.implicit_gemm", "fprop_kernel"),
    ("conv.implicit_gemm", "wgrad_kernel"),
    ("conv.few_channels", "few_channel_fprop_kernel"),
    ("conv.few_channels", "few_channel_wgrad_kernel"),
    ("conv.paired_columns", "pair_fprop_kernel"),
    ("conv.paired_columns", "pair_wgrad_kernel"),
}
STEM_PRODUCTS = {("conv_pool.few_channels", "few_channel_pool_kernel")}  # on NVIDIA's GPUs
DESCRIPTOR_PRODUCTS = {  # on Hopper and later
    ("conv.descriptor_gemm", "product_kernel"),
    ("conv.descriptor_gemm", "wgrad_kernel"),
    ("conv_pool.descriptor_gemm", "pooled_product_kernel"),
}
OTHERS = {
    ("conv.paired_columns", "pack_kernel"),
    ("lang.split_sum", "split_sum_kernel"),
    ("conv.few_channels", "few_channel_dgrad_kernel"),
    ("conv.depthwise", "depthwise_kernel"),
    ("conv.depthwise", "depthwise_wgrad_kernel"),
    ("conv.relu_backward", "relu_backward_kernel"),
    ("pool.pool_gradient", "pool_gradient_kernel"),
    ("pool.max_pool", "max_pool2d_kernel"),
    ("pool.max_pool", "max_pool2d_backward_kernel"),
    ("pool.max_pool", "max_pool2d_far_backward_kernel"),
    ("pool.max_pool", "max_pool2d_gather_kernel"),
    ("pool.max_unpool", "max_unpool2d_kernel"),
    ("pool.max_unpool", "max_unpool2d_backward_kernel"),
}


def run(*arguments: str) -> str:
    """What Python prints, in a process of its own without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# One test for each compilation: the workers of pytest-xdist would each make a fixture's anew.


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_in_16_bits_and_products_use_tensor_cores(arch):
    kernels = json.loads(run("-m", "tests.compiled_kernels", arch))
    products = PRODUCTS | (DESCRIPTOR_PRODUCTS if arch in ("sm_90", "sm_100") else set())
    if arch.startswith("sm_"):
        products |= STEM_PRODUCTS
    assert _names(kernels) == products | OTHERS
    assert {kernel["dtype"] for kernel in kernels} == {"float16", "bfloat16", "float32", "float64"}
    if arch == "sm_90":  # on sm_100 Triton fences copies from 3.7 on
        assert [kernel for kernel in kernels if kernel["unfenced_products"]] == []
    narrow = [kernel for kernel in kernels if kernel["dtype"] in ("float16", "bfloat16")]
    assert [kernel for kernel in narrow if kernel["spill_bytes"]] == []
    multiplying = [k for k in narrow if k["tensor_core_instructions"] is not None]
    assert _names(multiplying) == products
    assert [kernel for kernel in multiplying if not kernel["tensor_core_instructions"]] == []
    pooling = [kernel for kernel in multiplying if kernel["engine"] == "conv_pool.descriptor_gemm"]
    # A thread's, for 128 accumulators: rounding, pooling, switches, stores.
    assert [kernel for kernel in pooling if kernel["epilogue_instructions"] > 1200] == []


def _names(kernels: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(kernel["engine"], kernel["kernel"]) for kernel in kernels}


POOLINGS = """
import json
from collections import Counter

import torch

from bench import compiled, selection
from kernels.geometry import Pool2dGeometry, channels_last_strides
from kernels.pool import max_pool


def empty(shape, dtype):
    return torch.empty_strided(shape, channels_last_strides(shape), dtype=dtype, device="meta")


def launch(gpu, dtype, channels, *window):
    g = Pool2dGeometry(4, channels, 27, 31, *window)
    x, y, argmax = empty(g.x_shape, dtype), empty(g.y_shape, dtype), empty(g.y_shape, torch.uint8)
    forward, backward = (max_pool.choose_tile(way, g, True, gpu) for way in ("forward", "backward"))
    max_pool.max_pool2d(x, g, y, None, None, forward)
    max_pool.max_pool2d(x, g, y, argmax, None, forward)
    max_pool.max_pool2d_backward(y, argmax, x, g, backward)


with selection.compiling("sm_90") as (gpu, launched):
    launch(gpu, torch.bfloat16, 64, (3, 3), (2, 2), (1, 1))
    launch(gpu, torch.float16, 24, (2, 2), (2, 2))
    print(json.dumps([Counter(compiled.accesses(kernel)) for kernel in launched]))
"""


def test_a_thread_pools_eight_channels_by_the_widest_accesses():
    """Of values without argmax, with argmax, and of gradients: each window's are read once for
    the four pixels of a cell. Channels are a multiple of 8, pixels and batches of nothing.
    """
    assert json.loads(run("-c", POOLINGS)) == [
        {"LDG.E.128": 9, "STG.E.128": 1},
        {"LDG.E.128": 9, "STG.E.128": 1, "STG.E.64": 1},
        {"LDG.E.128": 4, "LDG.E.64": 4, "STG.E.128": 4},
        {"LDG.E.128": 4, "STG.E.128": 1},
        {"LDG.E.128": 4, "STG.E.128": 1, "STG.E.64": 1},
        {"LDG.E.128": 1, "LDG.E.64": 1, "STG.E.128": 4},
    ]


# A few layers of ResNet-50: 3x3 with 64 channels, 3x3 of stride 2, 1x1 of stride 2, two 1x1.
LAYERS = ("l1.0.conv2", "l2.0.conv2", "l3.0.down", "l3.0.conv3", "l3.1.conv1")


def test_layers_of_resnet50_reach_the_targets_on_hopper(tmp_path):
    path = tmp_path / "report.json"
    options = ("--arch", "sm_90", "--suite", "resnet50_v1.5", "--dtype", "bf16")
    text = run("-m", "bench", "compiled", *options, "--layer", *LAYERS, "--json", str(path))
    assert "\n15 rows, " in text
    report = json.loads(path.read_text())
    assert set(report) == {"arch", "triton", "commit", "command", "rows"}
    assert report["arch"] == "sm_90"
    assert report["command"].startswith("python -m bench compiled --arch sm_90 --suite resnet50")
    rows = {(row["op"], row["layer"]): row for row in report["rows"]}
    assert rows.keys() == {(op, layer) for op in ("fprop", "dgrad", "wgrad") for layer in LAYERS}

    assert {row["engine"] for row in rows.values()} == {"descriptor_gemm"}
    assert [name for name, row in rows.items() if row["spill_bytes"]] == []
    shares = {name: row["issue_share"] for name, row in rows.items()}
    assert [name for name, share in shares.items() if share > 0.6] == []
    assert statistics.median(shares.values()) <= 0.30

    for row in rows.values():
        _check_counts(row)
    _check_identities({name: row["binary"] for name, row in rows.items()}, path)


def _check_counts(row: dict[str, Any]) -> None:
    """A turn of the loop multiplies whole turns of the tile; shares follow their definition."""
    assert 0 < row["tensor_core_instructions"] < row["loop_instructions"]
    assert row["epilogue_instructions"] > 0
    assert row["compile_s"] > 0
    assert row["binary"] in row["binaries"]
    rows, columns, depth = map(int, row["tile"].split("x"))
    turns, rest = divmod(row["loop_macs"], rows * columns * depth)
    assert (rest, row["loop_turns"]) == (0, turns)
    others = row["loop_instructions"] - row["tensor_core_instructions"]
    share = others * row["warps"] / 4 / (row["loop_macs"] / 2048)
    assert row["issue_share"] == pytest.approx(share, abs=1e-4)


def _check_identities(binaries: dict[tuple[str, str], str], path: Path) -> None:
    """Equal code has one name, in another process and folder too; other code has another."""
    layer = ("--layer", "l1.0.conv2", "--op", "fprop")
    run("-m", "bench", "compiled", *layer, "--json", str(path))
    (again,) = json.loads(path.read_text())["rows"]
    assert again["binary"] == binaries["fprop", "l1.0.conv2"]
    assert again["binary"] != binaries["dgrad", "l1.0.conv2"]
    assert again["binary"] != binaries["fprop", "l2.0.conv2"]


def test_operators_under_their_own_names_are_read(tmp_path):
    """conv_relu is fprop with its epilogue; a block's gradient shows what finds it."""
    path = tmp_path / "report.json"
    read = ("-m", "bench", "compiled", "--json", str(path))
    run(*read, "--suite", "lenet5_n256", "--layer", "C1", "C1+pool", "--op", *NAMED_OPS)
    rows = {row["op"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == set(NAMED_OPS)
    assert {row["spill_bytes"] for row in rows.values()} == {0}
    engines = {op: (row["engine"], row["kernel"]) for op, row in rows.items()}
    assert engines["first_layer_wgrad"] == ("paired_columns", "pair_wgrad_kernel")
    assert engines["conv_relu_max_pool_backward"] == engines["first_layer_wgrad"]
    assert rows["conv_relu"]["binary"] != rows["first_layer"]["binary"]
    run(*read, "--suite", "lenet5_n256", "--layer", "C1", "--op", "fprop", "--bias", "--relu")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["binary"] == rows["conv_relu"]["binary"]
    layer = ("--suite", "mobilenetv2_depthwise", "--layer", "b1.0.dw")
    run(*read, *layer, "--op", "depthwise_wgrad")
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["kernel"], row["spill_bytes"]) == ("depthwise_wgrad_kernel", 0)


def test_the_stems_loop_is_not_the_one_that_runs_after_a_nan(tmp_path):
    path = tmp_path / "report.json"
    run("-m", "bench", "compiled", "--layer", "stem", "--op", "fprop", "--json", str(path))
    (row,) = json.loads(path.read_text())["rows"]
    assert row["loop_turns"] == 7  # the rows of a filter
    assert row["tensor_core_instructions"] == 7 * 2


NAMED_OPS = (
    *("conv_relu", "first_layer", "first_layer_wgrad"),
    *("conv_relu_max_pool", "conv_relu_max_pool_backward"),
)


# Without compiling.


HEAD = "layer op dtype engine tile box split_k ms limit"


def plan_lines(capsys, *arguments: str) -> dict[tuple[str, str], list[str]]:
    """The words of each line of ``bench plan``, by layer and direction."""
    assert main(["plan", *arguments]) == 0
    head, *lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert " ".join(head.split()) == HEAD
    return {(words[0], words[1]): words for words in map(str.split, lines)}


def test_plan_has_a_line_for_each_layer_and_direction(capsys):
    lines = plan_lines(capsys, "--arch", "sm_90", "--suite", "resnet50_v1.5", "--dtype", "bf16")
    assert len(lines) == 3 * 23
    for (layer, direction), words in lines.items():
        engine, tile, box, split_k, ms = words[3:8]
        if layer == "stem":
            paired = direction != "dgrad"
            assert (engine, box) == ("paired_columns" if paired else "few_channels", "-")
        else:
            assert engine == "descriptor_gemm"
            assert str(math.prod(map(int, box.split("x")))) in tile.split("x")
        assert int(split_k) >= 1
        assert float(ms) > 0


def test_plan_follows_the_batch_and_the_architecture(capsys):
    layer = ("--layer", "l1.0.conv2", "--op", "fprop")
    key = "l1.0.conv2", "fprop"
    many, few = (plan_lines(capsys, *layer, "--batch", n)[key] for n in ("256", "32"))
    assert float(many[7]) > 4 * float(few[7])
    assert plan_lines(capsys, *layer, "--arch", "sm_80")[key][3] == "implicit_gemm"
    assert plan_lines(capsys, *layer, "--arch", "gfx942")[key][3] == "implicit_gemm"


def test_plan_sums_layers_as_often_as_the_network_has_them(capsys):
    layers = ("--layer", "l1.0.conv1", "l1.0.conv2", "--op", "fprop")
    once = plan_lines(capsys, *layers)
    main(["plan", *layers])
    total = capsys.readouterr().out.splitlines()[-1]
    expected = float(once["l1.0.conv1", "fprop"][7]) + 3 * float(once["l1.0.conv2", "fprop"][7])
    name, _, ms = total.partition(": ")
    assert name == "resnet50_v1.5 fprop bf16"
    assert float(ms.removesuffix(" ms")) == pytest.approx(expected, abs=1e-3)


def noting(calls: list[Call]) -> Engine:
    """An engine that notes what it is called with."""

    def launch(call: Call, tile: Tile) -> None:
        calls.append(call)

    return Engine("engine", lambda problem: (), dict.fromkeys((Fprop, Dgrad, Wgrad), launch))


def test_an_epilogue_is_launched_where_it_is_asked_for():
    g = Conv2dGeometry(2, 8, 6, 5, 16, 3, 3)
    x, w, y = tensors = selection.operands(g, torch.bfloat16)
    plain, full = [], []
    for direction in selection.DIRECTIONS:
        arguments = direction, g, tensors
        compiled.launch(*arguments, Plan(noting(plain), Tile(1, 1), 1.0, "L2"), "ieee")
        parts = {"bias": True, "relu": True, "residual": True}
        compiled.launch(*arguments, Plan(noting(full), Tile(1, 1), 1.0, "L2"), "ieee", **parts)
    fprop, dgrad, wgrad = plain
    assert fprop == Fprop(x, w, y, g, "ieee")
    assert wgrad.db is None
    fprop, other_dgrad, wgrad = full
    bias, residual, relu, _ = fprop.epilogue
    assert (fprop.x, fprop.w, fprop.y) == (x, w, y)
    assert bias.shape == wgrad.db.shape == (16,)
    assert residual is y
    assert relu
    assert other_dgrad == dgrad


@pytest.mark.parametrize(
    ("kernel", "padding", "launches", "chosen"),
    [
        (3, 1, 4, 3),  # phases of 1, 2, 2 and 4 taps
        (3, 0, 4, 0),  # of 4, 2, 2 and 1
        (1, 0, 4, 0),  # one phase has the tap, the others are set to zero
        (1, 0, 1, 0),  # and need no launch
        (2, 0, 4, 0),  # all the same
    ],
)
def test_the_row_is_of_the_phase_with_most_taps(kernel, padding, launches, chosen):
    pads = (padding, padding)
    g = Conv2dGeometry(2, 8, 8, 8, 8, kernel, kernel, (2, 2), (pads, pads))

    def launched(module: str, name: str) -> SimpleNamespace:
        function = SimpleNamespace(__module__=module)
        source = SimpleNamespace(fn=SimpleNamespace(fn=function))
        return SimpleNamespace(src=source, name=name, asm={"ttir": "tt.dot"})

    kernels = [launched("kernels.engine", str(i)) for i in range(launches)]
    others = [launched("other", "sum"), *kernels, launched("other", "sum")]
    plan = Plan(noting([]), Tile(1, 1), 1.0, "L2")
    assert compiled.principal(others, g, plan).name == str(chosen)


def test_a_kernel_that_does_not_compile_is_told_and_leaves_the_others(
    monkeypatch, capsys, tmp_path
):
    def fail(self, case, **epilogue):
        assert epilogue == {"bias": True, "relu": False, "residual": True}
        raise RuntimeError("out of registers")

    monkeypatch.setattr(selection, "compiling", lambda arch: nullcontext((None, [])))
    monkeypatch.setattr(compiled.Reader, "row", fail)
    path = tmp_path / "report.json"
    options = ["--op", "dgrad", "--bias", "--residual", "--json", str(path)]
    assert main(["compiled", "--layer", "stem", *options]) == 1
    assert "stem dgrad bf16 does not compile: RuntimeError" in capsys.readouterr().err
    assert json.loads(path.read_text())["rows"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan", "--suite", "nothing"], "no suite 'nothing'"),
        (["plan", "--layer", "nothing"], "no layer 'nothing'"),
        (["plan", "--arch", "h100"], "no architecture 'h100'"),
        (["plan", "--batch", "0"], "'0' is not a whole number"),
        (["plan", "--shapes", "nothing.json"], "cannot read nothing.json"),
        (["compiled", "--suite", "nothing"], "no suite 'nothing'"),
        (["compiled", "--json", "nowhere/report.json"], "no folder for nowhere/report.json"),
        (["compiled"], "TRITON_INTERPRET is set"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(arguments, told, capsys, monkeypatch):
    monkeypatch.setattr(device, "INTERPRET", True)
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse's own way
        code = error.code
    assert code == 2
    text = capsys.readouterr().err
    assert told in text
    assert text.count("\n") == 1
