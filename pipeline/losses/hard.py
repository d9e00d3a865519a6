"""Hard targets: the labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..records import Outputs, TargetBatch
from .loss import Loss, Ramp, fixed


@dataclass(frozen=True)
class Hard(Loss):
    """Cross entropy with the labels, in nats.

    loss = mean over the labelled rows of -sum_c q_c log softmax(z)_c, q one-hot, or with smoothing s
    (Szegedy et al. 2016, section 7) (1 - s) one-hot + s / K. A mixup view has two labels, weighed by their
    shares (Zhang et al. 2018). Rows without a label count for nothing; 0 when no row has one.
    """

    weight: float | Ramp = 1.0
    smoothing: float | Ramp = 0.0
    name: ClassVar[str] = "hard"
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    def __call__(self, student: Outputs, target: TargetBatch, module: nn.Module | None) -> torch.Tensor:
        known = target.labels >= 0
        rows = self._rows(student.logits, target.labels)
        if target.partner is not None and target.share is not None:
            known &= target.partner >= 0
            rows = target.share * rows + (1 - target.share) * self._rows(student.logits, target.partner)
        return (rows * known).sum() / known.sum().clamp(min=1)

    def _rows(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        s = fixed(self.smoothing)
        return F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=s, reduction="none")
