"""On a CPU that runs no kernels the library is torch, which takes a process of its own to see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from kernels import device


def test_on_a_plain_cpu_the_library_is_torch():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/plain_cpu.py"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not device.takes_cpu(), reason="refused only where kernels take CPU tensors")
def test_the_benchmark_refuses_the_interpreter(capsys):
    assert main(["cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench cpu: TRITON_INTERPRET is set")


@pytest.mark.parametrize("wrong", [["--model", "vgg16"], ["--seconds", "-1"]], ids=" ".join)
def test_wrong_arguments_end_in_2(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        main(["cpu", *wrong])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wrong[1] in line
