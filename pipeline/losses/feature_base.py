"""The base of losses on features: pairs of a teacher's layer and a student's layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import TASKS
from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.taps.statistics import normalize_tap, parse_tap

from .base import Loss, require_logits

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FeatureLoss(Loss):
    """A loss on pairs of layers.

    Args:
        teacher: taps of the teacher joined by +, such as `layer1+layer2`.
        student: layers of the student joined by +, as many as of the teacher; "" where they have the same names.

    Attributes:
        statistic: the statistic of a layer that the loss reads where a tap names none, such as `map` or `pool`.
        statistic_only: whether the loss is defined for that statistic alone.
        single_layer: whether it takes one layer of the teacher only.
    """

    teacher: str = ""
    student: str = ""
    tasks: ClassVar[tuple[str, ...]] = TASKS
    statistic: ClassVar[str] = "map"
    statistic_only: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    single_layer: ClassVar[bool] = False

    def teacher_taps(self) -> tuple[str, ...]:
        if not self.teacher:
            raise self.layers_error()
        taps = tuple(self._resolve_tap(tap, self.statistic) for tap in self.teacher.split("+"))
        if self.single_layer and len(taps) > 1:
            raise UsageError(f"loss '{self.name}' takes one layer of the teacher, not {len(taps)}")
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
        return tuple(self._resolve_tap(tap, kind) for tap, kind in zip(taps, kinds, strict=True))

    def _resolve_tap(self, tap: str, kind: str) -> str:
        """Normalise the name of a tap, with the statistic `kind` where it names none."""
        if not tap:
            raise UsageError(f"loss '{self.name}': a layer without a name in '{self.teacher}' or '{self.student}'")
        path, named = parse_tap(tap)
        if self.statistic_only and ":" in tap and named != self.statistic:
            raise UsageError(f"loss '{self.name}' reads {self.statistic}, not {named}: name the layer alone, '{path}'")
        return normalize_tap(tap if ":" in tap or not kind else f"{tap}:{kind}")

    def feature_pairs(self, student: ModelOutputs, batch: Batch) -> list[Pair]:
        """Return the (student's, teacher's) features of each pair of layers, in the student's dtype."""
        student_features = [student.features[tap] for tap in self.student_taps()]
        teacher_features = [batch.features[tap] for tap in self.teacher_taps()]
        return [(s, t.to(s.dtype)) for s, t in zip(student_features, teacher_features, strict=True)]

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute the term of one pair of layers, for a loss without a trainable part.

        Args:
            s: the student's features [B, …].
            t: the teacher's features [B, …], in the same dtype.

        Returns:
            A scalar.
        """
        raise NotImplementedError(f"{self.name} is no sum over its pairs")

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """Compute the sum of `pair_loss` over the pairs of layers."""
        return torch.stack([self.pair_loss(s, t) for s, t in self.feature_pairs(student, batch)]).sum()

    def check_normalized_rows(self, x: torch.Tensor, part: nn.Module | None) -> None:
        """Raise UsageError for batch norm in training over a single value per channel, whose variance is 0.

        Args:
            x: what is normalised, [B, C, …].
            part: the loss's module.
        """
        if part is not None and part.training and len(x) == 1 and x[0, 0].numel() == 1:
            raise UsageError(f"loss '{self.name}' has batch norm: it needs a --batch-size of 2 or more")

    def layers_error(self) -> UsageError:
        """Return the error for a loss without layers."""
        return UsageError(f"loss '{self.name}' needs layers: --loss {self.name}:teacher=layer3,student=layer3")

    def shape_error(self, student: torch.Tensor, teacher: torch.Tensor, why: str) -> UsageError:
        """Return the error for a pair of layers whose shapes do not fit; why: what to do about it."""
        s, t = ("x".join(map(str, x.shape[1:])) for x in (student, teacher))
        return UsageError(f"loss '{self.name}': the student's {s} and the teacher's {t}: {why}")

    def head_error(self, why: str = "it has none", whose: str = "the cache") -> UsageError:
        """Return the error for a network, of `the cache` or `the student`, without a fitting last linear layer."""
        return UsageError(f"loss '{self.name}' needs the last linear layer of {whose}'s network: {why}")


@dataclass(frozen=True)
class RelationalLoss(FeatureLoss):
    """A loss on relations between the rows of a batch: of layers, or of outputs that are embeddings.

    Without layers it reads the student's outputs [B, D_s] and the teacher's embedding [B, D].
    """

    @property
    def reads_outputs(self) -> bool:
        """Whether it reads embeddings, and no layers."""
        return not (self.teacher or self.student)

    @property
    def needs_logits(self) -> bool:  # type: ignore[override]
        """Whether it reads the teacher's outputs."""
        return self.reads_outputs

    def teacher_taps(self) -> tuple[str, ...]:
        return () if self.reads_outputs else super().teacher_taps()

    def student_taps(self) -> tuple[str, ...]:
        return () if self.reads_outputs else super().student_taps()

    def feature_pairs(self, student: ModelOutputs, batch: Batch) -> list[Pair]:
        if not self.reads_outputs:
            return super().feature_pairs(student, batch)
        embedding = require_logits(batch, f"loss '{self.name}'")
        return [(student.logits, embedding.to(student.logits.dtype))]


def match_size(s: torch.Tensor, t: torch.Tensor) -> Pair:
    """Average two maps [B, C, H, W] down to the smaller height and width of both."""
    size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    return _pool_to_size(s, size), _pool_to_size(t, size)


def _pool_to_size(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)
