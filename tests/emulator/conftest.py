"""The emulator with default options and no findings, for each of its own tests."""

from collections.abc import Iterator

import pytest
import torch

from bench import emulator
from bench.emulator import checks, driver


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = dict(vars(checks.OPTIONS))
    emulator.configure(**vars(checks.Options()))
    emulator.clear()
    driver.rewrite_by(None)
    torch.manual_seed(0)
    yield
    driver.rewrite_by(None)
    emulator.configure(**before)
    emulator.clear()
