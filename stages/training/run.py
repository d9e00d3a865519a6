"""The record of one training: model, criterion, batches and settings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from softcache.pipeline.batch import LossContext
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import StudentConfig, TeacherConfig

from .checkpoint import RngState
from .schedule import LearningRateSchedule

AfterEpoch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingRun:
    """The training of a teacher, a baseline or a student; these differ in stream and criterion alone.

    Attributes:
        name: teacher, baseline, student, or distilled (before fine-tuning).
        model: uint8 views -> logits; trained in place.
        criterion: the loss.
        stream: the batches.
        epochs: number of epochs.
        steps: steps of an epoch.
        config: the options of the command.
        device: where the model is.
        folder: where checkpoint, metrics and weights are saved.
        multiply_adds: of the model for one image.
        interrupt_advice: printed where the training will take long.
        context: the teacher's head, its memory bank and the class counts, for losses that need them.
        after_epoch: called with each epoch's record once it is saved; may raise TrainingStopped.
        rng_state: the random generators of the training.
    """

    name: str
    model: PreparedModel
    criterion: DistillationLoss
    stream: BatchStream
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
        """Where the weights of the finished training are published."""
        return self.folder / f"{self.name}.pt"

    def epoch_weights_file(self, epoch: int) -> Path:
        """Where the weights after an epoch, counted from 0, are published with --keep-every."""
        return self.folder / f"{self.name}-{epoch + 1:04d}.pt"
