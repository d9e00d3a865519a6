"""The records that cross the house."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.device_views import copy_to_device

Targets = tuple[torch.Tensor | None, dict[str, torch.Tensor]]  # logits and features of some rows, as in TargetBatch


class TargetSource(Protocol):
    """Where targets come from: a cache, or several as one teacher. together: draws that are read side by side."""

    def row_order(self, split: str) -> NDArray[np.int64]: ...

    def index_at(self, split: str, positions: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def fits_in_memory(self, split: str, draw: int, taps: tuple[str, ...] = (), together: int = 1) -> bool: ...

    def read_targets(
        self, split: str, draw: int, positions: NDArray[np.int64], taps: tuple[str, ...] = (), together: int = 1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class LinearHead:
    """The last linear layer of a network: logits = pooled @ weight.T + bias. weight: [K, D]; bias: [K]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class MemoryBank:
    """Rows of a tap to contrast with. features: float16 [M, D]; index, labels: int64 [M], labels -1 where hidden."""

    features: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class LossContext:
    """What is known beside the rows of a batch. Of the teacher: its head, where it has one, and banks by tap; of the
    training rows: counts, int64 [K], those of each class whose labels are visible."""

    head: LinearHead | None = None
    bank: Callable[[str], MemoryBank] | None = None
    counts: torch.Tensor | None = None


@dataclass(frozen=True)
class ModelOutputs:
    """What a model said about B views. logits: float32 [B, K]; features: {tap: [B, …]}; head: its own, live."""

    logits: torch.Tensor
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    head: LinearHead | None = None

    def select(self, rows: torch.Tensor) -> "ModelOutputs":
        """Rows int64 [n] of the batch."""
        return ModelOutputs(self.logits[rows], {tap: x[rows] for tap, x in self.features.items()}, self.head)


@dataclass(frozen=True)
class Batch:
    """B views and everything that is known about them.

    index:    int64 [B], position in the split
    draw:     which view of them: one number, or int64 [B] where rows are of several draws
    views:    uint8 [B, C, S, S], the very pixels that the teacher saw
    labels:   int64 [B], the hard targets, -1 where there is none
    logits:   float32 [B, K] of the teacher, None without a cache; [B, M, K] where M teachers are each heard by
              themselves; NaN in a row that the cache lacks
    features: {tap: [B, …]} of the teacher, float16 as cached, float32 in a loss
    partner:  int64 [B], hard target of the mixup partner, None without mixup
    share:    float32 [B], the image's own share in a mixup view, None without mixup
    trust:    float32 [B], what the rows of a term weigh, None where all weigh 1
    """

    index: torch.Tensor
    draw: int | torch.Tensor
    views: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor | None = None
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    partner: torch.Tensor | None = None
    share: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None

    def slice(self, start: int, stop: int) -> "Batch":
        """Rows start to stop, without a copy."""
        return self._map(lambda x: x[start:stop])

    def select(self, rows: torch.Tensor) -> "Batch":
        """Rows int64 [n] of the batch, copied."""
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, without waiting for it."""
        return self if self.index.device.type == device.type else self._map(lambda x: copy_to_device(x, device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        def maybe(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else change(x)

        draw = self.draw if isinstance(self.draw, int) else change(self.draw)
        return Batch(
            change(self.index),
            draw,
            change(self.views),
            change(self.labels),
            maybe(self.logits),
            {tap: change(x) for tap, x in self.features.items()},
            maybe(self.partner),
            maybe(self.share),
            maybe(self.row_weights),
        )
