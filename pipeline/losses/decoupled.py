"""Losses on parts of the soft targets: target class and other classes, rows and columns, several temperatures."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, ModelOutputs

from .base import Loss, Ramp, to_float
from .kd import check_standardizable, kd_mean, standardize_logits, teacher_logits


def target_class(batch: Batch, z_t: torch.Tensor) -> torch.Tensor:
    """Return the label of each row, int64 [B], or the teacher's most probable class where the label is hidden."""
    return torch.where(batch.labels >= 0, batch.labels, z_t.argmax(1))


def decouple(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split logits into the target class against the rest, and the other classes among themselves.

    1 - p_y is computed with logsumexp: for a confident teacher it would round to 0 otherwise.

    Args:
        z: logits [B, K].
        y: the target classes, int64 [B].

    Returns:
        log (p_y, 1 - p_y) [B, 2], and log softmax over the classes other than y [B, K - 1].
    """
    column = torch.arange(z.shape[1] - 1, device=z.device)
    nontarget = z.gather(1, column + (column >= y[:, None]))
    binary = torch.stack([z.gather(1, y[:, None])[:, 0], nontarget.logsumexp(1)], dim=1)
    return F.log_softmax(binary, dim=1), F.log_softmax(nontarget, dim=1)


def _kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Compute KL(p || q), mean over the rows."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class DKD(Loss):
    """Decoupled KD, Zhao et al. 2022 (arXiv 2203.08679, equation 7).

    loss = T² [target KL(b_t || b_s) + nontarget KL(o_t || o_s)], b = (p_y, 1 - p_y), o = softmax over the classes
    other than y, all of logits / T, mean over the rows. y is the label, or the teacher's class where the label is
    hidden. With two classes the second part is 0. The paper has a warm-up: weight=0->1@20.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.
        target: factor of the part of the target class (alpha in the paper).
        nontarget: factor of the part of the other classes (beta in the paper).
        standardize: standardise the logits of each row first, see `kd`.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation" (arXiv 2203.08679, equation 7).
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 4.0
    target: float | Ramp = 1.0
    nontarget: float | Ramp = 8.0
    standardize: bool = False
    name: ClassVar[str] = "dkd"
    needs_single_label: ClassVar[bool] = True

    def is_zero(self, classes: int) -> bool:
        if self.standardize:
            check_standardizable(classes)
        return to_float(self.target) == 0 and (classes < 3 or to_float(self.nontarget) == 0)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t, t = student.logits, teacher_logits(student, batch, self.name), to_float(self.temperature)
        y = target_class(batch, z_t)
        if self.standardize:
            z_s, z_t = standardize_logits(z_s), standardize_logits(z_t)
        (b_s, o_s), (b_t, o_t) = decouple(z_s / t, y), decouple(z_t / t, y)
        target, nontarget = to_float(self.target), to_float(self.nontarget)
        return (target * _kl_divergence(b_t, b_s) + nontarget * _kl_divergence(o_t, o_s)) * t**2


@dataclass(frozen=True)
class NKD(Loss):
    """Normalised KD, Yang et al. 2023 (arXiv 2303.13005, equation 8).

    loss = mean over the rows of -target p_t[y] log p_s[y] - nontarget T² sum_{i != y} o_t[i] log o_s[i], p at
    temperature 1, o the softmax at T over the classes other than y. y as in `dkd`. Use it together with `hard`.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T of the second part, from 0.001 on.
        target: factor of the part of the target class.
        nontarget: factor of the part of the other classes.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
        Normalized Loss and Customized Soft Labels" (arXiv 2303.13005, equation 8).
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 3.0
    target: float | Ramp = 1.0
    nontarget: float | Ramp = 3.5
    name: ClassVar[str] = "nkd"
    needs_single_label: ClassVar[bool] = True

    def is_zero(self, classes: int) -> bool:
        return to_float(self.target) == 0 and (classes < 3 or to_float(self.nontarget) == 0)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t, t = student.logits, teacher_logits(student, batch, self.name), to_float(self.temperature)
        y = target_class(batch, z_t)
        target_rows = -(decouple(z_t, y)[0][:, 0].exp() * decouple(z_s, y)[0][:, 0])
        log_o_t, log_o_s = decouple(z_t / t, y)[1], decouple(z_s / t, y)[1]
        nontarget_rows = -(log_o_t.exp() * log_o_s).sum(1) * t**2
        return (to_float(self.target) * target_rows + to_float(self.nontarget) * nontarget_rows).mean()


@dataclass(frozen=True)
class DIST(Loss):
    """Distillation from a stronger teacher, Huang et al. 2022 (arXiv 2205.10536, equations 8 to 10).

    loss = T² [between (1 - mean over rows of r(p_s, p_t)) + within (1 - mean over classes of r(p_s', p_t'))], r
    Pearson's correlation, p = softmax(z / T) [B, K], p' its transpose. T² is in the authors' program, not in the
    paper. In a batch of one row the second part is constant, because a correlation over one row is undefined.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.
        between: factor of the correlation between classes, within each row.
        within: factor of the correlation within each class, over the rows.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536, equations 8 to 10).
    """

    weight: float | Ramp = 2.0
    temperature: float | Ramp = 4.0
    between: float | Ramp = 1.0
    within: float | Ramp = 1.0
    name: ClassVar[str] = "dist"

    def is_zero(self, classes: int) -> bool:
        return to_float(self.between) == to_float(self.within) == 0

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        t = to_float(self.temperature)
        p_s, p_t = (
            F.softmax(student.logits / t, dim=1),
            F.softmax(teacher_logits(student, batch, self.name) / t, dim=1),
        )
        rows, classes = 1 - _pearson_correlation(p_s, p_t).mean(), 1 - _pearson_correlation(p_s.T, p_t.T).mean()
        return (to_float(self.between) * rows + to_float(self.within) * classes) * t**2


def _pearson_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the correlation [N] of the rows of a and b [N, M]."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)


@dataclass(frozen=True)
class MultiTemperature(Loss):
    """Multi-level logits, Jin, Wang and Lin 2023 (CVPR, equations 4 to 8), on one view.

    loss = sum over T of: T² KL(p_t || p_s), mean over the rows; plus |P_s P_s' - P_t P_t'|² / B; plus
    |P_s' P_s - P_t' P_t|² / K; P = softmax(z / T) [B, K], squared Frobenius norms. The authors' program also has masks
    that halve these terms, and a second, strongly augmented view.

    Args:
        weight: factor of the term in the sum of losses.
        temperatures: the values of T joined by +, each from 0.001 on.
        batch: factor of the part between rows.
        classes: factor of the part between classes.
        standardize: standardise the logits of each row in the KL divergence, see `kd`. The parts between rows and
            between classes read the logits as they are, as in the program of Sun et al. 2024.

    Source: Jin, Wang and Lin 2023, "Multi-Level Logit Distillation" (CVPR, equations 4 to 8); `standardize`: Sun et
        al. 2024, "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427).
    """

    weight: float | Ramp = 0.9
    temperatures: str = "2+3+4+5+6"
    batch: float | Ramp = 1.0
    classes: float | Ramp = 1.0
    standardize: bool = False
    name: ClassVar[str] = "multi_temperature"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            values = [float(t) for t in self.temperatures.split("+")]
        except ValueError:
            values = []
        if not values or not all(1e-3 <= t <= 1e30 for t in values):
            raise UsageError(
                f"loss '{self.name}': temperatures={self.temperatures} is no list of numbers such as 2+3+4"
            )

    def is_zero(self, classes: int) -> bool:
        if self.standardize:
            check_standardizable(classes)
        return False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t = student.logits, teacher_logits(student, batch, self.name)
        kl_s, kl_t = (standardize_logits(z_s), standardize_logits(z_t)) if self.standardize else (z_s, z_t)
        terms = []
        for t in (float(text) for text in self.temperatures.split("+")):
            p_s, p_t = F.softmax(z_s / t, dim=1), F.softmax(z_t / t, dim=1)
            rows = (p_s @ p_s.T - p_t @ p_t.T).square().sum() / p_s.shape[0]
            columns = (p_s.T @ p_s - p_t.T @ p_t).square().sum() / p_s.shape[1]
            terms.append(kd_mean(kl_s, kl_t, t) + to_float(self.batch) * rows + to_float(self.classes) * columns)
        return torch.stack(terms).sum()
