"""What is trained: one training, as a record."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from softcache.pipeline.batch import LossContext
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import StudentConfig, TeacherConfig

from .checkpoint import RngState
from .schedule import LearningRateSchedule

AfterEpoch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingRun:
    """A teacher, a baseline or a student to be trained; they differ in stream and criterion alone.

    Attributes:
        name: teacher, baseline, student, or distilled (before fine-tuning).
        model: uint8 views -> logits; trained in place.
        criterion: the loss.
        stream: the batches.
        epochs, steps: so many epochs of so many steps each.
        config: the options of the command.
        device: where the model is.
        folder: where checkpoint, metrics and weights are kept.
        multiply_adds: of the model for one image.
        interrupt_advice: printed where the training will take long.
        context: what losses may ask of the teacher and of the training rows.
        after_epoch: called with each epoch's line once it is saved; may raise TrainingStopped.
        rng_state: what is random in the training, from here on.
    """

    name: str
    model: PreparedModel
    criterion: DistillationLoss
    stream: CacheLoader
    epochs: int
    steps: int
    config: TeacherConfig | StudentConfig
    device: torch.device
    folder: Path
    multiply_adds: int
    interrupt_advice: str = ""
    context: LossContext = LossContext()  # noqa: RUF009 (frozen)
    after_epoch: AfterEpoch | None = None
    rng_state: RngState = field(default_factory=RngState)

    @cached_property
    def schedule(self) -> LearningRateSchedule:
        """The learning rate of each step, as a share of the highest."""
        return LearningRateSchedule(self.config, self.epochs * self.steps)

    @property
    def weights_file(self) -> Path:
        """Where the weights are published once the training is over."""
        return self.folder / f"{self.name}.pt"

    def epoch_weights_file(self, epoch: int) -> Path:
        """Where the weights after an epoch, counted from 0, are published with --keep-every."""
        return self.folder / f"{self.name}-{epoch + 1:04d}.pt"
