"""Losses on soft targets: all logits of the teacher at once."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES, LABELS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.cache.codecs import SAMPLE, TOP

from .base import Loss, Ramp, require_logits, to_float
from .hard import cross_entropy_rows, masked_mean


def teacher_logits(student: ModelOutputs, batch: Batch, name: str) -> torch.Tensor:
    """Return the cached logits [B, K] in the dtype of the student's.

    Args:
        student: the student's outputs.
        batch: the batch.
        name: name of the loss that reads them, for messages.

    Raises:
        UsageError: the batch has no logits.
    """
    return require_logits(batch, f"loss '{name}'").to(student.logits.dtype)


def kd_rows(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Compute T² KL(softmax(z_t / T) || softmax(z_s / T)) of each row, in nats.

    Both sides use log-softmax: neither a probability of zero nor a logit of -1000 gives a NaN.

    Args:
        z_s: logits of the student [B, K].
        z_t: logits of the teacher [B, K].
        temperature: T.

    Returns:
        The divergences [B].
    """
    return _kl_by_class(z_s, z_t, temperature).sum(1) * temperature**2


def kd_mean(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Compute the mean of `kd_rows`; for a constant temperature by one sum over rows and classes, which is faster."""
    if isinstance(temperature, torch.Tensor):
        return kd_rows(z_s, z_t, temperature).mean()
    return _kl_by_class(z_s, z_t, temperature).sum() * (temperature**2 / len(z_s))


def _kl_by_class(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Compute the terms of the KL divergence [B, K].

    F.kl_div is not used: it has no rule for vectorised students (torch.func) and is slower, 105 us instead of 95 for
    forward and backward of 128 rows of 10 classes.
    """
    log_p, log_q = torch.log_softmax(z_t / temperature, 1), torch.log_softmax(z_s / temperature, 1)
    return log_p.exp() * (log_p - log_q)


def weighted_kd_mean(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float, batch: Batch) -> torch.Tensor:
    """Compute the mean of `kd_rows`, weighted by batch.row_weights where it is set."""
    if batch.row_weights is None:
        return kd_mean(z_s, z_t, temperature)
    return weighted_mean(kd_rows(z_s, z_t, temperature), batch)


def weighted_mean(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Compute the mean of rows [B], weighted by batch.row_weights where it is set."""
    return (rows if batch.row_weights is None else rows * batch.row_weights.to(rows.dtype)).mean()


def standardize_logits(z: torch.Tensor) -> torch.Tensor:
    """Standardise each row of logits [B, K]: (z - mean) / (standard deviation + 1e-7).

    With two classes each row becomes ±0.71, whatever the logits are: see `check_standardizable`.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427, algorithm 1).
    """
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def check_standardizable(classes: int) -> None:
    """Raise UsageError for so few classes that standardised logits have no gradient."""
    if classes < 3:
        raise UsageError(
            f"standardize=true needs three classes or more, not {classes}: standardised, two logits are ±0.71 in every"
            " row, so the loss has no gradient; leave it out"
        )


@dataclass(frozen=True)
class KD(Loss):
    """Knowledge distillation, Hinton, Vinyals and Dean 2015 (arXiv 1503.02531, section 2).

    loss = T² KL(softmax(z_t / T) || softmax(z_s / T)): teacher first, sum over the classes, mean over the
    rows. With T² in the loss, the gradient keeps its size when T changes.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.
        standardize: standardise the logits of each row first, usually with T = 2 and a weight of 9; for three classes
            or more.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531, section
        2); `standardize`: Sun et al. 2024, "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427).
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 4.0
    standardize: bool = False
    name: ClassVar[str] = "kd"
    is_row_mean: ClassVar[bool] = True
    sparse_codecs: ClassVar[tuple[str, ...]] = (TOP, SAMPLE)

    def refuse_codec(self, kind: str) -> str:
        if self.standardize:
            return "with standardize=true needs the teacher's logits of all classes"
        if kind == SAMPLE and self.temperature != 1:
            return "reads a sample of the teacher's distribution at temperature 1 with temperature=1 alone"
        return ""

    def is_zero(self, classes: int) -> bool:
        if self.standardize:
            check_standardizable(classes)
        return False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t = student.logits, teacher_logits(student, batch, self.name)
        if self.standardize:
            z_s, z_t = standardize_logits(z_s), standardize_logits(z_t)
        return weighted_kd_mean(z_s, z_t, to_float(self.temperature), batch)


