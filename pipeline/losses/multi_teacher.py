"""Wrappers of a loss for several teachers and for rows whose targets are missing. They are called like a loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.teachers.combine import confidence_weights

from .base import Loss, require_logits
from .hard import cross_entropy_rows, mean_cross_entropy

Term = Callable[[ModelOutputs, Batch, nn.Module | None], torch.Tensor]


class TeacherParts(nn.ModuleList):
    """The trainable parts of a loss that has one for each of several teachers."""


@dataclass(frozen=True)
class PerTeacher:
    """The mean of a loss over the teachers.

    Args:
        loss: a loss that reads the teacher's logits.
    """

    loss: Loss

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """Return the mean of the terms, a scalar. batch.logits: [B, M, K] of M teachers."""
        assert batch.logits is not None
        logits = batch.logits.unbind(1)
        parts = part if isinstance(part, TeacherParts) else (part,) * len(logits)
        terms = [self.loss(student, replace(batch, logits=z), p) for z, p in zip(logits, parts, strict=True)]
        return torch.stack(terms).mean()


@dataclass(frozen=True)
class ConfidenceWeighted:
    """The sum of a loss over the teachers, each row weighted by the teacher's confidence in the label.

    Args:
        loss: a mean over rows that reads the teacher's logits and Batch.row_weights. The smaller the cross entropy of
            a teacher with the label, the larger its weight.

    Source: Zhang, Chen and Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation" (arXiv 2201.00007,
        equation 3); see `confidence_weights`.
    """

    loss: Loss

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """Return the weighted sum, a scalar. batch.logits: [B, M, K] of M teachers."""
        assert batch.logits is not None
        logits = batch.logits.unbind(1)
        cross_entropies = [cross_entropy_rows(z.float(), batch) for z in logits]
        weights = confidence_weights(torch.stack([rows for rows, _ in cross_entropies], 1), cross_entropies[0][1])
        terms = [
            self.loss(student, replace(batch, logits=z, row_weights=w), part)
            for z, w in zip(logits, weights.unbind(1), strict=True)
        ]
        return torch.stack(terms).sum()


@dataclass(frozen=True)
class HardFallback:
    """A term over the rows that have targets, and the cross entropy with the label over those that have none.

    Args:
        term: a loss, or a loss wrapped for several teachers. A row without targets has NaN in its logits.
    """

    term: Term

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """Return the mean over all rows, a scalar."""
        is_missing = require_logits(batch, "missing_to_labels").flatten(1).isnan().any(1)
        if not is_missing.any():
            return self.term(student, batch, part)
        missing, available = is_missing.nonzero()[:, 0], (~is_missing).nonzero()[:, 0]
        hard = mean_cross_entropy(student.logits[missing], batch.select(missing))
        if not len(available):
            return hard
        soft = self.term(student.select(available), batch.select(available), part)
        return (len(available) * soft + len(missing) * hard) / len(is_missing)


def wrap_loss(loss: Loss, combination: str = "", missing_to_labels: bool = False) -> Term:
    """Wrap a loss for the teachers it is trained from.

    Args:
        loss: the loss.
        combination: "per_teacher" or "ca_mkd" for batches with the logits of each teacher, "" for those of one.
        missing_to_labels: use the cross entropy with the label for rows without targets.

    Returns:
        A callable with the arguments of the loss; the loss itself where it needs no wrapper.
    """
    term: Term = loss
    if loss.needs_logits and combination:
        term = ConfidenceWeighted(loss) if combination == "ca_mkd" else PerTeacher(loss)
    if missing_to_labels and (loss.needs_logits or loss.teacher_taps()):
        term = HardFallback(term)
    return term
