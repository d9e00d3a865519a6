"""Tests that run on a device: pytest -m gpu tests/gpu --device cuda. With cpu they show that the tests run."""

import os

import pytest
import torch

from softcache.stages.runs.environment import select_device

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of --device; a GPU where there is one, by default."""
    found = select_device(request.config.getoption("--device"))
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """The device, where it is a GPU; else the test is skipped."""
    if device.type != "cuda":
        pytest.skip("tells something on a GPU alone")
    return device
