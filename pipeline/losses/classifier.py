"""Losses that go through the teacher's last linear layer, which the cache keeps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.batch import Batch, LinearHead, LossContext, ModelOutputs
from softcache.pipeline.taps.statistics import to_feature_map

from .base import Ramp, to_float
from .feature_base import FeatureLoss, match_size
from .kd import teacher_logits


def require_head(loss: FeatureLoss, context: LossContext, width: int) -> LinearHead:
    """The teacher's head, if it takes features so wide. Raises UsageError."""
    tap = loss.teacher_taps()[0]
    if context.head is None:
        raise loss.head_error()
    if context.head.weight.shape[1] != width:
        raise loss.head_error(
            f"its last linear layer takes {context.head.weight.shape[1]} values, '{tap}' has {width}"
        )
    return context.head


class Connector(nn.Module):
    """A trained map between vectors, and the teacher's head as it is."""

    def __init__(self, inside: int, head: LinearHead):
        super().__init__()
        self.map = nn.Linear(inside, head.weight.shape[1])
        self.weight: torch.Tensor
        self.bias: torch.Tensor
        self.register_buffer("weight", head.weight.clone(), persistent=False)
        self.register_buffer("bias", head.bias.clone(), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S] -> features [B, T] and the logits [B, K] that the teacher's head gives them."""
        features = self.map(x)
        return features, F.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class SRRL(FeatureLoss):
    """Softmax regression representation learning, Yang et al. 2021 (ICLR, equations 3 and 5).

    loss = features mean (A f_s - f_t)² + outputs mean (W A f_s + b - z_t)², f the pooled features before the last
    linear layer, A trained, W and b the teacher's last layer. teacher: the tap whose mean that layer reads. (The
    authors' program has batch norm and ReLU behind A; here it is linear alone, which a batch of one can train.)
    """

    weight: float | Ramp = 1.0
    features: float | Ramp = 1.0
    outputs: float | Ramp = 1.0
    name: ClassVar[str] = "srrl"
    statistic: ClassVar[str] = "pool"
    needs_logits: ClassVar[bool] = True
    needs_head: ClassVar[bool] = True
    single_layer: ClassVar[bool] = True

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        s, t = self.feature_pairs(student, batch)[0]
        return Connector(s.flatten(1).shape[1], require_head(self, context, t.flatten(1).shape[1]))

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        s, t = self.feature_pairs(student, batch)[0]
        guess, logits = part(s.flatten(1))
        by_features = F.mse_loss(guess, t.flatten(1))
        return to_float(self.features) * by_features + to_float(self.outputs) * F.mse_loss(
            logits, teacher_logits(student, batch)
        )


class HeadWeights(nn.Module):
    """The weights of the teacher's head, not trained."""

    def __init__(self, head: LinearHead):
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", head.weight.clone(), persistent=False)


@dataclass(frozen=True)
class CatKD(FeatureLoss):
    """Class attention transfer, Guo et al. 2023 (arXiv 2304.12777, equation 4).

    loss = mean over all values of (C_s - C_t)², C = W F the class activation maps [B, K, 2, 2]: the last linear layer
    as a 1 x 1 convolution of the map before pooling, here of its 2 x 2 means. Of both networks: the mean over the
    cells plus the bias is the logits. Both must have a last linear layer that reads the mean of that map. The weight
    is that of ResNet-32x4 with resnet8x4; the authors' others run from 0.7 (ResNet-56 with resnet20) to 12, and for
    ShuffleNets they normalise the maps, which this does not.
    """

    weight: float | Ramp = 15.0
    name: ClassVar[str] = "cat_kd"
    statistic: ClassVar[str] = "grid2"
    statistic_only: ClassVar[bool] = True
    needs_head: ClassVar[bool] = True
    single_layer: ClassVar[bool] = True

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        s, t = self.feature_pairs(student, batch)[0]
        if student.head is None or student.head.weight.shape[1] != s.shape[1]:
            raise self.head_error("the student's last linear layer does not read that map", whose="the student")
        return HeadWeights(require_head(self, context, t.shape[1]))

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert isinstance(part, HeadWeights)
        assert student.head is not None
        s, t = self.feature_pairs(student, batch)[0]
        mine = torch.einsum("kc,bchw->bkhw", student.head.weight.to(s.dtype), s)
        theirs = torch.einsum("kc,bchw->bkhw", part.weight.to(t.dtype), t)
        return F.mse_loss(mine, theirs)


@dataclass(frozen=True)
class SimKD(FeatureLoss):
    """The teacher's classifier reused, Chen et al. 2022 (arXiv 2203.14001, equation 2).

    loss = mean over all values of (m(F_s) - F_t)², F_t the teacher's last map, m a projector that is part of the
    student: it answers through m, the mean over space and the teacher's own last layer (see SimKDStudent), is
    measured, counted and kept so. Alone, without `hard` and `kd`. Of maps that differ in size the larger is averaged.
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "simkd"
    needs_head: ClassVar[bool] = True
    single_layer: ClassVar[bool] = True

    def projected_layer(self) -> str:
        """The student's layer that is led through the projector."""
        return super().student_taps()[0]

    def student_taps(self) -> tuple[str, ...]:
        return ("projector",)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        s, t = student.features["projector"], batch.features[self.teacher_taps()[0]].to(student.logits.dtype)
        return F.mse_loss(*match_size(to_feature_map(s), to_feature_map(t)))
