"""Losses on several labels an image: each logit is a question of its own, answered by a sigmoid."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.data.tasks import LABELS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs

from .base import Loss, Ramp, to_float
from .kd import teacher_logits, weighted_mean


def mix_labels(batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return several labels, or numbers, as targets: those of both images of a mixup view, weighted by their shares.

    Args:
        batch: labels [B, K], -1 or NaN where unknown; partner and share of mixup views.
        dtype: of the targets.

    Returns:
        The targets [B, K], 0 where one is unknown; and bool [B, K], which are known.
    """

    def find_known(labels: torch.Tensor) -> torch.Tensor:
        return ~labels.isnan() if labels.is_floating_point() else labels >= 0

    known = find_known(batch.labels)
    targets = torch.where(known, batch.labels, 0).to(dtype)
    if batch.partner is not None and batch.share is not None:
        of_partner, share = find_known(batch.partner), batch.share.to(dtype)[:, None]
        targets = share * targets + (1 - share) * torch.where(of_partner, batch.partner, 0).to(dtype)
        known = known & of_partner
    return targets, known


class LabelWeights(nn.Module):
    """The weight of a positive label, float32 [K], a buffer.

    Args:
        positive: float32 [K].
    """

    def __init__(self, positive: torch.Tensor):
        super().__init__()
        self.positive: torch.Tensor
        self.register_buffer("positive", positive)


@dataclass(frozen=True)
class BCE(Loss):
    """Binary cross entropy with several labels, in nats.

    loss = mean over the known labels of -(w_k y log s(z) + (1 - y) log(1 - s(z))), s the sigmoid; 0 when none is
    known. The labels of a mixup view are weighted by their shares.

    Args:
        weight: factor of the term in the sum of losses.
        balance: power p of the weight of a positive label, w_k = (rows without label k / rows with it)^p, counted over
            the training rows in which it is known; 0 for 1, 1 for labels of equal weight.

    Source: `balance`: the usual positive weight, King and Zeng 2001, "Logistic Regression in Rare Events Data".
    """

    weight: float | Ramp = 1.0
    balance: float = 0.0
    name: ClassVar[str] = "bce"
    tasks: ClassVar[tuple[str, ...]] = (LABELS,)
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        if not self.balance or context.counts is None or context.known is None:
            return None
        positive = context.counts.float().clamp(min=1)
        return LabelWeights(((context.known.float() - positive).clamp(min=1) / positive) ** self.balance)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        targets, known = mix_labels(batch, student.logits.dtype)
        positive = part.positive.to(student.logits.dtype) if isinstance(part, LabelWeights) else None
        terms = F.binary_cross_entropy_with_logits(student.logits, targets, pos_weight=positive, reduction="none")
        return (terms * known).sum() / known.sum().clamp(min=1)


def sigmoid_kl(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute KL(s(z_t / T) || s(z_s / T)) of each logit, in nats, s the sigmoid.

    Args:
        z_s: logits of the student [B, K].
        z_t: logits of the teacher [B, K].
        temperature: T.

    Returns:
        The divergences [B, K].
    """
    log_p, log_q = F.logsigmoid(z_t / temperature), F.logsigmoid(z_s / temperature)
    log_not_p, log_not_q = F.logsigmoid(-z_t / temperature), F.logsigmoid(-z_s / temperature)
    return log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)


@dataclass(frozen=True)
class KDSigmoid(Loss):
    """Knowledge distillation of each label by itself.

    loss = T² times the mean over rows and labels of KL(s(z_t / T) || s(z_s / T)), s the sigmoid.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531, section
        2), for two classes, the label and its absence.
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 1.0
    name: ClassVar[str] = "kd_sigmoid"
    tasks: ClassVar[tuple[str, ...]] = (LABELS,)
    is_row_mean: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        T = to_float(self.temperature)
        rows = sigmoid_kl(student.logits, teacher_logits(student, batch, self.name), T).mean(1)
        return weighted_mean(rows, batch) * T**2
