"""Set-up for all tests: where kernels run, and the repository's own packages.

On a GPU where there is one, else on the CPU in Triton's interpreter. ``--emulate sm_90`` executes
instead the code that Triton compiles for such a GPU, in the emulator.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from forks import Forks, forks

GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[1]
EMULATED: dict[str, str] = {
    "emulator": "",
    "test_autograd.py": "gradients or derivatives or in_place",
    "test_autotune.py": "first_engine_passes",
    "test_compile_backend.py": "operands_are_cast or test_fused or eager_modes or batches",
    "test_conv.py": "",
    "test_conv_pool.py": "",
    "test_depthwise.py": "",
    "test_dispatch.py": "kept or given_back",
    "test_descriptor_gemm.py": "",
    "test_conv_pool_descriptors.py": "",
    "test_device.py": "counted_and or threads",
    "test_epilogue.py": "",
    "test_few_channels.py": "",
    "test_pool_gradient.py": "",
    "test_functional.py": "float8 or bytes",
    "test_max_pool.py": "",
    "test_properties.py": "",
    "test_replay.py": "",
    "test_conv_pool_few_channels.py": "",
}
"""What ``--emulate`` runs: files whose tests launch kernels. If not all tests of a file do, those
whose name contains one of these words."""


EMULATION = {"mode": "both", "views": True, "owners": True}
"""All checks: asynchronous work at its earliest and at its latest moment, a tensor's own elements
alone, and blocks of a launch that keep apart."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


OPTIONS: dict[str, Any] = {
    "--emulate": {
        "choices": ("sm_80", "sm_90"),
        "help": "execute the code compiled for such a GPU",
    },
    "--sample": {
        "type": _positive,
        "metavar": "N",
        "help": "run N cases, spread evenly, of each test function",
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, settings in OPTIONS.items():
        parser.addoption(name, **settings)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected, as it is read once where kernels run."""
    # Triton 3.9 warns while its default is about to change; results here must not depend on it.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    arch = config.getoption("emulate")
    if arch is not None:
        os.environ.pop("TRITON_INTERPRET", None)
    elif not GPU:
        os.environ["TRITON_INTERPRET"] = "1"

    import kernels

    # PyPI has another package of this name.
    assert Path(kernels.__file__).parents[1] == ROOT, kernels.__file__
    if arch is not None:
        from bench import emulator

        emulator.install(arch, **EMULATION)
    if arch is not None or GPU:
        # Torch's default for convolutions is tf32, which most tests do not mean.
        torch.backends.cudnn.conv.fp32_precision = "ieee"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests that launch no kernel need no emulator, and its own tests need one."""
    if collection_path.parent != ROOT / "tests":
        return None
    if config.getoption("emulate") is None:
        return collection_path.name == "emulator" or None
    return collection_path.name not in EMULATED or None


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """What a test draws follows from its name, so that it passes always or never."""
    torch.manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _emulated_without_findings(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that runs on the emulator fails by whatever its checkers find."""
    if request.config.getoption("emulate") is None:
        yield
        return
    from bench import emulator

    emulator.clear()
    yield
    found = emulator.findings()
    emulator.clear()
    assert not found, "\n".join(map(str, found))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tests run: the GPU where there is one, else the CPU, interpreted or emulated."""
    emulated = request.config.getoption("emulate") is not None
    return torch.device("cuda" if GPU and not emulated else "cpu")


@pytest.fixture(scope="session")
def cpu() -> Iterator[Forks]:
    """The command line on the CPU without the interpreter."""
    with forks() as started:
        yield started


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits for them at the end."""
    if config.getoption("emulate") is not None:
        items[:] = filter(_is_emulated, items)
    if (count := config.getoption("sample")) is not None:
        items[:] = _sample(items, count)
    items.sort(key=lambda item: item.path.name != "test_compile.py")


def _is_emulated(item: pytest.Item) -> bool:
    words = EMULATED.get(item.path.name, "")
    return not words or any(word in item.nodeid for word in words.split(" or "))


def _sample(items: list[pytest.Item], count: int) -> list[pytest.Item]:
    """Up to ``count`` cases of each test function, the first among them."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [
        cases[i * len(cases) // min(count, len(cases))]
        for cases in functions.values()
        for i in range(min(count, len(cases)))
    ]


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> str:
    """A small data set: 96 images of noise to train with, 8 to validate and 40 to test with."""
    folder = tmp_path_factory.mktemp("noise")
    draw = np.random.default_rng(0)
    for part, count in (("train", 104), ("t10k", 40)):
        for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
            values = draw.integers(256 if len(shape) == 3 else 10, size=shape, dtype=np.uint8)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
    return f"mnist:{folder}"
