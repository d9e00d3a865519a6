"""Hints: the teacher's hidden layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from data.errors import WrongCommand

from ..records import Outputs, TargetBatch
from .loss import Loss, Ramp


@dataclass(frozen=True)
class Hint(Loss):
    """FitNets, Romero et al. 2015 (arXiv 1412.6550, equation 3).

    loss = mean over all values of (r(F_s) - F_t)², F_t the cached features of the tap `teacher`, F_s those of
    the student's layer `student`, r a trainable regressor where their shapes differ, else nothing. The default
    weight is the one in common use with this mean.
    """

    weight: float | Ramp = 100.0
    teacher: str = ""
    student: str = ""
    name: ClassVar[str] = "hint"
    needs_labels: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False

    def teacher_taps(self) -> tuple[str, ...]:
        return (self._named("teacher"),)

    def student_taps(self) -> tuple[str, ...]:
        return (self._named("student"),)

    def _named(self, side: str) -> str:
        tap: str = getattr(self, side)
        if not tap:
            raise WrongCommand("loss 'hint' wants both layers: --loss hint:teacher=layer3,student=layer3")
        return tap

    def module(self, student: Outputs, target: TargetBatch) -> nn.Module | None:
        return regressor(student.features[self.student].shape, target.features[self.teacher].shape)

    def __call__(self, student: Outputs, target: TargetBatch, module: nn.Module | None) -> torch.Tensor:
        guess = student.features[self.student]
        if module is not None:
            guess = module(guess)
        return F.mse_loss(guess, target.features[self.teacher].to(guess.dtype))


def regressor(student: torch.Size, teacher: torch.Size) -> nn.Module | None:
    """A map from the student's shape [B, …] to the teacher's, None where they are equal.

    Vectors: linear. Maps: a convolution as large as the shrinking asks for (valid, Romero et al. 2015, section
    2.2), or, where the student's map has half the teacher's sides, a transposed one; each with batch norm.
    """
    s, t = tuple(student[1:]), tuple(teacher[1:])
    if s == t:
        return None
    if len(s) == len(t) == 1:
        return nn.Linear(s[0], t[0])
    if len(s) == len(t) == 3:
        if s[1] >= t[1] and s[2] >= t[2]:
            kernel = (1 + s[1] - t[1], 1 + s[2] - t[2])
            return nn.Sequential(nn.Conv2d(s[0], t[0], kernel, bias=False), nn.BatchNorm2d(t[0]))
        if (2 * s[1], 2 * s[2]) == (t[1], t[2]):
            grow = nn.ConvTranspose2d(s[0], t[0], 4, 2, 1, bias=False)
            return nn.Sequential(grow, nn.BatchNorm2d(t[0]))
    raise WrongCommand(
        f"loss 'hint': no regressor from the student's {'x'.join(map(str, s))} to the teacher's"
        f" {'x'.join(map(str, t))}: choose a student layer at least as large, or with half the sides"
    )
