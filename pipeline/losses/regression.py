"""Losses on numbers. They compare standardised numbers, so that outputs of different units count alike."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.data.tasks import NUMBERS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs

from .base import Loss, Ramp, to_float
from .hard import masked_mean
from .kd import teacher_logits, weighted_mean
from .several_labels import mix_labels


class NumberScale(nn.Module):
    """The standard deviation of each output, float32 [D], a buffer.

    Args:
        std: float32 [D].
    """

    def __init__(self, std: torch.Tensor):
        super().__init__()
        self.std: torch.Tensor
        self.register_buffer("std", std)


class NumberLoss(Loss):
    """A loss on numbers, each divided by the standard deviation of its hard targets in the training rows.

    Their mean cancels in differences.
    """

    tasks: ClassVar[tuple[str, ...]] = (NUMBERS,)

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        return None if context.std is None else NumberScale(context.std)

    def standardize(self, difference: torch.Tensor, part: nn.Module | None) -> torch.Tensor:
        """Divide differences [B, D] by the standard deviation of each output."""
        return difference / part.std.to(difference.dtype) if isinstance(part, NumberScale) else difference

    def compare_with_labels(
        self, student: ModelOutputs, batch: Batch, part: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the standardised differences from the hard numbers [B, D], and which of these are known."""
        targets, known = mix_labels(batch, student.logits.dtype)
        return self.standardize(student.logits - targets, part), known


@dataclass(frozen=True)
class MSE(NumberLoss):
    """Mean squared error of the hard numbers, standardised.

    loss = mean over the known numbers of ((z - y) / sd)², sd of the known training targets of each output; 0 when none
    is known. The numbers of a mixed view are weighted by their shares.

    Args:
        weight: factor of the term in the sum of losses.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "mse"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        difference, known = self.compare_with_labels(student, batch, part)
        return masked_mean(difference.square(), known)


@dataclass(frozen=True)
class Huber(NumberLoss):
    """Huber loss of the hard numbers, standardised: squared near the target, linear far from it.

    loss = mean over the known numbers of d² / 2 where |d| <= delta, else delta (|d| - delta / 2), d = (z - y) / sd, sd
    as of `mse`; 0 when none is known. delta = 1 is the smooth L1 loss. The numbers of a mixed view are weighted by
    their shares.

    Args:
        weight: factor of the term in the sum of losses.
        delta: where it becomes linear, in standard deviations, from 0.001 on.

    Source: Huber 1964, "Robust Estimation of a Location Parameter" (Annals of Mathematical Statistics 35).
    """

    weight: float | Ramp = 1.0
    delta: float | Ramp = 1.0
    name: ClassVar[str] = "huber"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        difference, known = self.compare_with_labels(student, batch, part)
        terms = F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=to_float(self.delta))
        return masked_mean(terms, known)


@dataclass(frozen=True)
class Bounded(NumberLoss):
    """Teacher-bounded regression: the hard numbers, for rows in which the student is no better than the teacher.

    loss = mean over the rows with a known number of e_s where e_s + margin > e_t, else 0. e_s and e_t are the mean of
    ((z - y) / sd)² over the known numbers of a row, of student and teacher, sd as of `mse`. It is decided for a row as
    a whole, as in the paper, where e is the squared distance of a box. 0 when no number is known.

    The paper adds it, times 0.5, to the smooth L1 loss: `--loss huber --loss bounded:weight=0.5`.

    Args:
        weight: factor of the term in the sum of losses.
        margin: m, in squared standard deviations: how much better than the teacher a student has to be.

    Source: Chen et al. 2017, "Learning Efficient Object Detection Models with Knowledge Distillation" (NeurIPS 2017,
        equations 5 and 6).
    """

    weight: float | Ramp = 1.0
    margin: float | Ramp = 0.0
    name: ClassVar[str] = "bounded"
    needs_labels: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        targets, known = mix_labels(batch, student.logits.dtype)

        def measure_error(outputs: torch.Tensor) -> torch.Tensor:
            squares = self.standardize(outputs - targets, part).square()
            return (squares * known).sum(1) / known.sum(1).clamp(min=1)

        of_student = measure_error(student.logits)
        of_teacher = measure_error(teacher_logits(student, batch, self.name))
        is_unbounded = of_student + to_float(self.margin) > of_teacher
        return masked_mean(of_student * is_unbounded, known.any(1))


@dataclass(frozen=True)
class KDMSE(NumberLoss):
    """Mean squared error of the teacher's numbers, standardised.

    loss = mean over rows and outputs of ((z_s - z_t) / sd)², sd as of `mse`.

    Args:
        weight: factor of the term in the sum of losses.

    Source: Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?" (arXiv 1312.6184, section 2.3).
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "kd_mse"
    is_row_mean: ClassVar[bool] = True

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        difference = self.standardize(student.logits - teacher_logits(student, batch, self.name), part)
        return weighted_mean(difference.square().mean(1), batch)