@dataclass(frozen=True)
class LogitMSE(Loss):
    """Logit regression, Ba and Caruana 2014 (arXiv 1312.6184, section 2.3); Kim et al. 2021 (arXiv 2105.08919).

    loss = mean over rows and classes of (z_s - z_t)². It needs a smaller learning rate than `kd`: at 0.05 it
    diverged on logits with a standard deviation of 6.

    Args:
        weight: factor of the term in the sum of losses.

    Source: Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?" (arXiv 1312.6184, section 2.3); Kim et al.
        2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation" (arXiv
        2105.08919).
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "logit_mse"
    tasks: ClassVar[tuple[str, ...]] = (CLASSES, LABELS)
    is_row_mean: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        return weighted_mean((student.logits - teacher_logits(student, batch, self.name)).square().mean(1), batch)


@dataclass(frozen=True)
class Output(Loss):
    """The output half of the teacher-student cost function lambda1 cost(outputs) + lambda2 cost(hidden layers).

    With soft_ce, loss = -T² sum_c softmax(z_t / T)_c log softmax(z_s / T)_c, mean over the rows, which has the
    gradient of kl.

    Args:
        weight: lambda1. The weight of a `hint` beside this loss is lambda2 and also 0.5 by default.
        kind: kl, as `kd`; mse, as `logit_mse`; or soft_ce.
        temperature: T, from 0.001 on; not used by mse.
    """

    weight: float | Ramp = 0.5
    kind: str = "kl"
    temperature: float | Ramp = 4.0
    name: ClassVar[str] = "output"
    is_row_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("kl", "mse", "soft_ce"):
            raise UsageError(f"loss 'output': kind={self.kind} is none of kl, mse, soft_ce")

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t, t = student.logits, teacher_logits(student, batch, self.name), to_float(self.temperature)
        if self.kind == "kl":
            return weighted_kd_mean(z_s, z_t, t, batch)
        if self.kind == "mse":
            rows = (z_s - z_t).square().mean(1)
        else:
            rows = -(F.softmax(z_t / t, dim=1) * F.log_softmax(z_s / t, dim=1)).sum(1) * t**2
        return weighted_mean(rows, batch)


@dataclass(frozen=True)
class WSLD(Loss):
    """Weighted soft labels, Zhou et al. 2021 (arXiv 2102.00650, equation 8).

    loss = T² mean of w H(softmax(z_t / T), softmax(z_s / T)), H the cross entropy, w = 1 - exp(-l_s / l_t) without
    gradient, l_s and l_t the cross entropies of student and teacher with the label: the weight of a row is smaller
    where the student is better than the teacher. Mean over the labelled rows.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.

    Source: Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
        Perspective" (arXiv 2102.00650, equation 8).
    """

    weight: float | Ramp = 2.25
    temperature: float | Ramp = 4.0
    name: ClassVar[str] = "wsld"
    needs_labels: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t, t = student.logits, teacher_logits(student, batch, self.name), to_float(self.temperature)
        l_s, is_labelled = cross_entropy_rows(z_s.detach(), batch)
        l_t = cross_entropy_rows(z_t, batch)[0]
        w = 1 - torch.exp(-l_s / (l_t + 1e-7))
        soft = -(F.softmax(z_t / t, dim=1) * F.log_softmax(z_s / t, dim=1)).sum(1) * t**2
        return masked_mean(w * soft, is_labelled)


class LearnedTemperature(nn.Module):
    """A trainable temperature start + span sigmoid(theta).

    Args:
        start: lower bound of the temperature.
        span: width of its range.
    """

    def __init__(self, start: float, span: float):
        super().__init__()
        self.start, self.span = start, span
        self.theta = nn.Parameter(torch.ones(1))

    def forward(self, reversal: float) -> torch.Tensor:
        """Return the temperature [1]. In the backward pass its gradient is multiplied by -reversal."""
        t = self.start + self.span * torch.sigmoid(self.theta)
        return t.detach() - reversal * (t - t.detach())


@dataclass(frozen=True)
class CTKD(Loss):
    """Curriculum temperature, Li et al. 2023 (arXiv 2211.16231, section 3.2, the global temperature).

    loss = `kd` with T = start + span sigmoid(theta). theta is trained to make the loss larger: its gradient is
    reversed and multiplied by lambda = (1 - cos(pi r)) / 2, r the parameter `reversal`.

    Args:
        weight: factor of the term in the sum of losses.
        start: lower bound of the temperature.
        span: width of its range.
        reversal: r, 0 to 1; by default it rises to 1 in the first 10 epochs.

    Source: Li et al. 2023, "Curriculum Temperature for Knowledge Distillation" (arXiv 2211.16231, section 3.2).
    """

    weight: float | Ramp = 1.0
    start: float = 1.0
    span: float = 20.0
    reversal: float | Ramp = Ramp(0.0, 1.0, 10)  # noqa: RUF009 (frozen)
    name: ClassVar[str] = "ctkd"
    sparse_codecs: ClassVar[tuple[str, ...]] = (TOP,)

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        return LearnedTemperature(self.start, self.span)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        strength = (1 - math.cos(math.pi * to_float(self.reversal))) / 2
        return kd_mean(student.logits, teacher_logits(student, batch, self.name), part(strength))
