"""The records that cross the house."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Head:
    """The last linear layer of a network: logits = pooled @ weight.T + bias. weight: [K, D]; bias: [K]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Bank:
    """Rows of a tap to contrast with. features: float16 [M, D]; index, labels: int64 [M], labels -1 where hidden."""

    features: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Known:
    """What is known beside the rows of a batch. Of the teacher: its head, where it has one, and banks by tap; of the
    training rows: counts, int64 [K], those of each class whose labels are visible, None where no row has a label."""

    head: Head | None = None
    bank: Callable[[str], Bank] | None = None
    counts: torch.Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """What a model said about B views. logits: float32 [B, K]; features: {tap: [B, …]}; head: its own, live."""

    logits: torch.Tensor
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    head: Head | None = None


@dataclass(frozen=True)
class TargetBatch:
    """B views and everything that is known about them.

    index:    int64 [B], position in the split
    draw:     which view of them
    views:    uint8 [B, C, S, S], the very pixels that the teacher saw
    labels:   int64 [B], the hard targets, -1 where there is none
    logits:   float32 [B, K] of the teacher, None without a cache
    features: {tap: [B, …]} of the teacher, float16 as cached, float32 in a loss
    partner:  int64 [B], hard target of the mixup partner, None without mixup
    share:    float32 [B], the picture's own share in a mixup view, None without mixup
    """

    index: torch.Tensor
    draw: int
    views: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor | None = None
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    partner: torch.Tensor | None = None
    share: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> "TargetBatch":
        """Rows start to stop, without a copy."""

        def part(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[start:stop]

        return TargetBatch(
            self.index[start:stop],
            self.draw,
            self.views[start:stop],
            self.labels[start:stop],
            part(self.logits),
            {tap: x[start:stop] for tap, x in self.features.items()},
            part(self.partner),
            part(self.share),
        )

    def to(self, device: torch.device) -> "TargetBatch":
        """The same batch on a device."""
        if device.type == "cpu":
            return self

        def move(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return TargetBatch(
            self.index.to(device, non_blocking=True),
            self.draw,
            self.views.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            move(self.logits),
            {tap: x.to(device, non_blocking=True) for tap, x in self.features.items()},
            move(self.partner),
            move(self.share),
        )
