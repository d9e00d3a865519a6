"""A contrastive loss: the teacher's features of the same row against those of rows of other classes in the cache."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.data.tasks import CLASSES, EMBEDDING
from softcache.pipeline.batch import Batch, LossContext, MemoryBank, ModelOutputs

from .base import Ramp, to_float
from .feature_base import FeatureLoss


@dataclass(frozen=True)
class CRD(FeatureLoss):
    """Contrastive representation distillation, Tian et al. 2020 (arXiv 1910.10699, equations 9, 10 and 18).

    loss = mean over the rows of -log h(s, t) - sum over N negatives t' of log(1 - h(s, t')), h(s, t) =
    e(s, t) / (e(s, t) + N Z), e = exp(g_s(f_s)' g_t(f_t) / T), g linear to `width` dimensions and then normalised to
    norm 1, both trained; Z the mean of e over the negatives of the first batch, constant from then on. For each batch,
    `negatives` rows are drawn from the teacher's rows in the cache (the first draw). The N negatives of a row are
    those of another class, or of another image where a label is hidden. The paper's second half, which contrasts the
    teacher's row with a memory of student features from earlier epochs, is left out: the cache has no such memory.

    Args:
        weight: factor of the term in the sum of losses.
        temperature: T, from 0.001 on.
        negatives: rows drawn for each batch.
        width: dimensions of the embeddings.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`.
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Tian et al. 2020, "Contrastive Representation Distillation" (arXiv 1910.10699, equations 9, 10 and 18).
    """

    weight: float | Ramp = 0.8
    temperature: float | Ramp = 0.07
    negatives: int = 4096
    width: int = 128
    name: ClassVar[str] = "crd"
    tasks: ClassVar[tuple[str, ...]] = (CLASSES, EMBEDDING)
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
        drawn = torch.randint(len(part.index), (self.negatives,), device=s.device)
        term: torch.Tensor = part(
            s, t, labels=batch.labels, index=batch.index, drawn=drawn, temperature=to_float(self.temperature)
        )
        return term


class ContrastiveModule(nn.Module):
    """The two embeddings, the teacher's rows to draw negatives from, and the constant Z.

    Args:
        student: number of features of the student.
        teacher: number of features of the teacher.
        width: dimensions of the embeddings.
        bank: the teacher's rows in the cache.

    Attributes:
        log_z: log Z, NaN before the first batch in training mode.
    """

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
        drawn: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """Compute the term.

        Args:
            s: the student's features [B, S].
            t: the teacher's features [B, T].
            labels: int64 [B], -1 where hidden.
            index: positions of the rows in the split, int64 [B].
            drawn: rows of the bank to draw negatives from, int64 [negatives].
            temperature: T.

        Returns:
            A scalar.
        """
        anchor, positive = F.normalize(self.student(s), dim=1), F.normalize(self.teacher(t), dim=1)
        candidates = F.normalize(self.teacher(self.features[drawn].to(s.dtype)), dim=1)
        positive_logits = (anchor * positive).sum(1) / temperature
        logits = anchor @ candidates.T / temperature
        has_labels = (labels[:, None] >= 0) & (self.labels[drawn] >= 0)
        is_negative = torch.where(
            has_labels, labels[:, None] != self.labels[drawn], index[:, None] != self.index[drawn]
        )
        if self.training:  # torch.where instead of `if log_z.isnan()`, which would synchronise with a GPU in each step
            count = is_negative.sum().clamp(min=1).to(logits.dtype)
            log_mean = logits.detach().masked_fill(~is_negative, -torch.inf).logsumexp((0, 1)) - count.log()
            self.log_z.copy_(torch.where(self.log_z.isnan(), log_mean.nan_to_num(neginf=0.0), self.log_z))
        shift = self.log_z + is_negative.sum(1, keepdim=True).clamp(min=1).to(logits.dtype).log()
        negative_terms = (F.logsigmoid(shift - logits) * is_negative).sum(1)
        return -(F.logsigmoid(positive_logits - shift[:, 0]) + negative_terms).mean()
