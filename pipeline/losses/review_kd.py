"""Knowledge review: a layer of the teacher is compared with that layer of the student fused with all deeper ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.taps.statistics import to_feature_map

from .base import Ramp
from .feature_base import FeatureLoss


@dataclass(frozen=True)
class ReviewKD(FeatureLoss):
    """Knowledge review, Chen et al. 2021 (arXiv 2104.09044, section 3.3).

    loss = sum over the layers of H(R_l, F_t,l): R_l fuses the student's layer l with the fused deeper layers by a
    trained attention, and H (`hierarchical_context_loss`) compares maps at several sizes. The paper has a warm-up:
    weight=0->5@20.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +, from shallow to deep, such as `layer1+layer2`; the last may be a
            pooled one.
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044, section 3.3).
    """

    weight: float | Ramp = 1.0
    name: ClassVar[str] = "review_kd"

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        pairs = [(to_feature_map(s), to_feature_map(t)) for s, t in self.feature_pairs(student, batch)]
        middle = min(512, max(s.shape[1] for s, _ in pairs))
        return ReviewModule([s.shape[1] for s, _ in pairs], [t.shape[1] for _, t in pairs], middle)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert part is not None
        pairs = [(to_feature_map(s), to_feature_map(t)) for s, t in self.feature_pairs(student, batch)]
        for pair in pairs:
            for x in pair:
                self.check_normalized_rows(x, part)
        fused = part([s for s, _ in pairs], [t.shape[2] for _, t in pairs])
        return torch.stack([hierarchical_context_loss(r, t) for r, (_, t) in zip(fused, pairs, strict=True)]).sum()


class ReviewModule(nn.Module):
    """The student's maps, fused from deep to shallow, in the teacher's shapes.

    Args:
        student: channels of the student's layers, shallow to deep.
        teacher: channels of the teacher's layers, shallow to deep.
        middle: channels of the fused maps.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], middle: int):
        super().__init__()
        last = len(student) - 1
        self.fuse = nn.ModuleList(
            _FusionBlock(s, middle, t, has_deeper=i < last)
            for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, maps: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Fuse the student's maps.

        Args:
            maps: of each layer, shallow to deep, [B, S_l, H, W].
            sizes: height of the teacher's map of each layer.

        Returns:
            Maps [B, T_l, size, size], shallow to deep.
        """
        outputs: list[torch.Tensor] = []
        deeper = None
        for fuse, x, size in reversed(list(zip(self.fuse, maps, sizes, strict=True))):
            output, deeper = fuse(x, deeper, size)
            outputs.insert(0, output)
        return outputs


class _FusionBlock(nn.Module):
    """Fuse a layer's map with the fused map of the deeper layers by attention."""

    def __init__(self, in_channels: int, middle: int, out_channels: int, has_deeper: bool):
        super().__init__()
        # enter, leave and attend are keys of state dicts in checkpoints.
        self.enter = nn.Sequential(nn.Conv2d(in_channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(
            nn.Conv2d(middle, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.attend = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if has_deeper else None

    def forward(self, x: torch.Tensor, deeper: torch.Tensor | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the map to compare [B, T, size, size], and the map for the shallower layer [B, middle, H, W]."""
        x = self.enter(x)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, size=x.shape[2:], mode="nearest")
            share = self.attend(torch.cat([x, deeper], dim=1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        out = x if x.shape[2] == size else F.interpolate(x, size=(size, size), mode="nearest")
        return self.leave(out), x


def hierarchical_context_loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Compute the hierarchical context loss of two maps.

    It is the weighted mean of the mean squared differences of the maps (weight 1) and of the maps averaged down to
    4 x 4, 2 x 2 and 1 x 1, each with half the weight of the one before. Sizes that are not smaller than H are left
    out.

    Args:
        s, t: maps [B, C, H, W].

    Returns:
        A scalar.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044, section 3.3).
    """
    total, total_weight = F.mse_loss(s, t), 1.0
    weight = 1.0
    for size in (4, 2, 1):
        if size < s.shape[2]:
            weight /= 2
            total = total + weight * F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
            total_weight += weight
    return total / total_weight
