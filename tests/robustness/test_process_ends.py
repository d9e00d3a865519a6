"""An error in the middle of a training ends the process: no thread or worker that renders ahead keeps it alive."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A network that fails in its third training step, as a user's own code may.
FAILING_ARCH = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes, inputs):
        super().__init__()
        self.linear, self.steps = torch.nn.Linear(inputs, classes), 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 3:
            raise ValueError("the user's own error")
        return self.linear(x.flatten(1))

def make(classes, channels, size):
    return Net(classes, channels * size * size)
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "mlp:8", "--learning-rate", "1e9"), "training the student diverged"),
        (("--arch", "failing:make"), "the user's own error"),
    ],
)
def test_an_error_with_batches_left_ends_the_process(
    tiny: Path, stages_process: Callable[..., Any], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """`stages_process` waits for 300 s at most; a process that hangs fails the test."""
    (tmp_path / "failing.py").write_text(FAILING_ARCH)
    cache = ("--cache", tiny / "cache", "--batch-size", 20, "--epochs", 2, "--out", "run")
    done = stages_process("student", *cache, *options, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
