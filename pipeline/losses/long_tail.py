"""Losses for imbalanced data: with the number of training rows of each class, and F1 as a loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES, LABELS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs

from .base import Loss, Ramp, to_float
from .hard import mean_cross_entropy
from .kd import kd_mean, teacher_logits
from .several_labels import mix_labels


def require_counts(loss: Loss, counts: torch.Tensor | None, classes: Sequence[str] = ()) -> torch.Tensor:
    """Return the class counts if every class has a row.

    With a count of 0, log-counts would be -inf and weights 1 / count infinite.

    Args:
        loss: the loss that needs them.
        counts: labelled training rows of each class, int64 [K]; None where unknown.
        classes: names of the classes, for the message.

    Raises:
        UsageError: for images without labels, or a class without a labelled row.
    """
    if counts is None or not counts.any():
        raise UsageError(
            f"loss '{loss.name}' needs the number of labels of each class, and these images have none: leave it out"
        )
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        name = f"'{classes[empty[0]]}'" if classes else str(empty[0])
        number = f" ({len(empty)} of {len(counts)} classes have none)" if len(empty) > 1 else ""
        raise UsageError(
            f"loss '{loss.name}': class {name} has no labelled training row{number}:"
            " leave the loss out, or keep labels of every class"
        )
    return counts


class ClassCounts(nn.Module):
    """The labelled training rows of each class as a buffer, which moves to the student's device.

    Args:
        counts: int64 [K].
    """

    def __init__(self, counts: torch.Tensor):
        super().__init__()
        self.counts: torch.Tensor
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the counts in the dtype of the logits z, float32 at least: the largest float16 is 65,504."""
        return self.counts.to(torch.promote_types(z.dtype, torch.float32))


class ClassCountLoss(Loss):
    """A loss whose part holds the class counts."""

    needs_counts: ClassVar[bool] = True

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        return ClassCounts(require_counts(self, context.counts))


@dataclass(frozen=True)
class LogitAdjusted(ClassCountLoss):
    """Logit-adjusted cross entropy, Menon et al. 2021 (arXiv 2007.07314, equation 10).

    loss = mean over the labelled rows of -log softmax(z + tau log pi)_y, pi the shares of the classes among the
    labelled training rows. The student predicts with z alone, which is then calibrated for balanced classes. The two
    labels of a mixed view are weighted by their shares. 0 when no row has a label.

    Args:
        weight: factor of the term in the sum of losses.
        tau: strength of the adjustment, from 0 on; with 0 the loss is `hard`.

    Source: Menon et al. 2021, "Long-tail learning via logit adjustment" (arXiv 2007.07314, equation 10).
    """

    weight: float | Ramp = 1.0
    tau: float | Ramp = 1.0
    name: ClassVar[str] = "logit_adjusted"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        counts = part(student.logits)
        log_share = counts.log() - counts.sum().log()
        return mean_cross_entropy(student.logits + to_float(self.tau) * log_share, batch)


@dataclass(frozen=True)
class BalancedSoftmax(ClassCountLoss):
    """Balanced softmax, Ren et al. 2020 (arXiv 2007.10740, equations 3 and 4).

    loss = mean over the labelled rows of -log (n_y exp(z_y) / sum_c n_c exp(z_c)), n_c the labelled training rows of
    class c: `logit_adjusted` at tau = 1. The student predicts with z alone. 0 when no row has a label.

    Args:
        weight: factor of the term in the sum of losses.

    Source: Ren et al. 2020, "Balanced Meta-Softmax for Long-Tailed Visual Recognition" (arXiv 2007.10740, equations 3
        and 4).
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "balanced_softmax"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        return mean_cross_entropy(student.logits + part(student.logits).log(), batch)


@dataclass(frozen=True)
class BalancedKD(ClassCountLoss):
    """Balanced knowledge distillation, Zhang et al. 2021 (arXiv 2104.10510).

    loss = T² KL(N(w softmax(z_t / T)) || softmax(z_s / T)), mean over the rows, N making each row sum to 1, w_c =
    (1 - beta) / (1 - beta^n_c), n_c the labelled training rows of class c; labels of the batch are not read. Use it
    together with `hard`. On CIFAR-10 the authors' program has beta = 0 for the first 160 of 200 epochs.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.
        beta: 0 <= beta < 1; with 0 the loss is `kd`.

    Source: Zhang et al. 2021, "Balanced Knowledge Distillation for Long-tailed Learning" (arXiv 2104.10510); the
        weights w: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples" (arXiv 1901.05555).
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 2.0
    beta: float | Ramp = 0.9999
    name: ClassVar[str] = "balanced_kd"

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        z_t, t, beta = teacher_logits(student, batch, self.name), to_float(self.temperature), to_float(self.beta)
        # N(w softmax(z / T)) = softmax(z / T + log w). The factor 1 - beta of w cancels in N. expm1, because
        # 1 - beta^n would round to 0.
        log_beta = math.log(beta) if beta else -math.inf
        log_w = -(-torch.expm1(part(z_t) * log_beta)).log()
        return kd_mean(student.logits, z_t + t * log_w, t)


