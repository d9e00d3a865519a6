"""Soft targets: the teacher's logits."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..records import Outputs, TargetBatch
from .loss import Loss, Ramp, fixed


def soft_term(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(softmax(z_t / T) || softmax(z_s / T)), mean over the rows, in nats. z_s, z_t: [B, K].

    Through log-softmax on both sides: neither a probability of zero nor a logit of -1000 gives a NaN.
    """
    log_p = F.log_softmax(z_t / temperature, dim=1)
    log_q = F.log_softmax(z_s / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True)
class KD(Loss):
    """Knowledge distillation, Hinton, Vinyals and Dean 2015 (arXiv 1503.02531, section 2).

    loss = T² KL(softmax(z_t / T) || softmax(z_s / T)): teacher first, sum over the classes, mean over the
    rows. T² is inside, so that the gradient keeps its size when T changes.
    """

    weight: float | Ramp = 1.0
    temperature: float | Ramp = 4.0
    name: ClassVar[str] = "kd"
    needs_labels: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True

    def __call__(self, student: Outputs, target: TargetBatch, module: nn.Module | None) -> torch.Tensor:
        assert target.logits is not None
        return soft_term(student.logits, target.logits, fixed(self.temperature))


@dataclass(frozen=True)
class LogitMSE(Loss):
    """Logit regression, Ba and Caruana 2014 (arXiv 1312.6184, section 2.3); Kim et al. 2021 (arXiv 2105.08919).

    loss = mean over rows and classes of (z_s - z_t)². It wants a smaller learning rate than `kd`: at 0.05 it
    diverged on logits with a standard deviation of 6.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "logit_mse"
    needs_labels: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True

    def __call__(self, student: Outputs, target: TargetBatch, module: nn.Module | None) -> torch.Tensor:
        assert target.logits is not None
        return F.mse_loss(student.logits, target.logits)
