"""How a term is led by the teacher's answer: by one, by each of several, or by none where a row has no answer."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.teachers.combine import confidence_weights

from .base import Loss
from .hard import cross_entropy_rows, masked_mean

Term = Callable[[Loss, ModelOutputs, Batch, nn.Module | None], torch.Tensor]


def by_one(loss: Loss, student: ModelOutputs, target: Batch, module: nn.Module | None) -> torch.Tensor:
    """The term as it is."""
    return loss(student, target, module)


def by_each(loss: Loss, student: ModelOutputs, target: Batch, module: nn.Module | None) -> torch.Tensor:
    """The mean of the terms by each teacher. target.logits: [B, M, K]."""
    if not loss.needs_logits or target.logits is None:
        return loss(student, target, module)
    return torch.stack([loss(student, replace(target, logits=z), module) for z in target.logits.unbind(1)]).mean()


def by_trust(loss: Loss, student: ModelOutputs, target: Batch, module: nn.Module | None) -> torch.Tensor:
    """The sum of the terms by each teacher, each row weighed by how right that teacher is about it; see trust."""
    if not loss.needs_logits or target.logits is None:
        return loss(student, target, module)
    each = target.logits.unbind(1)
    said = [cross_entropy_rows(z.float(), target) for z in each]
    weights = confidence_weights(torch.stack([terms for terms, _ in said], 1), said[0][1])
    terms = [
        loss(student, replace(target, logits=z, row_weights=w), module)
        for z, w in zip(each, weights.unbind(1), strict=True)
    ]
    return torch.stack(terms).sum()


def or_hard(term: Term) -> Term:
    """The term over the rows that have an answer, and the cross entropy with the label over those that have none."""

    def heard(loss: Loss, student: ModelOutputs, target: Batch, module: nn.Module | None) -> torch.Tensor:
        if target.logits is None or not (loss.needs_logits or loss.teacher_taps()):
            return term(loss, student, target, module)
        gone = target.logits.flatten(1).isnan().any(1)
        if not gone.any():
            return term(loss, student, target, module)
        lost, kept = gone.nonzero()[:, 0], (~gone).nonzero()[:, 0]
        hard = masked_mean(*cross_entropy_rows(student.logits[lost], target.select(lost)))
        if not len(kept):
            return hard
        soft = term(loss, student.select(kept), target.select(kept), module)
        return (len(kept) * soft + len(lost) * hard) / len(gone)

    return heard
