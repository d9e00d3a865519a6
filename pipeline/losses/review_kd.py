"""Knowledge review: a layer of the teacher is reviewed by that layer of the student and all deeper ones."""

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

    loss = sum over the layers of H(R_l, F_t,l): R_l fuses the student's layer l with what came from the deeper ones
    by a trained attention, and H (`hcl`) compares at several sizes. Layers from shallow to deep; a pooled one
    may be last. The paper warms up: weight=0->5@20.
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
        found = part([s for s, _ in pairs], [t.shape[2] for _, t in pairs])
        return torch.stack([hierarchical_context_loss(r, t) for r, (_, t) in zip(found, pairs, strict=True)]).sum()


class ReviewModule(nn.Module):
    """Student's maps, shallow to deep, to the teacher's shapes, each fused with what came from the deeper ones."""

    def __init__(self, student: Sequence[int], teacher: Sequence[int], middle: int):
        super().__init__()
        last = len(student) - 1
        self.fuse = nn.ModuleList(
            _Fuse(s, middle, t, i < last) for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, maps: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """maps [B, S_l, H, W]; sizes: height of the teacher's map of each layer. -> maps [B, T_l, size, size]."""
        found: list[torch.Tensor] = []
        deeper = None
        for fuse, x, size in reversed(list(zip(self.fuse, maps, sizes, strict=True))):
            out, deeper = fuse(x, deeper, size)
            found.insert(0, out)
        return found


class _Fuse(nn.Module):
    def __init__(self, inside: int, middle: int, outside: int, fuses: bool):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(inside, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(nn.Conv2d(middle, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside))
        self.attend = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(self, x: torch.Tensor, deeper: torch.Tensor | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is compared [B, outside, size, size], and what is handed to the shallower layer [B, middle, H, W]."""
        x = self.enter(x)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, size=x.shape[2:], mode="nearest")
            share = self.attend(torch.cat([x, deeper], dim=1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        out = x if x.shape[2] == size else F.interpolate(x, size=(size, size), mode="nearest")
        return self.leave(out), x


def hierarchical_context_loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Hierarchical context loss of maps [B, C, H, W]: the weighed mean of the mean square differences as they are
    (1) and averaged down to 4 x 4 (1/2), 2 x 2 (1/4) and 1 x 1 (1/8), those sizes that are smaller than H."""
    total, weights = F.mse_loss(s, t), 1.0
    share = 1.0
    for size in (4, 2, 1):
        if size < s.shape[2]:
            share /= 2
            total = total + share * F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
            weights += share
    return total / weights
