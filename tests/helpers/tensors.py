"""Random tensors, batches, and a case of every loss with its inputs, for the tests of losses."""

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


def draw_normal(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Draw float64 normal numbers."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_labels(B: int, K: int, seed: int = 5) -> torch.Tensor:
    """Draw B labels of K classes."""
    return torch.randint(K, (B,), generator=torch.Generator().manual_seed(seed))


def make_batch(
    B: int,
    logits: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    features: dict[str, torch.Tensor] | None = None,
    partner: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
) -> Batch:
    """Make a batch of B rows. Labels are -1 (hidden) by default."""
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


def make_class_counts(K: int) -> torch.Tensor:
    """Return the training rows of each class, 1 to 101. The first classes have the same numbers for every K."""
    return 1 + torch.arange(K) * 37 % 101


@dataclass
class Case:
    """A loss and its inputs.

    Attributes:
        loss: the loss.
        logits: of the student, [B, K].
        student_layers: {layer: full output of the student}, before any statistic is computed.
        teacher_layers: the same of the teacher.
        target: the batch, with the teacher's logits and features.
        context: the teacher's head, its memory bank and the class counts.
        head: last layer of the student.
        part: trainable parts of the loss.
    """

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
        return ModelOutputs(self.logits, compute_features(self.student_layers, self.loss.student_taps()), self.head)

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
        """The trainable parameters of the loss."""
        return [] if self.part is None else list(self.part.parameters())

    def value(self) -> torch.Tensor:
        """Compute the term. The rows that `crd` draws are always those of seed 11."""
        torch.manual_seed(11)
        term: torch.Tensor = self.loss(self.outputs, self.target, self.part)
        return term

    def leaves(self) -> list[torch.Tensor]:
        """Return the student's outputs that the loss reads, with requires_grad set."""
        if self.loss.student_taps():
            leaves = list(self.student_layers.values())[: len(self.loss.student_taps())]
            if self.loss.name == "cat_kd":
                leaves.append(self.head.weight)
            return [x.requires_grad_() for x in leaves]
        return [self.logits.requires_grad_()]


def compute_features(raw: dict[str, torch.Tensor], taps: Sequence[str]) -> dict[str, torch.Tensor]:
    """Compute the statistic of each tap from {layer: full output}."""
    features = {}
    for tap in taps:
        path, kind = parse_tap(tap)
        features[tap] = compute_statistic(raw[path], kind, path)
    return features


def make_loss(spec: str, layers: str = "layer1+layer2", one_layer: str = "layer1") -> Loss:
    """Parse a loss, with its ramps at epoch 5 of 10.

    A loss between layers whose spec names none gets `layers`, or `one_layer` where it takes a single one.
    """
    (loss,) = parse_losses((spec,))
    if isinstance(loss, FeatureLoss) and not loss.teacher:
        loss = replace(loss, teacher=one_layer if loss.single_layer else layers)
    return resolve_ramps(loss, 4, 10)


def make_case(
    spec: str,
    B: int = 5,
    K: int = 10,
    pairs: Sequence[tuple[Shape, Shape]] = PAIRS,
    labels: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 2.0,
) -> Case:
    """Make a loss with random inputs: B rows of K classes.

    Args:
        spec: of the loss.
        B: rows.
        K: classes.
        pairs: (shape in the student, shape in the teacher) of each layer, without the batch.
        labels: [B]; drawn by default.
        dtype: of all inputs.
        seed: of all inputs.
        scale: standard deviation of the numbers.
    """
    loss = make_loss(spec)

    def draw(*shape: int, salt: int, scale: float = scale) -> torch.Tensor:
        return draw_normal(*shape, seed=100 * seed + salt, scale=scale).to(dtype)

    names = [f"layer{i}" for i in range(1, len(pairs) + 1)]
    student_layers = {
        name: draw(B, *shape, salt=10 + i) for i, (name, (shape, _)) in enumerate(zip(names, pairs, strict=True))
    }
    teacher_layers = {
        name: draw(B, *shape, salt=20 + i) for i, (name, (_, shape)) in enumerate(zip(names, pairs, strict=True))
    }
    if loss.name == "simkd":
        student_layers = {"projector": draw(B, pairs[0][1][0], *pairs[0][0][1:], salt=10)}
    labels = draw_labels(B, K) if labels is None else labels
    teacher_width, student_width = pairs[0][1][0], pairs[0][0][0]
    rows = MemoryBank(draw(40, teacher_width, salt=30).half(), torch.arange(40) % (B + 3), draw_labels(40, K, seed=8))
    rows.labels[::7] = -1
    context = LossContext(
        LinearHead(draw(K, teacher_width, salt=31), draw(K, salt=32)), lambda tap: rows, make_class_counts(K)
    )
    head = LinearHead(draw(K, student_width, salt=33), draw(K, salt=34))
    target = make_batch(B, draw(B, K, salt=2), labels, compute_features(teacher_layers, loss.teacher_taps()))
    case = Case(loss, draw(B, K, salt=1), student_layers, teacher_layers, target, context, head)
    torch.manual_seed(3)
    part = loss.build_part(case.outputs, target, context)
    case.part = None if part is None else part.to(dtype)
    return case
