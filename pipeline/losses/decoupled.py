"""Soft targets taken apart: the target class and the others, rows and columns, several temperatures."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, ModelOutputs

from .base import Loss, Ramp, to_float
from .kd import kd_mean, standardize_logits, teacher_logits


def target_class(batch: Batch, z_t: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the label, or where it is hidden the class that the teacher chose."""
    return torch.where(batch.labels >= 0, batch.labels, z_t.argmax(1))


def decouple(z: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log (p_y, 1 - p_y) [B, 2], and log softmax over the other classes [B, K - 1], y the chosen class.

    Through logsumexp: 1 - p_y of a teacher that is sure would round to 0.
    """
    place = torch.arange(z.shape[1] - 1, device=z.device)
    others = z.gather(1, place + (place >= chosen[:, None]))
    both = torch.stack([z.gather(1, chosen[:, None])[:, 0], others.logsumexp(1)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(others, dim=1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class DKD(Loss):
    """Decoupled KD, Zhao et al. 2022 (arXiv 2203.08679, equation 7).

    loss = T² [target KL(b_t || b_s) + nontarget KL(o_t || o_s)], b = (p_y, 1 - p_y), o = softmax over the classes
    other than y, all of logits / T, mean over the rows. y is the label, or where it is hidden the teacher's class.
    With two classes the second part is 0. The paper warms up: weight=0->1@20. standardize: see `kd`.
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 4.0
    target: float | Ramp = 1.0
    nontarget: float | Ramp = 8.0
    standardize: bool = False
    name: ClassVar[str] = "dkd"
    needs_single_label: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t, t = student.logits, teacher_logits(student, batch), to_float(self.temperature)
        chosen = target_class(batch, z_t)
        if self.standardize:
            z_s, z_t = standardize_logits(z_s), standardize_logits(z_t)
        (both_s, others_s), (both_t, others_t) = decouple(z_s / t, chosen), decouple(z_t / t, chosen)
        parts = to_float(self.target) * _kl(both_t, both_s) + to_float(self.nontarget) * _kl(others_t, others_s)
        return parts * t**2


@dataclass(frozen=True)
class NKD(Loss):
    """Normalised KD, Yang et al. 2023 (arXiv 2303.13005, equation 8).

    loss = mean over the rows of -target p_t[y] log p_s[y] - nontarget T² sum_{i != y} o_t[i] log o_s[i], p at
    temperature 1, o the softmax at T over the classes other than y. y as in `dkd`. It goes with `hard`.
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 3.0
    target: float | Ramp = 1.0
    nontarget: float | Ramp = 3.5
    name: ClassVar[str] = "nkd"
    needs_single_label: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t, t = student.logits, teacher_logits(student, batch), to_float(self.temperature)
        chosen = target_class(batch, z_t)
        first = -(decouple(z_t, chosen)[0][:, 0].exp() * decouple(z_s, chosen)[0][:, 0])
        others_t, others_s = decouple(z_t / t, chosen)[1], decouple(z_s / t, chosen)[1]
        rest = -(others_t.exp() * others_s).sum(1) * t**2
        return (to_float(self.target) * first + to_float(self.nontarget) * rest).mean()


@dataclass(frozen=True)
class DIST(Loss):
    """Distillation from a stronger teacher, Huang et al. 2022 (arXiv 2205.10536, equations 8 to 10).

    loss = T² [between (1 - mean over rows of r(p_s, p_t)) + within (1 - mean over classes of r(p_s', p_t'))], r
    Pearson's correlation, p = softmax(z / T) [B, K], p' its transpose. T² is in the authors' program, not in the
    paper. In a batch of one row the second part is constant: there is nothing to correlate.
    """

    weight: float | Ramp = 2.0
    temperature: float | Ramp = 4.0
    between: float | Ramp = 1.0
    within: float | Ramp = 1.0
    name: ClassVar[str] = "dist"

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        t = to_float(self.temperature)
        p_s, p_t = F.softmax(student.logits / t, dim=1), F.softmax(teacher_logits(student, batch) / t, dim=1)
        rows, classes = 1 - _pearson_correlation(p_s, p_t).mean(), 1 - _pearson_correlation(p_s.T, p_t.T).mean()
        return (to_float(self.between) * rows + to_float(self.within) * classes) * t**2


def _pearson_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Correlation [N] of the rows of a and b [N, M]."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)


@dataclass(frozen=True)
class MultiTemperature(Loss):
    """Multi-level logits, Jin, Wang and Lin 2023 (CVPR, equations 4 to 8), on one view.

    loss = sum over T of: T² KL(p_t || p_s), mean over the rows; plus |P_s P_s' - P_t P_t'|² / B; plus
    |P_s' P_s - P_t' P_t|² / K; P = softmax(z / T) [B, K], squared Frobenius norms. standardize: see `kd`. (The
    authors' program has masks that halve these terms, and a second, strongly augmented view.)
    """

    weight: float | Ramp = 0.9
    temperatures: str = "2+3+4+5+6"
    batch: float | Ramp = 1.0
    classes: float | Ramp = 1.0
    standardize: bool = False
    name: ClassVar[str] = "multi_temperature"

    def __post_init__(self) -> None:
        try:
            values = [float(t) for t in self.temperatures.split("+")]
        except ValueError:
            values = []
        if not values or not all(1e-3 <= t <= 1e30 for t in values):
            raise UsageError(f"loss '{self.name}': temperatures={self.temperatures} is not such as 2+3+4")

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        z_s, z_t = student.logits, teacher_logits(student, batch)
        if self.standardize:
            z_s, z_t = standardize_logits(z_s), standardize_logits(z_t)
        terms = [self._at(z_s, z_t, float(t)) for t in self.temperatures.split("+")]
        return torch.stack(terms).sum()

    def _at(self, z_s: torch.Tensor, z_t: torch.Tensor, t: float) -> torch.Tensor:
        p_s, p_t = F.softmax(z_s / t, dim=1), F.softmax(z_t / t, dim=1)
        rows = (p_s @ p_s.T - p_t @ p_t.T).square().sum() / p_s.shape[0]
        columns = (p_s.T @ p_s - p_t.T @ p_t).square().sum() / p_s.shape[1]
        return kd_mean(z_s, z_t, t) + to_float(self.batch) * rows + to_float(self.classes) * columns
