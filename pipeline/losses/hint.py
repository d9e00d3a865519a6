"""Hints: the student's hidden layers predict the teacher's through a trainable map."""

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
    `teacher`, F_s those of the student's layer `student`, r a trainable regressor where their shapes differ, else the
    identity. The default weight is the one in common use with this mean, for a middle layer. Common programs differ:
    they put a ReLU behind r, have an r for equal shapes too, and halve a map with a 3 x 3 convolution of stride 2.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`.
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550, equation 3).
    """

    weight: float | Ramp = 100.0
    name: ClassVar[str] = "hint"
    repeatable: ClassVar[bool] = True

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        regressors = [build_regressor(s.shape, t.shape) for s, t in self.feature_pairs(student, batch)]
        return nn.ModuleList(r or nn.Identity() for r in regressors) if any(regressors) else None

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        pairs = self.feature_pairs(student, batch)
        if isinstance(part, nn.ModuleList):
            for r, (_, t) in zip(part, pairs, strict=True):
                if isinstance(r, nn.Sequential):  # with batch norm
                    self.check_normalized_rows(t, part)
            pairs = [(r(s), t) for r, (s, t) in zip(part, pairs, strict=True)]
        return torch.stack([F.mse_loss(s, t) for s, t in pairs]).sum()


def build_regressor(student: torch.Size, teacher: torch.Size) -> nn.Module | None:
    """Build a map from the student's shape to the teacher's.

    For vectors it is linear. For maps it is a valid convolution whose kernel gives the teacher's size (Romero et al.
    2015, section 2.2), or a transposed convolution where the student's map has half the teacher's height and width;
    both are followed by batch norm.

    Args:
        student: shape of the student's features, [B, …].
        teacher: shape of the teacher's features, [B, …].

    Returns:
        The module; None for equal shapes.

    Raises:
        UsageError: for shapes that no such map joins.
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
            upsample = nn.ConvTranspose2d(s[0], t[0], 4, 2, 1, bias=False)
            return nn.Sequential(upsample, nn.BatchNorm2d(t[0]))
    raise UsageError(
        f"loss 'hint': no regressor from the student's {'x'.join(map(str, s))} to the teacher's"
        f" {'x'.join(map(str, t))}: choose a student layer at least as large, or with half the sides"
    )


@dataclass(frozen=True)
class ConcatHint(FeatureLoss):
    """Hints from concatenated layers, for tiny students: every layer of the teacher at once.

    loss = mean over all values of (A f_s + b - f_t)², f_t the concatenated pooled features of the teacher's taps, f_s
    those of the student's layers, A and b trained.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +; all cached taps where it is "".
        student: layers of the student joined by +, any number; "" where they have the teacher's names.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "concat_hint"
    statistic: ClassVar[str] = "pool"

    def with_default_layers(self, cached: tuple[str, ...]) -> "ConcatHint":
        """Return the loss with all cached taps as its teacher's, where it names none.

        Args:
            cached: names of the cached taps.
        """
        layers = dict.fromkeys(path for path, kind in map(parse_tap, cached) if kind in ("map", "pool"))
        return self if self.teacher or not layers else replace(self, teacher="+".join(layers))

    def student_taps(self) -> tuple[str, ...]:
        if not self.student:
            return super().student_taps()
        return tuple(self._resolve_tap(tap, "pool") for tap in self.student.split("+"))

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        s, t = self._concatenate(student, batch)
        return nn.Linear(s.shape[1], t.shape[1])

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        s, t = self._concatenate(student, batch)
        return F.mse_loss(part(s), t)

    def _concatenate(self, student: ModelOutputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Concatenate the features of the student's layers, [B, S], and of the teacher's taps, [B, T]."""
        s = torch.cat([student.features[tap].flatten(1) for tap in self.student_taps()], dim=1)
        t = torch.cat([batch.features[tap].flatten(1) for tap in self.teacher_taps()], dim=1)
        return s, t.to(s.dtype)


@dataclass(frozen=True)
class VID(FeatureLoss):
    """Variational information distillation, Ahn et al. 2019 (arXiv 1904.05835, equations 5 and 6).

    loss = sum over the pairs of the mean over all values of [(m(F_s) - F_t)² / v + log v] / 2, m three 1 x 1
    convolutions, v = softplus(rho) + 1e-5 a variance per channel of the teacher, initially 5; both trained. The larger
    of two maps of different sizes is averaged down.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`.
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer" (arXiv 1904.05835, equations
        5 and 6).
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "vid"

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        return nn.ModuleList(_GaussianModel(s.shape[1], t.shape[1]) for s, t in self.feature_pairs(student, batch))

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert isinstance(part, nn.ModuleList)
        terms = []
        for gaussian, (s, t) in zip(part, self.feature_pairs(student, batch), strict=True):
            s, t = match_size(to_feature_map(s), to_feature_map(t))
            mean, variance = gaussian(s)
            terms.append(0.5 * ((mean - t).square() / variance + variance.log()).mean())
        return torch.stack(terms).sum()


class _GaussianModel(nn.Module):
    """A student's map [B, S, H, W] -> mean [B, T, H, W] and variance [1, T, 1, 1] of the teacher's map."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
        )
        self.rho = nn.Parameter(torch.full((1, out_channels, 1, 1), math.log(math.exp(5 - 1e-5) - 1)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean(x), F.softplus(self.rho) + 1e-5
