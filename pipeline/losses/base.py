"""What the rows of the table of losses have in common, and the knobs that change during training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn

from softcache.pipeline.batch import Batch, LossContext, ModelOutputs


@dataclass(frozen=True)
class Ramp:
    """A numeric knob that runs from start to end, linear over the training, or over its first epochs.

    With epochs n, end is reached in epoch n (counted from 1) and start would be the value before the first:
    `0->1@20` is the warm-up min(epoch / 20, 1).
    """

    start: float
    end: float
    epochs: int = 0

    def value_at(self, epoch: int, epochs: int) -> float:
        """The value in an epoch, 0 … epochs - 1, of a training of so many."""
        progress = min((epoch + 1) / self.epochs, 1.0) if self.epochs else epoch / max(epochs - 1, 1)
        return self.start + (self.end - self.start) * progress


def to_float(knob: float | Ramp) -> float:
    """The value of a knob whose ramps have been resolved; a ramp left in is a mistake of ours."""
    if isinstance(knob, Ramp):
        raise TypeError(f"ramp {knob} was not resolved for this epoch")
    return knob


class Loss(Protocol):
    """A term of what a student minimises. weight multiplies it in the sum that goes backward.

    needs_labels: cannot do without hard targets. needs_logits: reads the teacher's. needs_counts: wants a
    labelled training row of every class. one_label: has no meaning for a mixup view, which has two. several: may be
    given more than once. by_row: a mean over rows, which can be weighed.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False
    needs_counts: ClassVar[bool] = False
    needs_single_label: ClassVar[bool] = False
    repeatable: ClassVar[bool] = False
    is_row_mean: ClassVar[bool] = False

    @property
    def weight(self) -> float | Ramp: ...

    def teacher_taps(self) -> tuple[str, ...]:
        """Cached features that the loss reads."""
        return ()

    def student_taps(self) -> tuple[str, ...]:
        """Layers of the student that the loss reads."""
        return ()

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        """The loss's own part, made from one example of each; None where it has none."""
        return None

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """The unweighted term, a scalar in the dtype of the student's outputs."""
        ...


def list_teacher_taps(losses: Sequence[Loss]) -> tuple[str, ...]:
    """The cached features that losses read, each once."""
    return tuple(dict.fromkeys(tap for loss in losses for tap in loss.teacher_taps()))


def list_student_taps(losses: Sequence[Loss]) -> tuple[str, ...]:
    """The layers of the student that losses read, each once."""
    return tuple(dict.fromkeys(tap for loss in losses for tap in loss.student_taps()))
