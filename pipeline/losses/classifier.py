"""Losses that go through the teacher's last linear layer, which the cache keeps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.batch import Batch, LinearHead, LossContext, ModelOutputs
from softcache.pipeline.models import find_head
from softcache.pipeline.models.archs.simkd import SimKDStudent, build_simkd
from softcache.pipeline.taps.statistics import to_feature_map

from .base import Ramp, to_float
from .feature_base import FeatureLoss, match_size
from .kd import teacher_logits


def require_head(loss: FeatureLoss, context: LossContext, width: int) -> LinearHead:
    """Return the teacher's head.

    Args:
        loss: the loss that needs it; its first tap is the head's input.
        context: the head, where the cache has one.
        width: number of features of that tap.

    Raises:
        UsageError: where the cache has no head, or one for another number of features.
    """
    tap = loss.teacher_taps()[0]
    if context.head is None:
        raise loss.head_error()
    if context.head.weight.shape[1] != width:
        raise loss.head_error(
            f"its last linear layer takes {context.head.weight.shape[1]} values, '{tap}' has {width}"
        )
    return context.head


class Connector(nn.Module):
    """A trainable linear map to the teacher's features, followed by the teacher's frozen head.

    Args:
        in_features: number of features of the student.
        head: the teacher's head, weight [K, T].
    """

    def __init__(self, in_features: int, head: LinearHead):
        super().__init__()
        self.map = nn.Linear(in_features, head.weight.shape[1])
        self.weight: torch.Tensor
        self.bias: torch.Tensor
        self.register_buffer("weight", head.weight.clone(), persistent=False)
        self.register_buffer("bias", head.bias.clone(), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the student's features [B, S] to features [B, T], and those to logits [B, K] by the teacher's head."""
        features = self.map(x)
        return features, F.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class SRRL(FeatureLoss):
    """Softmax regression representation learning, Yang et al. 2021 (ICLR, equations 3 and 5).

    loss = features mean (A f_s - f_t)² + outputs mean (W A f_s + b - z_t)², f the pooled features before the last
    linear layer, A trained, W and b the teacher's last layer. The authors' program has batch norm and ReLU behind A;
    here A is linear alone, which a batch of one can train.

    Args:
        weight: factor of the term in the sum of losses.
        features: factor of the part between features.
        outputs: factor of the part between logits.
        teacher: the tap whose mean the teacher's last layer reads.
        student: the student's layer.

    Source: Yang et al. 2021, "Knowledge distillation via softmax regression representation learning" (ICLR, equations
        3 and 5).
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

    def is_zero(self, classes: int) -> bool:
        return to_float(self.features) == to_float(self.outputs) == 0

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        s, t = self.feature_pairs(student, batch)[0]
        features, logits = part(s.flatten(1))
        feature_term = F.mse_loss(features, t.flatten(1))
        logit_term = F.mse_loss(logits, teacher_logits(student, batch, self.name))
        return to_float(self.features) * feature_term + to_float(self.outputs) * logit_term


class HeadWeights(nn.Module):
    """The weights of the teacher's head [K, D] as a buffer, not trained."""

    def __init__(self, head: LinearHead):
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", head.weight.clone(), persistent=False)


@dataclass(frozen=True)
class CatKD(FeatureLoss):
    """Class attention transfer, Guo et al. 2023 (arXiv 2304.12777, equation 4).

    loss = mean over all values of (C_s - C_t)², C = W F the class activation maps [B, K, 2, 2]: the last linear layer
    as a 1 x 1 convolution of the map before pooling, here of its 2 x 2 means. The mean of C over the four cells plus
    the bias gives the logits, so both networks must have a last linear layer that reads the mean of that map. For
    ShuffleNets the authors normalise the maps, which this loss does not.

    Args:
        weight: factor of the term in the sum of losses. The default is the authors' for ResNet-32x4 with resnet8x4;
            their other weights are between 0.7 (ResNet-56 with resnet20) and 12.
        teacher, student: the last maps before pooling.

    Source: Guo et al. 2023, "Class Attention Transfer Based Knowledge Distillation" (arXiv 2304.12777, equation 4).
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
        student_maps = torch.einsum("kc,bchw->bkhw", student.head.weight.to(s.dtype), s)
        teacher_maps = torch.einsum("kc,bchw->bkhw", part.weight.to(t.dtype), t)
        return F.mse_loss(student_maps, teacher_maps)


@dataclass(frozen=True)
class SimKD(FeatureLoss):
    """The teacher's classifier reused, Chen et al. 2022 (arXiv 2203.14001, equation 2).

    loss = mean over all values of (m(F_s) - F_t)², F_t the teacher's last map, m a projector that is part of the
    student. The student's logits are those of the teacher's last layer on the spatial mean of m(F_s), see
    SimKDStudent; its metrics, size and saved weights include the projector. The loss takes no other loss beside it.
    The larger of two maps of different sizes is averaged down.

    Args:
        weight: factor of the loss.
        teacher: the teacher's last map.
        student: the student's layer that the projector reads.

    Source: Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier" (arXiv 2203.14001, equation
        2).
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "simkd"
    needs_head: ClassVar[bool] = True
    single_layer: ClassVar[bool] = True

    def projected_layer(self) -> str:
        """Return the student's layer that the projector reads."""
        return super().student_taps()[0]

    def student_taps(self) -> tuple[str, ...]:
        return ("projector",)

    def extend(self, network: nn.Module, example: Batch) -> SimKDStudent:
        """Make the student of this loss of a network, for a training loop of one's own.

        Args:
            network: A complete network with a last linear layer, which is replaced by an identity, in place.
            example: A batch of the loader.

        Returns:
            The network up to the student's layer, a projector, and the teacher's last linear layer.

        Raises:
            UsageError: The network or the teacher has no last linear layer, or layers do not fit together.
        """
        head = example.source.make_context([self]).head if example.source else None
        if head is None:
            raise self.head_error()
        classes, width = head.weight.shape
        linear = find_head(network, classes)
        names = [name for name, module in network.named_modules() if module is linear and name]
        if not names:
            raise self.head_error(whose="the student")
        image = example.images[:1]
        student = build_simkd(network, names[0], self.projected_layer(), width, classes, example=image)
        student.use_head(head)
        return student.to(image.device)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        s, t = student.features["projector"], batch.features[self.teacher_taps()[0]].to(student.logits.dtype)
        return F.mse_loss(*match_size(to_feature_map(s), to_feature_map(t)))
