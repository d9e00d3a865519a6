"""Losses on hard targets: cross entropy with the labels, and a virtual teacher made from them."""

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
    """Compute the cross entropy of each row with its label, or with its two labels weighted by their shares.

    Args:
        logits: float [B, K].
        batch: labels int64 [B], -1 where hidden; partner and share of mixed views.
        smoothing: label smoothing, 0 to 1.

    Returns:
        The cross entropies [B] in nats; and bool [B], which rows have labels.
    """

    def cross_entropy(labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing, reduction="none")

    is_labelled, rows = batch.labels >= 0, cross_entropy(batch.labels)
    if batch.partner is not None and batch.share is not None:
        is_labelled = is_labelled & (batch.partner >= 0)
        share = batch.share.to(rows.dtype)
        rows = share * rows + (1 - share) * cross_entropy(batch.partner)
    return rows, is_labelled


def masked_mean(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute the mean of the terms [B] or [B, K] for which the mask, bool, is true; 0 when it is true for none."""
    return (rows * mask).sum() / mask.sum().clamp(min=1)


def mean_cross_entropy(logits: torch.Tensor, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    """Compute the mean of `cross_entropy_rows` over the labelled rows, a scalar; 0 when no row has a label."""
    if batch.partner is None:  # one operation less than with rows, of those of a small student
        total = F.cross_entropy(logits, batch.labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
        return total / (batch.labels >= 0).sum().clamp(min=1)
    return masked_mean(*cross_entropy_rows(logits, batch, smoothing))


@dataclass(frozen=True)
class Hard(Loss):
    """Cross entropy with the labels, in nats.

    loss = mean over the labelled rows of -sum_c q_c log softmax(z)_c, q one-hot, or with smoothing s
    (1 - s) one-hot + s / K. The two labels of a mixed view are weighted by their shares. Rows without a label are left
    out; 0 when no row has a label.

    Args:
        weight: factor of the term in the sum of losses.
        smoothing: label smoothing s, 0 to 1.

    Source: label smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
        section 7; mixup: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization".
    """

    weight: float | Ramp = 1.0
    smoothing: float | Ramp = 0.0
    name: ClassVar[str] = "hard"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        return mean_cross_entropy(student.logits, batch, to_float(self.smoothing))


@dataclass(frozen=True)
class TfKD(Loss):
    """A virtual teacher, right with probability `correct`: teacher-free KD, Yuan et al. 2020 (arXiv 1909.11723, 4.2).

    loss = T² KL(softmax(log p / T) || softmax(z_s / T)), p = `correct` on the label and the rest spread evenly over
    the other classes; mean over the labelled rows. A baseline: it shows what is gained without any teacher.

    The authors' program differs: it softens p instead of log p, which at T = 20 is nearly uniform, does not soften the
    student and has no T². Weights of that program are not comparable.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.
        correct: probability of the label, 0 to 1.

    Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization" (arXiv 1909.11723,
        section 4.2).
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 20.0
    correct: float | Ramp = 0.99
    name: ClassVar[str] = "tf_kd"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    needs_single_label: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z, is_labelled, t = student.logits, batch.labels >= 0, to_float(self.temperature)
        classes, correct = z.shape[1], to_float(self.correct)
        p = torch.full_like(z, (1 - correct) / (classes - 1))
        p.scatter_(1, batch.labels.clamp(min=0)[:, None], correct)
        log_p = F.log_softmax(p.clamp(min=1e-12).log() / t, dim=1)
        log_q = F.log_softmax(z / t, dim=1)
        return masked_mean((log_p.exp() * (log_p - log_q)).sum(1) * t**2, is_labelled)
