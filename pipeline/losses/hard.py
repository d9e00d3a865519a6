"""Hard targets: the labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.batch import Batch, ModelOutputs

from .base import Loss, Ramp, to_float


def cross_entropy_rows(
    logits: torch.Tensor, batch: Batch, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy [B] of each row with its label, or its two labels by their shares; and which rows have one [B]."""

    def rows(labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing, reduction="none")

    known, terms = batch.labels >= 0, rows(batch.labels)
    if batch.partner is not None and batch.share is not None:
        known = known & (batch.partner >= 0)
        share = batch.share.to(terms.dtype)
        terms = share * terms + (1 - share) * rows(batch.partner)
    return terms, known


def masked_mean(terms: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Mean of the terms [B] of known rows; 0 when there are none."""
    return (terms * known).sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class Hard(Loss):
    """Cross entropy with the labels, in nats.

    loss = mean over the labelled rows of -sum_c q_c log softmax(z)_c, q one-hot, or with smoothing s
    (Szegedy et al. 2016, section 7) (1 - s) one-hot + s / K. A mixup view has two labels, weighed by their
    shares (Zhang et al. 2018). Rows without a label count for nothing; 0 when no row has one.
    """

    weight: float | Ramp = 1.0
    smoothing: float | Ramp = 0.0
    name: ClassVar[str] = "hard"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        return masked_mean(*cross_entropy_rows(student.logits, batch, to_float(self.smoothing)))


@dataclass(frozen=True)
class TfKD(Loss):
    """A virtual teacher, right with probability `correct`: teacher-free KD, Yuan et al. 2020 (arXiv 1909.11723, 4.2).

    loss = T² KL(softmax(log p / T) || softmax(z_s / T)), p = `correct` on the label and the rest spread evenly;
    mean over the labelled rows. A baseline: it shows what is gained without any teacher. (The authors' program
    softens p itself, not log p, which at T = 20 is all but uniform, leaves the student unsoftened and has no T²; its
    weights do not carry over.)
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 20.0
    correct: float | Ramp = 0.99
    name: ClassVar[str] = "tf_kd"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    needs_single_label: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z, known, t = student.logits, batch.labels >= 0, to_float(self.temperature)
        classes, correct = z.shape[1], to_float(self.correct)
        p = torch.full_like(z, (1 - correct) / (classes - 1))
        p.scatter_(1, batch.labels.clamp(min=0)[:, None], correct)
        log_p = F.log_softmax(p.clamp(min=1e-12).log() / t, dim=1)
        log_q = F.log_softmax(z / t, dim=1)
        return masked_mean((log_p.exp() * (log_p - log_q)).sum(1) * t**2, known)
