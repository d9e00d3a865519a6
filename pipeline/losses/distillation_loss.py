"""The training criterion of a student: a weighted sum of losses."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.taps.statistics import derive_features

from . import check_loss_trains, resolve_ramps
from .base import Loss, list_student_taps, list_teacher_taps, to_float
from .multi_teacher import wrap_loss


class DistillationLoss(nn.Module):
    """A weighted sum of losses: sum over i of weight_i * loss_i(student, batch).

    Its parameters are those of the losses' own trainable parts, such as the regressor of a hint; `build_parts` makes
    them from the shapes of one batch. What does not change in a training (names, taps, wrappers) is computed once;
    parameters that are ramps are set for each epoch by `set_progress`.

    Args:
        losses: the losses, each with its weight.
        combination: "per_teacher" or "ca_mkd" where a batch has the logits of each of several teachers, else "".
        missing_to_labels: use the cross entropy with the label for rows whose targets are missing.

    Attributes:
        names: a name for each term: `kd`, or `hint-0`, `hint-1` where there are several of a kind.
        teacher_taps: the teacher's features that the losses read.
        student_taps: the student's layers that the losses read.
        needs_head: whether a loss reads the last linear layer of the student.
        terms: the losses as they are called in this epoch.
        weights: their weights in this epoch.
    """

    def __init__(self, losses: Sequence[Loss], combination: str = "", missing_to_labels: bool = False):
        super().__init__()
        self.losses = tuple(losses)
        self.names = term_names(losses)
        self.teacher_taps = list_teacher_taps(losses)
        self.student_taps = list_student_taps(losses)
        self.needs_head = any(loss.needs_head for loss in losses)
        self.parts = nn.ModuleDict()
        self._wrapped = {"combination": combination, "missing_to_labels": missing_to_labels}
        self.set_progress(0, 1)

    def set_progress(self, epoch: int, epochs: int) -> None:
        """Set every ramp to its value in an epoch.

        Args:
            epoch: 0 to epochs - 1.
            epochs: the epochs of the training.
        """
        current = [resolve_ramps(loss, epoch, epochs) for loss in self.losses]
        self.terms = [wrap_loss(loss, **self._wrapped) for loss in current]  # type: ignore[arg-type]
        self.weights = [to_float(loss.weight) for loss in current]

    def build_parts(self, student: ModelOutputs, batch: Batch, context: LossContext) -> None:
        """Build the losses' own trainable parts from an example.

        Args:
            student: the student's outputs for the batch.
            batch: a batch with the shapes of those in training, of two rows or more.
            context: the teacher's head, its memory bank and the class counts.

        Raises:
            UsageError: for layers that do not fit together, or losses from which nothing is learned.
        """
        check_loss_trains(self.losses, classes=student.logits.shape[-1], epochs=2)  # two: both ends of each ramp
        batch = self.with_teacher_taps(batch)
        for name, loss in zip(self.names, self.losses, strict=True):
            if (part := loss.build_part(student, batch, context)) is not None:
                self.parts[name] = part.to(batch.views.device)

    def with_teacher_taps(self, batch: Batch) -> Batch:
        """Return the batch with the teacher's features that the losses read, float32, derived from the cached ones."""
        if not self.teacher_taps:
            return batch
        return replace(batch, features=derive_features(batch.features, self.teacher_taps))

    def weighted_terms(self, student: ModelOutputs, batch: Batch) -> list[torch.Tensor]:
        """Compute each weighted term, a scalar.

        Args:
            student: logits [B, K], and the features of student_taps.
            batch: targets as cached; its features may be those that statistics are computed from, see
                `derive_features`.
        """
        batch = self.with_teacher_taps(batch)
        terms = []
        for name, weight, term in zip(self.names, self.weights, self.terms, strict=True):
            value = term(student, batch, self.parts[name] if name in self.parts else None)  # noqa: SIM401 (no `get`)
            terms.append(value if weight == 1 else weight * value)  # a product costs time forward and backward
        return terms

    def forward(self, student: ModelOutputs, batch: Batch) -> torch.Tensor:
        """Compute the loss, a scalar; arguments as in `weighted_terms`."""
        return sum_terms(self.weighted_terms(student, batch))


def sum_terms(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add the terms of a loss. A single term is returned as it is: a stack and a sum would cost time in each step."""
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum()


def term_names(losses: Sequence[Loss]) -> list[str]:
    """Name each term: `kd`, and `hint-0`, `hint-1` where there are several of a kind."""
    kinds = [loss.name for loss in losses]
    return [kind if kinds.count(kind) == 1 else f"{kind}-{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]
