"""An interrupt in the middle of a training."""

from typing import Any

import pytest

from softcache.stages.training import loop as training


def stop_at(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Raise KeyboardInterrupt in place of each of these steps, counted from 1 over all trainings from now on."""
    train_step, count = training.train_step, 0

    def train_or_interrupt(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in numbers:
            raise KeyboardInterrupt
        return train_step(*arguments)

    patch.setattr(training, "train_step", train_or_interrupt)
