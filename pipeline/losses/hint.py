"""Hints: the teacher's hidden layers, to be reached by a trainable map from the student's."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.taps.statistics import parse_tap, to_feature_map

from .base import Ramp
from .feature_base import FeatureLoss, match_size


@dataclass(frozen=True)
class Hint(FeatureLoss):
    """FitNets, Romero et al. 2015 (arXiv 1412.6550, equation 3).

    loss = sum over the pairs of the mean over all values of (r(F_s) - F_t)², F_t the cached features of the tap
    `teacher`, F_s those of the student's layer `student`, r a trainable regressor where their shapes differ, else
    nothing. The default weight is the one in common use with this mean, for a middle layer. (The common programs put a
    ReLU behind r, have one for equal shapes too, and halve a map with 3 x 3, stride 2.)
    """

    weight: float | Ramp = 100.0
    name: ClassVar[str] = "hint"
    repeatable: ClassVar[bool] = True

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        made = [build_regressor(s.shape, t.shape) for s, t in self.feature_pairs(student, batch)]
        return nn.ModuleList(r or nn.Identity() for r in made) if any(made) else None

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        pairs = self.feature_pairs(student, batch)
        if isinstance(part, nn.ModuleList):
            for r, (_, t) in zip(part, pairs, strict=True):
                if isinstance(r, nn.Sequential):  # with batch norm
                    self.check_normalized_rows(t, part)
            pairs = [(r(s), t) for r, (s, t) in zip(part, pairs, strict=True)]
        return torch.stack([F.mse_loss(s, t) for s, t in pairs]).sum()


def build_regressor(student: torch.Size, teacher: torch.Size) -> nn.Module | None:
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
    raise UsageError(
        f"loss 'hint': no regressor from the student's {'x'.join(map(str, s))} to the teacher's"
        f" {'x'.join(map(str, t))}: choose a student layer at least as large, or with half the sides"
    )


@dataclass(frozen=True)
class ConcatHint(FeatureLoss):
    """Hints from concatenated layers, for tiny students: every layer of the teacher at once.

    loss = mean over all values of (A f_s + b - f_t)², f_t the pooled features of all taps of `teacher` one after
    the other, without `teacher` of all that are cached; f_s those of the student's layers, as many as one likes;
    A, b trained.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "concat_hint"
    statistic: ClassVar[str] = "pool"

    def with_default_layers(self, cached: tuple[str, ...]) -> "ConcatHint":
        """The same loss with the taps that are cached for its teacher, where it names none."""
        layers = dict.fromkeys(path for path, kind in map(parse_tap, cached) if kind in ("map", "pool"))
        return self if self.teacher or not layers else replace(self, teacher="+".join(layers))

    def student_taps(self) -> tuple[str, ...]:
        if not self.student:
            return super().student_taps()
        return tuple(self._tap(tap, "pool") for tap in self.student.split("+"))

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        s, t = self._both(student, batch)
        return nn.Linear(s.shape[1], t.shape[1])

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        s, t = self._both(student, batch)
        return F.mse_loss(part(s), t)

    def _both(self, student: ModelOutputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        mine = torch.cat([student.features[tap].flatten(1) for tap in self.student_taps()], dim=1)
        theirs = torch.cat([batch.features[tap].flatten(1) for tap in self.teacher_taps()], dim=1)
        return mine, theirs.to(mine.dtype)


@dataclass(frozen=True)
class VID(FeatureLoss):
    """Variational information distillation, Ahn et al. 2019 (arXiv 1904.05835, equations 5 and 6).

    loss = sum over the pairs of the mean over all values of [(m(F_s) - F_t)² / v + log v] / 2, m three 1 x 1
    convolutions, v = softplus(rho) + 1e-5 a variance per channel of the teacher, 5 at first; both trained. Maps of
    different sizes: the larger is averaged down.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "vid"

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        return nn.ModuleList(_Gaussian(s.shape[1], t.shape[1]) for s, t in self.feature_pairs(student, batch))

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert isinstance(part, nn.ModuleList)
        terms = []
        for gaussian, (s, t) in zip(part, self.feature_pairs(student, batch), strict=True):
            s, t = match_size(to_feature_map(s), to_feature_map(t))
            mean, variance = gaussian(s)
            terms.append(0.5 * ((mean - t).square() / variance + variance.log()).mean())
        return torch.stack(terms).sum()


class _Gaussian(nn.Module):
    """[B, S, H, W] -> the mean [B, T, H, W] and the variance [1, T, 1, 1] of the teacher's map."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(inside, outside, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 1, bias=False),
        )
        self.rho = nn.Parameter(torch.full((1, outside, 1, 1), math.log(math.exp(5 - 1e-5) - 1)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean(x), F.softplus(self.rho) + 1e-5
