"""Imbalanced data: losses that know how many training rows each class has, and F1 itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs

from .base import Loss, Ramp, to_float
from .hard import cross_entropy_rows, masked_mean
from .kd import kd_mean, teacher_logits


def require_counts(loss: Loss, counts: torch.Tensor | None, classes: Sequence[str] = ()) -> torch.Tensor:
    """The counts [K], none of them 0. classes: their names, where known. Raises UsageError.

    The logarithm of 0 would say that the class is impossible, and a weight of 1 / 0 that nothing else is.
    """
    if counts is None or not counts.any():
        raise UsageError(
            f"loss '{loss.name}' counts the labels of each class, and these images have none: leave it out"
        )
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        which = f"'{classes[empty[0]]}'" if classes else str(empty[0])
        more = f" ({len(empty)} of {len(counts)} classes have none)" if len(empty) > 1 else ""
        raise UsageError(
            f"loss '{loss.name}': class {which} has no labelled training row{more}:"
            " leave the loss out, or keep labels of every class"
        )
    return counts


class ClassCounts(nn.Module):
    """Training rows of each class, int64 [K], where the student is."""

    def __init__(self, counts: torch.Tensor):
        super().__init__()
        self.counts: torch.Tensor
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """The counts in the dtype of the logits z, float32 at least: half precision ends at 65,504 rows."""
        return self.counts.to(torch.promote_types(z.dtype, torch.float32))


class ClassCountLoss(Loss):
    """A loss whose own part is the counts of the classes."""

    needs_counts: ClassVar[bool] = True

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        return ClassCounts(require_counts(self, context.counts))


@dataclass(frozen=True)
class LogitAdjusted(ClassCountLoss):
    """Logit-adjusted cross entropy, Menon et al. 2021 (arXiv 2007.07314, equation 10).

    loss = mean over the labelled rows of -log softmax(z + tau log pi)_y, pi the shares of the classes among the
    labelled training rows. The student answers with z alone, which then is for balanced classes. tau from 0 on, where
    it is `hard`. Both labels of a mixup view count by their shares. 0 when no row has a label.
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
        return masked_mean(*cross_entropy_rows(student.logits + to_float(self.tau) * log_share, batch))


@dataclass(frozen=True)
class BalancedSoftmax(ClassCountLoss):
    """Balanced softmax, Ren et al. 2020 (arXiv 2007.10740, equations 3 and 4).

    loss = mean over the labelled rows of -log (n_y exp(z_y) / sum_c n_c exp(z_c)), n_c the labelled training rows of
    class c: `logit_adjusted` at tau = 1. The student answers with z alone. 0 when no row has a label.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "balanced_softmax"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        return masked_mean(*cross_entropy_rows(student.logits + part(student.logits).log(), batch))


@dataclass(frozen=True)
class BalancedKD(ClassCountLoss):
    """Balanced knowledge distillation, Zhang et al. 2021 (arXiv 2104.10510).

    loss = T² KL(N(w softmax(z_t / T)) || softmax(z_s / T)), mean over the rows, N making each row sum to 1, w_c =
    (1 - beta) / (1 - beta^n_c) (Cui et al. 2019, arXiv 1901.05555), n_c the labelled training rows of class c; labels
    of the batch are not read. 0 <= beta < 1; 0 is `kd`. It goes beside `hard`. (On CIFAR-10 the authors' program has
    beta = 0 for the first 160 of 200 epochs.)
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 2.0
    beta: float | Ramp = 0.9999
    name: ClassVar[str] = "balanced_kd"

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        z_t, t, beta = teacher_logits(student, batch), to_float(self.temperature), to_float(self.beta)
        # N(w softmax(z / T)) = softmax(z / T + log w). N takes 1 - beta out of w; 1 - beta^n would round to 0.
        log_beta = math.log(beta) if beta else -math.inf
        log_w = -(-torch.expm1(part(z_t) * log_beta)).log()
        return kd_mean(student.logits, z_t + t * log_w, t)


@dataclass(frozen=True)
class DiVE(Loss):
    """Distilling virtual examples, He, Wu and Wei 2021 (arXiv 2103.15042).

    loss = T² KL(N(softmax(z_t / T)^power) || softmax(z_s / T)), mean over the rows, N making each row sum to 1: with
    power < 1 a flatter teacher, which has more to say of rare classes; 1 is `kd`. power from 0.001 on. It goes beside
    `balanced_softmax:weight=0.5`.
    """

    weight: float | Ramp = 0.5
    temperature: float | Ramp = 2.0
    power: float | Ramp = 0.5
    name: ClassVar[str] = "dive"

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        # N(softmax(z / T)^power) = softmax(power z / T)
        z_t = to_float(self.power) * teacher_logits(student, batch)
        return kd_mean(student.logits, z_t, to_float(self.temperature))


@dataclass(frozen=True)
class SoftF1(Loss):
    """1 - F1 of the batch, with probabilities in the place of predictions.

    F1_c = 2 sum_i p_ic y_ic / (sum_i p_ic + n_c + 1e-8), p = softmax(z), y one-hot or the two shares of a mixup view,
    n_c = sum_i y_ic. average=macro: mean over the classes that occur among the batch's labels; weighted: by n_c;
    micro: of all classes together, which is 1 - the mean of p_y. On certain predictions it is 1 - F1 as it is
    reported; 0 … 1, 0 when no row has a label. Computed, and returned, in float32 at least.

    F1 is not a mean over rows: that of a small batch is biased where classes are many. Use batches of about 5 K rows
    or more. (With K = 100 classes and a true macro F1 of 0.145, batches of 64 gave 0.176 and of 512 0.138.)
    """

    weight: float | Ramp = 1.0
    average: str = "macro"
    name: ClassVar[str] = "soft_f1"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.average not in ("macro", "weighted", "micro"):
            raise UsageError(f"loss 'soft_f1': average={self.average} is none of macro, weighted, micro")

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z = student.logits
        p = F.softmax(z, dim=1, dtype=torch.promote_types(z.dtype, torch.float32))
        y, known = label_shares(batch, p)
        right, said, n, rows = (p * y).sum(0), (p * known[:, None]).sum(0), y.sum(0), known.sum().clamp(min=1)
        if self.average == "micro":
            return (n - right).sum() / rows
        f1 = 2 * right / (said + n + 1e-8)
        share = n if self.average == "weighted" else (n > 0).to(n.dtype)
        return (share * (1 - f1)).sum() / share.sum().clamp(min=1)


def label_shares(batch: Batch, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row [B, K] has of each class by its labels, 0 for rows without; and which rows have one [B]."""

    def one_hot(labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(p).scatter_(1, labels.clamp(min=0)[:, None], 1.0)

    known, y = batch.labels >= 0, one_hot(batch.labels)
    if batch.partner is not None and batch.share is not None:
        known = known & (batch.partner >= 0)
        share = batch.share.to(p.dtype)[:, None]
        y = share * y + (1 - share) * one_hot(batch.partner)
    return y * known[:, None], known
