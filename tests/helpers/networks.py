"""Functions that tests of networks share."""

import pytest
import torch
from torch import nn

from softcache.pipeline.models import build
from softcache.pipeline.models.network_checks import TrainingCheck, check_trainable
from softcache.pipeline.models.prepared_model import InputSpec

MODULE = "tests.helpers.user_networks"


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


def check_own(name: str, least_rows: int = 2, channels: int = 1, output: str = "") -> list[str]:
    """Build a network of user_networks.py for 10 classes and 8 px, check that it can be trained; return its notes."""
    arch, spec = f"{MODULE}:{name}", InputSpec(channels, 8, (0.5,) * channels, (0.25,) * channels)
    network = build(arch, 10, channels, 8, output)
    check = TrainingCheck(
        arch=arch,
        classes=10,
        input_spec=spec,
        device=torch.device("cpu"),
        precision="float32",
        least_rows=least_rows,
        batch_size=1,
    )
    return check_trainable(network, check)
