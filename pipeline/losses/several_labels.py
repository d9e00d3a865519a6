"""Losses on several labels an image: each logit is a question of its own, answered by a sigmoid."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.data.tasks import LABELS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs

from .base import Loss, Ramp, to_float
from .hard import masked_mean
from .kd import teacher_logits, weighted_mean


def mix_labels(batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return several labels, or numbers, as targets: those of both images of a mixed view, weighted by their shares.

    Args:
        batch: labels [B, K], -1 or NaN where unknown; partner and share of mixed views.
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
    known. The labels of a mixed view are weighted by their shares.

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
        return masked_mean(terms, known)


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


@dataclass(frozen=True)
class MLKD(Loss):
    """Multi-label logit distillation, Yang et al. 2023 (arXiv 2308.06453, section 3.2).

    loss = mean over the rows of the sum over the labels of KL(s(z_t) || s(z_s)), s the sigmoid: each label is a binary
    problem of its own. It is `kd_sigmoid` at temperature 1, with the sum over the labels in the place of the mean, so
    that its weight is K times as large.

    The authors' program limits probabilities to 1e-8 and 1 - 1e-8, where its gradient is 0; here logarithms of the
    sigmoid are exact, and no limit is needed. Its weight is 10, beside a cross entropy that is summed over rows and
    labels. The other half of the paper, distillation of label-wise embeddings, needs networks with an embedding for
    each label, and is not part of this loss.

    Args:
        weight: factor of the term in the sum of losses.

    Source: Yang et al. 2023, "Multi-Label Knowledge Distillation" (arXiv 2308.06453, section 3.2, MLD).
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "mlkd"
    tasks: ClassVar[tuple[str, ...]] = (LABELS,)
    is_row_mean: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_t = teacher_logits(student, batch, self.name)
        return weighted_mean(sigmoid_kl(student.logits, z_t, 1.0).sum(1), batch)


@dataclass(frozen=True)
class Asymmetric(Loss):
    """Asymmetric loss with several labels, Ridnik et al. 2021 (arXiv 2009.14119, equations 4 to 7).

    loss = mean over the known labels of -(y (1 - p)^gamma_pos log p + (1 - y) m^gamma_neg log(1 - m)), p = s(z),
    s the sigmoid, m = max(p - clip, 0); 0 when none is known. Negative labels that are easy count little, and those
    with p <= clip not at all. The labels of a mixed view are weighted by their shares. With gamma_neg, gamma_pos and
    clip at 0 it is `bce`.

    The factors (1 - p)^gamma_pos and m^gamma_neg have gradients, as in the paper's section 2.4 and in the authors'
    program, where the option to switch them off does nothing in its plain form and is off in its optimised form. The
    program sums over rows and labels where this is a mean, and limits the arguments of logarithms to 1e-8.

    Args:
        weight: factor of the term in the sum of losses.
        gamma_neg: exponent of negative labels, from 0 on.
        gamma_pos: exponent of positive labels, from 0 on.
        clip: margin by which the probability of a negative label is lowered, 0 <= clip < 1.

    Source: Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification" (arXiv 2009.14119, equations 4 to 7);
        the defaults are those of the authors' program.
    """

    weight: float | Ramp = 1.0
    gamma_neg: float | Ramp = 4.0
    gamma_pos: float | Ramp = 1.0
    clip: float | Ramp = 0.05
    name: ClassVar[str] = "asymmetric"
    tasks: ClassVar[tuple[str, ...]] = (LABELS,)
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z, clip = student.logits, to_float(self.clip)
        targets, known = mix_labels(batch, z.dtype)
        log_p, log_not_p = F.logsigmoid(z), F.logsigmoid(-z)
        positive = -(to_float(self.gamma_pos) * log_not_p).exp() * log_p
        negative = -(to_float(self.gamma_neg) * log_p).exp() * log_not_p
        if clip:
            is_above = log_p.exp() > clip  # below the logarithm of the margin would have no finite gradient
            m = torch.where(is_above, log_p.exp() - clip, 0.5)
            negative = torch.where(is_above, -(to_float(self.gamma_neg) * m.log()).exp() * torch.log1p(-m), 0.0)
        terms = targets * positive + (1 - targets) * negative
        return masked_mean(terms, known)
