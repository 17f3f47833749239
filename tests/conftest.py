"""Set-up for all tests: the interpreter where there is no GPU, the repository's own packages."""

import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# Triton 3.9 warns while its default is about to change; results here must not depend on it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

import kernels  # noqa: E402

# PyPI has another package of this name.
assert Path(kernels.__file__).parents[1] == Path(__file__).parents[1], kernels.__file__


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run: the GPU where there is one, else the CPU through Triton's interpreter."""
    return torch.device("cuda" if GPU else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_compile.py")
