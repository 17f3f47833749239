"""The counts of executed programs, against what can be counted by hand."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from bench import suites
from bench.__main__ import main
from bench.counted import least_bytes
from bench.emulator.counters import Counters, sample
from kernels.geometry import Conv2dGeometry, Pool2dGeometry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "bench" / "counted.schema.json").read_text())
WARP = SimpleNamespace(idx=np.arange(32), n=32)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def counters() -> Counters:
    load = SimpleNamespace(parts=("ld", "global", "b32"), line=1, where=("file.py", 2))
    return Counters(SimpleNamespace(instrs=[load]), 32)


MACHINE = SimpleNamespace(warps=1, names=np.array([1], np.int32))


@pytest.mark.parametrize(
    ("what", "addresses", "size", "sectors", "asked"),
    [
        ("side by side", 4 * np.arange(32), 4, 4, 128),
        ("one sector off", 4 * np.arange(32) + 4, 4, 5, 128),
        ("with a step", 32 * np.arange(32), 4, 32, 128),
        ("all the same", np.full(32, 64), 4, 1, 4),
        ("16 bytes each", 16 * np.arange(32), 16, 16, 512),
    ],
)
def test_a_request_takes_the_sectors_that_it_touches(what, addresses, size, sectors, asked):
    count = counters()
    count.global_access(MACHINE, WARP, None, addresses + (1 << 40), size, 0, "load")
    (access,) = count.accesses()
    assert (access.requests, access.units, access.bytes) == (1, sectors, asked)


@pytest.mark.parametrize(
    ("what", "addresses", "size", "wavefronts", "least"),
    [
        ("side by side", 4 * np.arange(32), 4, 1, 1),
        ("all the same", np.zeros(32, int), 4, 1, 1),
        ("bytes of the same words", np.arange(32), 1, 1, 1),
        ("every second word", 8 * np.arange(32), 4, 2, 1),
        ("one bank", 128 * np.arange(32), 4, 32, 1),
        ("rows of 33 words", 132 * np.arange(32), 4, 1, 1),
        ("8 bytes by half warps", 8 * np.arange(32), 8, 2, 2),
        ("16 bytes by quarters", 16 * np.arange(32), 16, 4, 4),
        ("16 bytes in rows of 128", 128 * np.arange(32), 16, 32, 4),
    ],
)
def test_a_bank_serves_one_word_at_a_time(what, addresses, size, wavefronts, least):
    count = counters()
    count.shared_access(MACHINE, WARP, None, addresses, size, 0, "load")
    (access,) = count.accesses()
    assert (access.requests, access.units, access.least) == (1, wavefronts, least)


@pytest.mark.parametrize(("pitch", "wavefronts"), [(16, 1), (128, 8), (144, 1), (64, 4)])
def test_the_rows_of_a_matrix_share_a_wavefront_if_their_banks_differ(pitch, wavefronts):
    count = counters()
    rows = pitch * np.arange(8)
    count.matrix_access(MACHINE, np.stack([rows, rows + 4096]), 0, "load")
    (access,) = count.accesses()
    assert (access.requests, access.units, access.least) == (2, 2 * wavefronts, 2)


def test_a_sample_has_one_program_of_each_part_and_is_the_same_in_each_run():
    assert sample(20, 4) == list(range(20))
    assert sample(1000, None) == list(range(1000))
    places = sample(1000, 4)
    assert [place // 250 for place in places] == [0, 1, 2, 3]
    assert places == sample(1000, 4)
    assert len({place % 250 for place in places}) == 4  # not evenly spaced


def test_the_counts_of_small_kernels():
    done = run("-m", "tests.counted_kernels")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    copy = found["copy"]
    assert (copy["programs"], copy["executed"], copy["warps"]) == (4, 4, 4)
    assert copy["load_bytes"] == copy["store_bytes"] == 4096
    assert copy["l2_read_bytes"] == copy["l2_written_bytes"] == 4096
    assert copy["requests"] == 2 * 16  # each warp loads and stores 8 bytes a thread
    assert copy["sectors"] == 2 * 4096 // 32
    assert copy["instructions"]["load"] == copy["instructions"]["store"] == 16
    assert copy["macs"] == copy["wavefronts"] == copy["tma_bytes"] == 0
    assert copy["costly"] == []

    step = found["copy with a step"]
    assert step["load_bytes"] == 4096
    # One of four floats is asked for, and each sector twice.
    assert (step["l2_read_bytes"], step["l1_bytes"]) == (8 * 4096, 4 * 4096)
    assert step["costly"][0]["source"].startswith("counted_kernels.py:")

    assert found["copy of a part"]["load_bytes"] == 4 * 1000
    sampled = found["copy of a sample"]
    assert (sampled["programs"], sampled["executed"]) == (64, 4)
    assert sampled["load_bytes"] == 4 * 8192

    product = found["product"]
    assert product["macs"] == 3 * 5 * 64**3
    assert product["instructions"]["tensor core"] == 3 * 5 * 4 * 4  # warps, products of depth 16
    assert product["fewest"] == product["most"]
    assert 0 < product["loop_instructions"] < sum(product["instructions"].values())

    box, end = found["box"], found["box at the end"]
    assert box["tma_bytes"] == end["tma_bytes"] == 2 * 16 * 32 * 4
    assert (box["l2_read_bytes"], box["l2_written_bytes"]) == (2048, 2048)
    assert end["l2_read_bytes"] == 4 * 32 * 4  # of 16 rows, 4 are inside

    # 8 stores of each of 4 warps by rows; 8 loads of each by columns, each of 32 words of a bank.
    assert found["transpose"]["wavefronts"] == 32 + 32 * 32
    assert found["transpose"]["conflicts"] == 32 * 31
    assert found["padded transpose"]["wavefronts"] == 32 + 32
    assert found["padded transpose"]["conflicts"] == 0


LAYERS = [
    {"suite": "a", "name": "plain", **dict.fromkeys("NRS", 3), "C": 64, "H": 8, "W": 8, "K": 64},
    {"suite": "a", "name": "stem", "N": 1, "C": 3, "H": 32, "W": 32, "K": 64, "R": 7, "S": 7},
    {"suite": "a", "name": "pool", "N": 1, "C": 64, "H": 16, "W": 16, "kernel": 2},
]
LAYERS[0] |= {"stride": 2, "padding": 1}
LAYERS[1] |= {"stride": 2, "padding": 3}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_command_counts_each_launch_beside_what_the_planner_assumes(arch, tmp_path):
    shapes, report = tmp_path / "shapes.json", tmp_path / "report.json"
    shapes.write_text(json.dumps(LAYERS))
    ops = "fprop", "dgrad", "wgrad", "max_pool", "max_pool_backward"
    command = ("counted", "--arch", arch, "--shapes", str(shapes), "--suite", "a")
    done = run("-m", "bench", *command, "--op", *ops, "--json", str(report))
    assert done.returncode == 0, done.stderr
    results = json.loads(report.read_text())
    jsonschema.validate(results, SCHEMA)
    rows = {(row["layer"], row["op"]): row for row in results["rows"]}
    assert len(rows) == 3 + 3 + 2
    assert all(text in done.stdout for text in ("plain", "stem", "pool", "sectors/request"))

    for op in ("fprop", "dgrad", "wgrad"):
        counted, assumed = rows["plain", op]["counted"], rows["plain", op]["assumed"]
        # Every program was executed, so that what they do is known to the last turn.
        assert counted["turns"] == assumed["turns"]
        assert counted["macs"] == assumed["macs"]
        assert counted["turn_instructions"] > 0
    assert rows["plain", "fprop"]["counted"]["launches"] == 1
    assert rows["plain", "dgrad"]["counted"]["launches"] == 4
    fprop = rows["plain", "fprop"]["launches"][0]
    assert (fprop["tma_bytes"] > 0) == (arch == "sm_90")
    assert (fprop["load_bytes"] > 0) == (arch == "sm_80")
    packed, product = rows["stem", "fprop"]["launches"]  # filters are packed first
    assert packed["macs"] == 0
    # Seven turns of a tile in each program: none is made again, as after a NaN.
    tile = map(int, rows["stem", "fprop"]["tile"].split("x"))
    assert product["macs"] == product["programs"] * 7 * prod(tile)
    pool = rows["pool", "max_pool"]
    assert pool["counted"]["macs"] == 0
    assert pool["assumed"] is None
    assert pool["counted"]["least_bytes"] == 64 * (256 * 2 + 64 * 3)


def test_an_architecture_that_is_not_emulated_is_refused(capsys):
    assert main(["counted", "--arch", "gfx942", "--layer", "stem"]) == 2
    assert capsys.readouterr().err == (
        "python -m bench counted: gfx942 is not emulated; sm_80, sm_86, sm_89, sm_90 are\n"
    )


def test_least_bytes_leave_out_pixels_that_no_tap_reads():
    down = Conv2dGeometry(2, 16, 8, 8, 32, 1, 1, stride=(2, 2))
    w, y = 32 * 16, 2 * 32 * 4 * 4
    assert least_bytes("fprop", down, 2) == 2 * (2 * 16 * 4 * 4 + w + y)
    assert least_bytes("wgrad", down, 2) == least_bytes("fprop", down, 2)
    assert least_bytes("dgrad", down, 2) == down.bytes(2)  # all of dx is written
    same = Conv2dGeometry(2, 16, 8, 8, 32, 3, 3, padding=((1, 1), (1, 1)))
    assert least_bytes("fprop", same, 2) == same.bytes(2)
    pool = Pool2dGeometry(1, 4, 9, 9, (2, 2), (2, 2))  # the last row and column are not read
    assert least_bytes("max_pool", pool, 2) == 4 * (64 * 2 + 16 * 3)
    assert least_bytes("max_pool_backward", pool, 2) == 4 * (81 * 2 + 16 * 3)
    block = suites.Block(
        Conv2dGeometry(1, 3, 8, 8, 4, 1, 1), Pool2dGeometry(1, 4, 8, 8, (2, 2), (2, 2))
    )
    assert least_bytes("conv_relu_max_pool", block, 2) == 2 * (3 * 64 + 12) + 4 * 16 * 3
