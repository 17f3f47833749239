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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate", choices=("sm_80", "sm_90"), help="execute the code compiled for such a GPU"
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
    """The emulator's own tests are for processes that emulate."""
    emulates = config.getoption("emulate") is not None
    return True if collection_path.name == "emulator" and not emulates else None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run: the GPU where there is one, else the CPU, interpreted or emulated."""
    return torch.device("cuda" if GPU else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_compile.py")
