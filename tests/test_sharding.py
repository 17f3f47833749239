"""DTensors: batches sharded over processes, and all that is replicated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_autograd import OPERATORS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


def test_two_processes_share_a_batch(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    program = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "sharded.py")]
    processes = [
        subprocess.Popen(
            [*program, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def test_all_operators_are_known_to_it_where_it_is_imported():
    program = """
import sys
import cnn
assert not {"torch.distributed.tensor", "torch._dynamo"} & sys.modules.keys()
from kernels.ops.dispatch import operators
print(*sorted(operators))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.split() == OPERATORS, run.stderr
