"""Arithmetic of networks: bfloat16 where it is asked for."""

from contextlib import AbstractContextManager
from typing import Any

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 where it is asked for; float32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
