"""Functions that tests of networks share."""

import pytest
import torch
from torch import nn


def compute_logits(network: nn.Module, channels: int, size: int, B: int = 3) -> torch.Tensor:
    """Return the logits of a network in eval mode for B random images."""
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(torch.rand(B, channels, size, size))
    return logits


def get_one_line_message(error: pytest.ExceptionInfo[Exception]) -> str:
    """Return the text of an error, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text
