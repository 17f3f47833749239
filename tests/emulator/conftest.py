"""The emulator with default options and no findings, for each of its own tests."""

import pytest
import torch

from bench.emulator import checks, driver


@pytest.fixture(autouse=True)
def emulator():
    for name, value in vars(checks.Options()).items():
        setattr(checks.OPTIONS, name, value)
    checks.FINDINGS.clear()
    driver.REWRITE[0] = None
    torch.manual_seed(0)
    yield checks
    driver.REWRITE[0] = None