@dataclass(frozen=True)
class DiVE(Loss):
    """Distilling virtual examples, He, Wu and Wei 2021 (arXiv 2103.15042).

    loss = T² KL(N(softmax(z_t / T)^power) || softmax(z_s / T)), mean over the rows, N making each row sum to 1. Use it
    together with `balanced_softmax:weight=0.5`.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.
        power: from 0.001 on. Below 1 the teacher's distribution is flatter and gives more probability to rare classes;
            with 1 the loss is `kd`.

    Source: He, Wu and Wei 2021, "Distilling Virtual Examples for Long-tailed Recognition" (arXiv 2103.15042).
    """

    weight: float | Ramp = 0.5
    temperature: float | Ramp = 2.0
    power: float | Ramp = 0.5
    name: ClassVar[str] = "dive"

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        # N(softmax(z / T)^power) = softmax(power z / T)
        z_t = to_float(self.power) * teacher_logits(student, batch, self.name)
        return kd_mean(student.logits, z_t, to_float(self.temperature))


@dataclass(frozen=True)
class SoftF1(Loss):
    """1 - F1 of the batch, with probabilities in the place of predictions.

    F1_c = 2 sum_i p_ic y_ic / (sum_i p_ic + n_c + 1e-8), p = softmax(z), y one-hot or the two shares of a mixed view,
    n_c = sum_i y_ic. For one-hot p it equals 1 - F1 as reported. It is between 0 and 1, and 0 when no row has a label.
    It is computed and returned in float32 at least.

    F1 is not a mean over rows: in small batches with many classes it is biased. Use batches of about 5 K rows or more.
    With K = 100 classes and a true macro F1 of 0.145, batches of 64 gave 0.176 and batches of 512 gave 0.138.

    With several labels an image, p = sigmoid(z), the sums are over the rows in which label c is known, and micro is
    1 - 2 sum_ic p_ic y_ic / (sum_ic p_ic + sum_c n_c + 1e-8); 0 when the batch has no positive label.

    Args:
        weight: factor of the term in the sum of losses.
        average: macro, the mean over the classes that occur among the batch's labels; weighted, their mean weighted by
            n_c; micro, one F1 over all classes, so that the loss is 1 - the mean of p_y.
    """

    weight: float | Ramp = 1.0
    average: str = "macro"
    name: ClassVar[str] = "soft_f1"
    tasks: ClassVar[tuple[str, ...]] = (CLASSES, LABELS)
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average not in ("macro", "weighted", "micro"):
            raise UsageError(f"loss 'soft_f1': average={self.average} is none of macro, weighted, micro")

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z = student.logits
        dtype = torch.promote_types(z.dtype, torch.float32)
        if batch.labels.ndim == 2:
            p = z.to(dtype).sigmoid()
            targets, known = mix_labels(batch, dtype)
            y = targets * known
            true_positives, predicted, n = (p * y).sum(0), (p * known).sum(0), y.sum(0)
            if self.average == "micro":
                f1 = 2 * true_positives.sum() / (predicted.sum() + n.sum() + 1e-8)
                return (1 - f1) * (n.sum() > 0)
        else:
            p = F.softmax(z, dim=1, dtype=dtype)
            y, is_labelled = label_shares(batch, p)
            true_positives, predicted, n = (p * y).sum(0), (p * is_labelled[:, None]).sum(0), y.sum(0)
            if self.average == "micro":
                return (n - true_positives).sum() / is_labelled.sum().clamp(min=1)
        f1 = 2 * true_positives / (predicted + n + 1e-8)
        share = n if self.average == "weighted" else (n > 0).to(n.dtype)
        return (share * (1 - f1)).sum() / share.sum().clamp(min=1)


def label_shares(batch: Batch, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the label distribution of each row.

    Args:
        batch: labels int64 [B], -1 where hidden; partner and share of mixed views.
        p: a tensor [B, K] whose shape, dtype and device the result has.

    Returns:
        y [B, K]: one-hot, or the two shares of a mixed view, 0 for rows without labels; and bool [B], which rows have
        labels.
    """

    def one_hot(labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(p).scatter_(1, labels.clamp(min=0)[:, None], 1.0)

    is_labelled, y = batch.labels >= 0, one_hot(batch.labels)
    if batch.partner is not None and batch.share is not None:
        is_labelled = is_labelled & (batch.partner >= 0)
        share = batch.share.to(p.dtype)[:, None]
        y = share * y + (1 - share) * one_hot(batch.partner)
    return y * is_labelled[:, None], is_labelled
