"""How many binaries layers and networks need, and that another batch or image size needs none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.binaries"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_new_size_needs_no_new_binary(found):
    assert len(found["rows"]) == 2 * (9 * 3 + 2 * 2 + 5 * 2)
    assert [row for row in found["rows"] if row["more"]] == []


def test_a_direction_of_a_layer_needs_few_binaries(found):
    for row in found["rows"]:
        phases = 4 if row["direction"] == "dgrad" else 1
        second_passes = 2 if row["direction"] == "wgrad" else 0
        if row["layer"] in ("stem", "lenet5") and row["direction"] == "fprop":
            phases = 3  # filters are packed first; rows of the image start on wide words or not
        most = 6 if "pool" in row["layer"] else phases + second_passes
        if ", pool" in row["layer"]:  # the families of tiles of a fused block's products
            most = 8 if row["direction"] == "forward" else 32
        assert 1 <= len(row["first"]) <= most, row


def test_what_makes_another_binary_is_seen(found):
    """The layout does: aligned rows of channels are loaded 16 bytes at a time."""
    rows = [row for row in found["rows"] if row["layer"] == "3x3"]
    for direction in ("fprop", "dgrad", "wgrad"):
        contiguous, channels_last = (
            {tuple(binary) for binary in row["first"] if "split_sum" not in binary[0]}
            for row in rows
            if row["direction"] == direction
        )
        assert contiguous.isdisjoint(channels_last)


def test_rows_of_channels_are_accessed_16_bytes_at_a_time(found):
    names = ["fprop_kernel", "max_pool2d_kernel", "relu_backward_kernel"]
    names += ["depthwise_kernel"] * 2
    assert [name for name, _ in found["accesses"]] == names
    for name, sizes in found["accesses"]:
        assert set(sizes) == {16}, name


def test_a_training_step_of_resnet50_needs_few_binaries(found):
    assert 10 < found["resnet50"]["one_step"] <= 48


def test_a_network_needs_no_new_binary_after_warming_up(found):
    counts = found["resnet50"]
    assert counts["other_sizes"] > counts["one_step"]  # other sizes do take other binaries
    assert counts["new"] == []
