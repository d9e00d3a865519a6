"""The loss on a teacher's embedding."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import EMBEDDING
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs

from .base import Loss, Ramp
from .kd import teacher_logits, weighted_mean
from .multi_teacher import TeacherParts

_LEAST_NORM = 1e-6
KINDS = ("cosine", "mse", "smooth_l1", "l2")
STANDARDIZE = ("none", "mean", "std", "axes")
PROJECTIONS = ("auto", "linear", "mlp")


class EmbeddingPart(nn.Module):
    """What belongs to the loss: how the teacher's embedding is standardised, and the projection of the student's.

    Args:
        shift: float32 [D], subtracted from the teacher's embedding.
        scale: float32 [D], by which it is divided then.
        axes: float32 [D, D], onto which it is projected in between; None for none.
        projection: student's embedding [B, D_s] -> [B, D]; None where the widths are equal.
    """

    def __init__(
        self, shift: torch.Tensor, scale: torch.Tensor, axes: torch.Tensor | None, projection: nn.Module | None
    ):
        super().__init__()
        self.shift: torch.Tensor
        self.scale: torch.Tensor
        self.axes: torch.Tensor | None
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.register_buffer("axes", axes)
        self.projection = projection

    def standardize(self, rows: torch.Tensor) -> torch.Tensor:
        """Standardise embeddings [B, D]."""
        rows = rows - self.shift.to(rows.dtype)
        if self.axes is not None:
            rows = rows @ self.axes.to(rows.dtype)
        return rows / self.scale.to(rows.dtype)


@dataclass(frozen=True)
class Embed(Loss):
    """Regression of a teacher's embedding.

    loss = mean over the rows of d(p(z_s), f(z_t)), f the standardisation, p the projection. The kinds of d are
    cosine: 1 - cos(a, b); mse: mean over the dimensions of (a - b)²; smooth_l1: of the Huber loss with threshold 1;
    l2: the Euclidean norm of a - b.

    The student's outputs are standardised as the teacher's are, so that a student of the teacher's width learns the
    embedding itself. A projection is trained with the student and thrown away after the training: the student's
    embedding is what it outputs before it.

    Of several teachers the loss is the mean over them, each with its own standardisation and projection.

    Args:
        weight: factor of the term in the sum of losses.
        kind: cosine, mse, smooth_l1 or l2.
        standardize: none; mean: subtract the mean of the teacher's training rows; std: divide each dimension by its
            standard deviation as well; axes: rotate to the principal axes before that, of a cache with --axes.
        projection: auto: none where the student has the teacher's width, else linear; linear; mlp, with one hidden
            layer of the larger width.

    Source: Shang et al. 2024, "Theia" (arXiv 2407.20179, section 3.2); Ranzinger et al. 2024, "AM-RADIO" (arXiv
        2312.06709, section 3.3), for the standardisation and the kinds.
    """

    weight: float | Ramp = 1.0
    kind: str = "cosine"
    standardize: str = "none"
    projection: str = "auto"
    name: ClassVar[str] = "embed"
    tasks: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    is_row_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (("kind", KINDS), ("standardize", STANDARDIZE), ("projection", PROJECTIONS))
        for parameter, names in choices:
            if (value := getattr(self, parameter)) not in names:
                raise UsageError(f"loss 'embed': {parameter}={value}: there are {', '.join(names)}")

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        own, logits = student.logits.shape[1], teacher_logits(student, batch, self.name)
        if logits.ndim == 2:
            return self._build_teacher_part(own, logits.shape[1], context)
        contexts = context.members or (context,) * logits.shape[1]
        return TeacherParts(self._build_teacher_part(own, logits.shape[2], member) for member in contexts)

    def _build_teacher_part(self, own: int, width: int, context: LossContext) -> "EmbeddingPart":
        """Build the part for one teacher, of the width of its statistics, or where there are none of `width`."""
        width = width if context.mean is None else len(context.mean)
        shift, scale, axes = torch.zeros(width), torch.ones(width), None
        if self.standardize != "none":
            if context.mean is None or context.std is None:
                raise UsageError(
                    f"loss 'embed': standardize={self.standardize} needs the statistics of the cache's embedding"
                )
            shift = context.mean
            scale = context.std if self.standardize == "std" else scale
        if self.standardize == "axes":
            if context.axes is None:
                raise UsageError(
                    "loss 'embed': standardize=axes needs the principal axes of the embedding, and the cache has none:"
                    " make it with --axes"
                )
            axes, scale = context.axes, context.axis_std if context.axis_std is not None else scale
        return EmbeddingPart(shift, scale, axes, self._build_projection(own, width))

    def has_projection(self, own: int, width: int) -> bool:
        """Return whether a student's embedding is projected.

        Args:
            own: Width of the student's embedding.
            width: Width of the teacher's.
        """
        return self.projection != "auto" or own != width

    def _build_projection(self, own: int, width: int) -> nn.Module | None:
        if not self.has_projection(own, width):
            return None
        if self.projection == "mlp":
            hidden = max(own, width)
            return nn.Sequential(nn.Linear(own, hidden), nn.GELU(), nn.Linear(hidden, width))
        return nn.Linear(own, width)

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        a, b = student.logits, teacher_logits(student, batch, self.name)
        if isinstance(part, EmbeddingPart):
            b = part.standardize(b[:, : len(part.shift)])
            a = part.standardize(a) if part.projection is None else part.projection(a)
        return weighted_mean(self._measure(a, b), batch)

    def _measure(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distance of each pair of rows [B]."""
        if self.kind == "cosine":
            return 1 - (F.normalize(a, dim=1, eps=_LEAST_NORM) * F.normalize(b, dim=1, eps=_LEAST_NORM)).sum(1)
        if self.kind == "mse":
            return (a - b).square().mean(1)
        if self.kind == "smooth_l1":
            return F.smooth_l1_loss(a, b, reduction="none").mean(1)
        return (a - b).square().sum(1).clamp(min=_LEAST_NORM**2).sqrt()
