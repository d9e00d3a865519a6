"""Numbers, batches and one worked case of every loss, as tests of losses share them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from softcache.pipeline.batch import Batch, LinearHead, LossContext, MemoryBank, ModelOutputs
from softcache.pipeline.losses import Loss, parse_losses, resolve_ramps
from softcache.pipeline.losses.feature_base import FeatureLoss
from softcache.pipeline.taps.statistics import compute_statistic, parse_tap

Shape = tuple[int, ...]
PAIRS = (((3, 4, 4), (5, 4, 4)), ((4, 2, 2), (6, 2, 2)))


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """float64 normal numbers."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(B: int, K: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(K, (B,), generator=torch.Generator().manual_seed(seed))


def batch(
    B: int,
    logits: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    features: dict[str, torch.Tensor] | None = None,
    partner: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
) -> Batch:
    """A batch with what a test needs."""
    return Batch(
        index=torch.arange(B),
        draw=0,
        views=torch.zeros(B, 1, 2, 2, dtype=torch.uint8),
        labels=torch.full((B,), -1) if labels is None else labels,
        logits=logits,
        features=features or {},
        partner=partner,
        share=share,
    )


def counts_of(K: int) -> torch.Tensor:
    """Training rows of each class, from 1 to 101, the same for the first classes however many follow."""
    return 1 + torch.arange(K) * 37 % 101


@dataclass
class Case:
    """A loss, a batch with the outputs of student and teacher, and their layers' outputs before any statistic."""

    loss: Any
    logits: torch.Tensor
    student_layers: dict[str, torch.Tensor]
    teacher_layers: dict[str, torch.Tensor]
    target: Batch
    context: LossContext
    head: LinearHead
    part: Any = None

    @property
    def outputs(self) -> ModelOutputs:
        return ModelOutputs(self.logits, features_of(self.student_layers, self.loss.student_taps()), self.head)

    @property
    def teacher_head(self) -> LinearHead:
        assert self.context.head is not None
        return self.context.head

    @property
    def bank(self) -> MemoryBank:
        assert self.context.bank is not None
        return self.context.bank("layer1:pool")

    @property
    def weights(self) -> list[nn.Parameter]:
        """The loss's own trainable numbers."""
        return [] if self.part is None else list(self.part.parameters())

    def value(self) -> torch.Tensor:
        """The term. Rows that `crd` draws are always those of seed 11."""
        torch.manual_seed(11)
        term: torch.Tensor = self.loss(self.outputs, self.target, self.part)
        return term

    def leaves(self) -> list[torch.Tensor]:
        """Return the student's tensors that the loss reads, with requires_grad set."""
        if self.loss.student_taps():
            layers = list(self.student_layers.values())[: len(self.loss.student_taps())]
            if self.loss.name == "cat_kd":
                layers.append(self.head.weight)
            return [x.requires_grad_() for x in layers]
        return [self.logits.requires_grad_()]


def features_of(raw: dict[str, torch.Tensor], taps: Sequence[str]) -> dict[str, torch.Tensor]:
    features = {}
    for tap in taps:
        path, kind = parse_tap(tap)
        features[tap] = compute_statistic(raw[path], kind, path)
    return features


def loss_of(spec: str, layers: str = "layer1+layer2", one_layer: str = "layer1") -> Loss:
    """A loss on these layers where it names none, or on one where it takes one; ramps in the fifth of 10 epochs."""
    (loss,) = parse_losses((spec,))
    if isinstance(loss, FeatureLoss) and not loss.teacher:
        loss = replace(loss, teacher=one_layer if loss.single_layer else layers)
    return resolve_ramps(loss, 4, 10)


def case(
    spec: str,
    B: int = 5,
    K: int = 10,
    pairs: Sequence[tuple[Shape, Shape]] = PAIRS,
    labels: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 2.0,
) -> Case:
    """A loss with B rows of K classes; pairs: shape of each layer in the student and in the teacher."""
    loss = loss_of(spec)

    def random(*shape: int, salt: int, scale: float = scale) -> torch.Tensor:
        return numbers(*shape, seed=100 * seed + salt, scale=scale).to(dtype)

    student_layers = {f"layer{i + 1}": random(B, *shape, salt=10 + i) for i, (shape, _) in enumerate(pairs)}
    teacher_layers = {f"layer{i + 1}": random(B, *shape, salt=20 + i) for i, (_, shape) in enumerate(pairs)}
    if loss.name == "simkd":
        student_layers = {"projector": random(B, pairs[0][1][0], *pairs[0][0][1:], salt=10)}
    labels = labels_of(B, K) if labels is None else labels
    width, own_width = pairs[0][1][0], pairs[0][0][0]
    rows = MemoryBank(random(40, width, salt=30).half(), torch.arange(40) % (B + 3), labels_of(40, K, seed=8))
    rows.labels[::7] = -1
    context = LossContext(LinearHead(random(K, width, salt=31), random(K, salt=32)), lambda tap: rows, counts_of(K))
    head = LinearHead(random(K, own_width, salt=33), random(K, salt=34))
    target = batch(B, random(B, K, salt=2), labels, features_of(teacher_layers, loss.teacher_taps()))
    example = Case(loss, random(B, K, salt=1), student_layers, teacher_layers, target, context, head)
    torch.manual_seed(3)
    part = loss.build_part(example.outputs, target, context)
    example.part = None if part is None else part.to(dtype)
    return example
