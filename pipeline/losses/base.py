"""The interface of a loss, and parameters that change during training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn

from softcache.pipeline.batch import Batch, LossContext, ModelOutputs


@dataclass(frozen=True)
class Ramp:
    """A numeric parameter that changes linearly from start to end, over the training or over its first epochs.

    Args:
        start: value in the first epoch; with `epochs`, the value before the first epoch.
        end: value in the last epoch; with `epochs`, from epoch number `epochs` on, counted from 1. So `0->1@20` is
            the warm-up min(epoch / 20, 1).
        epochs: length of the ramp in epochs; 0 for the whole training.
    """

    start: float
    end: float
    epochs: int = 0

    def value_at(self, epoch: int, epochs: int) -> float:
        """Return the value in an epoch.

        Args:
            epoch: 0 to epochs - 1.
            epochs: the epochs of the training.
        """
        progress = min((epoch + 1) / self.epochs, 1.0) if self.epochs else epoch / max(epochs - 1, 1)
        return self.start + (self.end - self.start) * progress


def to_float(parameter: float | Ramp) -> float:
    """Return the value of a parameter after `resolve_ramps`.

    Raises:
        TypeError: for a ramp, which is a programming error.
    """
    if isinstance(parameter, Ramp):
        raise TypeError(f"ramp {parameter} was not resolved for this epoch")
    return parameter


class Loss(Protocol):
    """A term of the function that a student minimises.

    Attributes:
        name: name of the loss in --loss.
        weight: factor of the term in the sum of losses.
        needs_labels: whether it needs hard targets.
        needs_logits: whether it reads the teacher's logits.
        needs_head: whether it needs the teacher's last linear layer.
        needs_counts: whether it needs a labelled training row of every class.
        needs_single_label: whether it is undefined for a mixup view, which has two labels.
        repeatable: whether --loss may name it more than once.
        is_row_mean: whether it is a mean over rows, each of which can be weighted by Batch.row_weights.
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
        """Return the names of the cached features that the loss reads."""
        return ()

    def student_taps(self) -> tuple[str, ...]:
        """Return the names of the student's layers that the loss reads."""
        return ()

    def is_zero(self, classes: int) -> bool:
        """Return whether the term is the same in every batch, so that nothing is learned from it.

        Args:
            classes: K, the number of classes.

        Raises:
            UsageError: for a parameter that does not work with so few classes.
        """
        return False

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        """Build the module that belongs to the loss, such as a regressor.

        Args:
            student: the student's outputs for the batch.
            batch: an example, with the shapes of the batches in training.
            context: the teacher's head, its memory bank and the class counts.

        Returns:
            The module, whose parameters are trained with the student's; None for a loss without one.

        Raises:
            UsageError: for layers that do not fit together, or a context that lacks what the loss needs.
        """
        return None

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """Compute the unweighted term.

        Args:
            student: the student's outputs, logits [B, K].
            batch: labels, cached targets and features of the same B rows.
            part: what `build_part` returned.

        Returns:
            A scalar in the dtype of the student's outputs.
        """
        ...


def list_teacher_taps(losses: Sequence[Loss]) -> tuple[str, ...]:
    """List the cached features that losses read, each once."""
    return tuple(dict.fromkeys(tap for loss in losses for tap in loss.teacher_taps()))


def list_student_taps(losses: Sequence[Loss]) -> tuple[str, ...]:
    """List the student's layers that losses read, each once."""
    return tuple(dict.fromkeys(tap for loss in losses for tap in loss.student_taps()))
