"""What the rows of the table of losses have in common, and the knobs that change during training."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn

from ..records import Outputs, TargetBatch


@dataclass(frozen=True)
class Ramp:
    """A numeric knob that runs from start to end, linear over the training."""

    start: float
    end: float

    def at(self, progress: float) -> float:
        """The value at progress 0 … 1."""
        return self.start + (self.end - self.start) * progress


def fixed(knob: float | Ramp) -> float:
    """The value of a knob whose ramps have been resolved; a ramp left in is a mistake of ours."""
    if isinstance(knob, Ramp):
        raise TypeError(f"ramp {knob} was not resolved for this epoch")
    return knob


class Loss(Protocol):
    """A term of what a student minimises. weight multiplies it in the sum that goes backward."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool]
    needs_logits: ClassVar[bool]

    @property
    def weight(self) -> float | Ramp: ...

    def teacher_taps(self) -> tuple[str, ...]:
        """Cached features that the loss reads."""
        return ()

    def student_taps(self) -> tuple[str, ...]:
        """Layers of the student that the loss reads."""
        return ()

    def module(self, student: Outputs, target: TargetBatch) -> nn.Module | None:
        """The loss's own trainable part, made from one example of each; None where it has none."""
        return None

    def __call__(self, student: Outputs, target: TargetBatch, module: nn.Module | None) -> torch.Tensor:
        """The unweighted term, a float32 scalar."""
        ...
