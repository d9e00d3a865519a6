"""Ctrl-C in the middle of a training."""

from typing import Any

import pytest

from softcache.stages.training import loop as training


def stop_at(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """A KeyboardInterrupt in place of each of these steps, counted from 1 over all trainings from now on."""
    step, taken = training.train_step, [0]

    def stopping(*arguments: Any) -> Any:
        taken[0] += 1
        if taken[0] in numbers:
            raise KeyboardInterrupt
        return step(*arguments)

    patch.setattr(training, "train_step", stopping)
