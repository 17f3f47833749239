"""Set-up for all tests: where kernels run, and the repository's own packages.

On a GPU where there is one, else on the CPU in Triton's interpreter. ``--emulate sm_90`` executes
instead the code that Triton compiles for such a GPU, in the emulator.
"""

import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[1]
EMULATED = {
    *("emulator", "test_autograd.py", "test_autotune.py", "test_conv.py", "test_conv_pool.py"),
    *("test_depthwise.py", "test_descriptor_gemm.py", "test_descriptor_pool.py", "test_device.py"),
    *("test_direct_conv.py", "test_expansion.py", "test_max_pool.py", "test_properties.py"),
    *("test_replay.py", "test_stem_pool.py"),
}
"""What ``--emulate`` collects of this folder: the tests that launch kernels."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate", choices=("sm_80", "sm_90"), help="execute the code compiled for such a GPU"
    )
    parser.addoption(
        "--sample", type=int, metavar="N", help="run N cases, spread evenly, of each test function"
    )


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

        emulator.install(arch)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests that launch no kernel need no emulator, and its own tests need one."""
    if collection_path.parent != ROOT / "tests":
        return None
    if config.getoption("emulate") is None:
        return collection_path.name == "emulator" or None
    return collection_path.name not in EMULATED or None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run: the GPU where there is one, else the CPU, interpreted or emulated."""
    return torch.device("cuda" if GPU else "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits for them at the end."""
    if (count := config.getoption("sample")) is not None:
        items[:] = _sample(items, count)
    items.sort(key=lambda item: item.path.name != "test_compile.py")


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
