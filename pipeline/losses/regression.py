"""Losses on numbers. They compare standardised numbers, so that outputs of different units count alike."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from softcache.data.tasks import NUMBERS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs

from .base import Loss, Ramp
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


@dataclass(frozen=True)
class MSE(NumberLoss):
    """Mean squared error of the hard numbers, standardised.

    loss = mean over the known numbers of ((z - y) / sd)², sd of the known training targets of each output; 0 when none
    is known. The numbers of a mixup view are weighted by their shares.

    Args:
        weight: factor of the term in the sum of losses.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "mse"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        targets, known = mix_labels(batch, student.logits.dtype)
        difference = self.standardize(student.logits - targets, part)
        return (difference.square() * known).sum() / known.sum().clamp(min=1)


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
