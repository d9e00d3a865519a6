"""The learning rate schedule of a training."""

import math

from softcache.stages.cli.option_groups import TrainingOptions
from softcache.stages.runs.folder import parse_milestones


class LearningRateSchedule:
    """The learning rate of each step as a share of the peak: a linear warm-up, then the schedule.

    Args:
        config: schedule, warmup (a share of the steps) and milestones (shares of the training).
        steps: of the whole training.
    """

    def __init__(self, config: TrainingOptions, steps: int):
        self._schedule, self._steps = config.schedule, steps
        self._warmup_steps = int(config.warmup * steps)
        self._milestones = parse_milestones(config) if config.schedule == "step" else []

    def __call__(self, step: int) -> float:
        """Return the share, 0 to 1, of a step, counted from 0."""
        if step < self._warmup_steps:
            return (step + 1) / (self._warmup_steps + 1)
        progress = (step - self._warmup_steps) / max(self._steps - self._warmup_steps, 1)
        if self._schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self._schedule == "step":
            return float(0.1 ** sum(progress >= share for share in self._milestones))
        return 1.0
