"""Contrast: a row's own features of the teacher against those of other classes, taken from the cache."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.batch import Batch, LossContext, MemoryBank, ModelOutputs

from .base import Ramp, to_float
from .feature_base import FeatureLoss


@dataclass(frozen=True)
class CRD(FeatureLoss):
    """Contrastive representation distillation, Tian et al. 2020 (arXiv 1910.10699, equations 9, 10 and 18).

    loss = mean over the rows of -log h(s, t) - sum over N negatives t' of log(1 - h(s, t')), h(s, t) =
    e(s, t) / (e(s, t) + N Z), e = exp(g_s(f_s)' g_t(f_t) / T), g linear to `width` dimensions and then of norm 1,
    both trained; Z the mean of e over the negatives of the first batch, kept. `negatives` rows are drawn for each
    batch from the teacher's rows in the cache (the first draw); for a row those N count that are of another class, or
    where a label is hidden of another image. The paper's second half, the teacher's row against a memory of what the
    student said epochs ago, is left out: the cache has nothing stale.
    """

    weight: float | Ramp = 0.8
    temperature: float | Ramp = 0.07
    negatives: int = 4096
    width: int = 128
    name: ClassVar[str] = "crd"
    statistic: ClassVar[str] = "pool"
    single_layer: ClassVar[bool] = True
    needs_single_label: ClassVar[bool] = True

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        s, t = self.feature_pairs(student, batch)[0]
        assert context.bank is not None
        return ContrastiveModule(
            s.flatten(1).shape[1], t.flatten(1).shape[1], self.width, context.bank(self.teacher_taps()[0])
        )

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        assert isinstance(part, ContrastiveModule)
        s, t = (x.flatten(1) for x in self.feature_pairs(student, batch)[0])
        chosen = torch.randint(len(part.index), (self.negatives,), device=s.device)
        term: torch.Tensor = part(s, t, batch.labels, batch.index, chosen, to_float(self.temperature))
        return term


class ContrastiveModule(nn.Module):
    """Both embeddings, the bank of rows, and the constant Z of the first batch (log_z, not a number before)."""

    def __init__(self, student: int, teacher: int, width: int, bank: MemoryBank):
        super().__init__()
        self.student, self.teacher = nn.Linear(student, width), nn.Linear(teacher, width)
        self.features: torch.Tensor
        self.index: torch.Tensor
        self.labels: torch.Tensor
        self.log_z: torch.Tensor
        self.register_buffer("features", bank.features.flatten(1), persistent=False)
        self.register_buffer("index", bank.index, persistent=False)
        self.register_buffer("labels", bank.labels, persistent=False)
        self.register_buffer("log_z", torch.tensor(math.nan))

    def forward(
        self,
        s: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        index: torch.Tensor,
        chosen: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """s [B, S], t [B, T], labels and index [B] of the batch; chosen [N], rows of the bank to contrast with."""
        mine, right = F.normalize(self.student(s), dim=1), F.normalize(self.teacher(t), dim=1)
        wrong = F.normalize(self.teacher(self.features[chosen].to(s.dtype)), dim=1)
        near, far = (mine * right).sum(1) / temperature, mine @ wrong.T / temperature
        known = (labels[:, None] >= 0) & (self.labels[chosen] >= 0)
        other = torch.where(known, labels[:, None] != self.labels[chosen], index[:, None] != self.index[chosen])
        if self.training:  # with no question to the device, which a GPU would have to stop for in every step
            count = other.sum().clamp(min=1).to(far.dtype)
            mean = far.detach().masked_fill(~other, -torch.inf).logsumexp((0, 1)) - count.log()
            self.log_z.copy_(torch.where(self.log_z.isnan(), mean.nan_to_num(neginf=0.0), self.log_z))
        shift = self.log_z + other.sum(1, keepdim=True).clamp(min=1).to(far.dtype).log()
        return -(F.logsigmoid(near - shift[:, 0]) + (F.logsigmoid(shift - far) * other).sum(1)).mean()
