"""Small things that tests of networks share."""

import pytest
import torch
from torch import nn


def logits_of(network: nn.Module, channels: int, size: int, B: int = 3) -> torch.Tensor:
    """What a network in eval mode says about B random images."""
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(torch.rand(B, channels, size, size))
    return logits


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    """The error's text, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text
