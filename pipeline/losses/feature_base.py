"""Losses between layers: which layer of the teacher goes with which of the student."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.taps.statistics import normalize_tap, parse_tap

from .base import Loss

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FeatureLoss(Loss):
    """A loss on pairs of layers, joined by +: `teacher=layer1+layer2,student=layer1+layer2`.

    statistic: what it needs of each, where the tap names none; no_other: it can do with that alone. Without
    `student`, its layers have the teacher's names.
    """

    teacher: str = ""
    student: str = ""
    statistic: ClassVar[str] = "map"
    statistic_only: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    single_layer: ClassVar[bool] = False

    def teacher_taps(self) -> tuple[str, ...]:
        if not self.teacher:
            raise UsageError(f"loss '{self.name}' wants layers: --loss {self.name}:teacher=layer3,student=layer3")
        taps = tuple(self._tap(tap, self.statistic) for tap in self.teacher.split("+"))
        if self.single_layer and len(taps) > 1:
            raise UsageError(f"loss '{self.name}' is of one layer of the teacher, not of {len(taps)}")
        return taps

    def student_taps(self) -> tuple[str, ...]:
        teacher = self.teacher_taps()
        if not self.student:
            return teacher
        taps = self.student.split("+")
        if len(taps) != len(teacher):
            raise UsageError(
                f"loss '{self.name}' has {len(teacher)} layers of the teacher, {len(taps)} of the student"
            )
        kinds = [tap.partition(":")[2] for tap in teacher]
        return tuple(self._tap(tap, kind) for tap, kind in zip(taps, kinds, strict=True))

    def _tap(self, tap: str, kind: str) -> str:
        if not tap:
            raise UsageError(f"loss '{self.name}': a layer without a name in '{self.teacher}' or '{self.student}'")
        path, named = parse_tap(tap)
        if self.statistic_only and ":" in tap and named != self.statistic:
            raise UsageError(f"loss '{self.name}' is of {self.statistic} and not of {named}: name the layer, '{path}'")
        return normalize_tap(tap if ":" in tap or not kind else f"{tap}:{kind}")

    def feature_pairs(self, student: ModelOutputs, batch: Batch) -> list[Pair]:
        """(student's, teacher's) features of each pair of layers, in the student's dtype."""
        mine = [student.features[tap] for tap in self.student_taps()]
        theirs = [batch.features[tap] for tap in self.teacher_taps()]
        return [(s, t.to(s.dtype)) for s, t in zip(mine, theirs, strict=True)]

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The term of one pair, of a loss that has no trainable part."""
        raise NotImplementedError(f"{self.name} is no sum over its pairs")

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """The sum over the pairs."""
        return torch.stack([self.pair_loss(s, t) for s, t in self.feature_pairs(student, batch)]).sum()

    def check_normalized_rows(self, x: torch.Tensor, part: nn.Module | None) -> None:
        """Raise UsageError for batch norm in training over one vector: there is no spread to divide by."""
        if part is not None and part.training and len(x) == 1 and x[0, 0].numel() == 1:
            raise UsageError(f"loss '{self.name}' normalises over the batch: a --batch-size of 1 leaves nothing")

    def shape_error(self, student: torch.Tensor, teacher: torch.Tensor, why: str) -> UsageError:
        """What to raise when a pair of layers does not fit."""
        s, t = ("x".join(map(str, x.shape[1:])) for x in (student, teacher))
        return UsageError(f"loss '{self.name}': the student's {s} and the teacher's {t}: {why}")

    def head_error(self, why: str = "it has none", whose: str = "the cache") -> UsageError:
        """What to raise when a network has no last linear layer that fits."""
        return UsageError(f"loss '{self.name}' needs the last linear layer of {whose}'s network: {why}")


def match_size(s: torch.Tensor, t: torch.Tensor) -> Pair:
    """Two maps [B, C, H, W], the larger averaged down to the smaller's height and width."""
    size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    return _pool_to(s, size), _pool_to(t, size)


def _pool_to(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)
