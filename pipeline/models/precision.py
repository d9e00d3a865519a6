"""The numeric precision in which networks compute."""

from contextlib import AbstractContextManager
from typing import Any

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which networks compute in bfloat16 for the precision "bfloat16", else unchanged in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
