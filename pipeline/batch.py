"""The records that pass between packages: batches, outputs of models, and what a loss may know besides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.views.on_device import copy_to_device

Targets = tuple[torch.Tensor | None, dict[str, torch.Tensor]]  # logits and features of some rows, as in Batch


class TargetSource(Protocol):
    """Where targets come from: a cache, or several as one teacher.

    Positions number the rows of a split in the order in which they are stored; the index is a row's number in the
    transfer set. `together` is the number of draws that are read in turn, and so are in memory at the same time.
    """

    def row_order(self, split: str) -> NDArray[np.int64]:
        """int64 [N]: the index of each position."""

    def index_at(self, split: str, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]: the index of each of the positions [n]."""

    def fits_in_memory(self, split: str, draw: int, taps: tuple[str, ...] = (), together: int = 1) -> bool:
        """Whether the targets of a draw are read into memory once, and not row by row from disk."""

    def read_targets(
        self, split: str, draw: int, positions: NDArray[np.int64], taps: tuple[str, ...] = (), together: int = 1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits float32 [n, K] (or [n, M, K], see Batch) and features {tap: [n, …]} at positions [n]."""


@dataclass(frozen=True)
class LinearHead:
    """The last linear layer of a network: logits = pooled @ weight.T + bias.

    Attributes:
        weight: float32 [K, D].
        bias: float32 [K].
    """

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class MemoryBank:
    """Cached features of many rows, the candidates of a contrastive loss.

    Attributes:
        features: float16 [M, D], one tap of the teacher.
        index: int64 [M], the index of each row.
        labels: The hard targets, as of Batch.
    """

    features: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class LossContext:
    """What a loss may know besides the rows of a batch.

    Attributes:
        head: The teacher's last linear layer, where it has one.
        bank: Returns the memory bank of a tap of the teacher; None without a cache.
        counts: int64 [K], the number of training rows with a visible label of each class; of several labels, of the
            rows that have each.
        known: int64 [K], of several labels: the number of training rows in which each is visible, 0 or 1.
        mean, std: float32 [K], of each output: of numbers, of their visible hard targets in the training rows, or of
            the teacher's numbers where there are none; of an embedding, of the teacher's outputs.
        axes, axis_std: float32 [K, K], the principal axes of an embedding, its columns, and float32 [K], the standard
            deviation along each, where the cache keeps them.
        members: Of several teachers of embeddings the statistics of each, with its width as that of `mean`.
    """

    head: LinearHead | None = None
    bank: Callable[[str], MemoryBank] | None = None
    counts: torch.Tensor | None = None
    known: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None
    axes: torch.Tensor | None = None
    axis_std: torch.Tensor | None = None
    members: tuple["LossContext", ...] = ()


@dataclass(frozen=True)
class ModelOutputs:
    """What a model outputs for B views.

    Attributes:
        logits: float32 [B, K].
        features: {tap: [B, …]}, the outputs of its tapped layers.
        head: Its last linear layer, with gradients, where a loss needs it.
    """

    logits: torch.Tensor
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    head: LinearHead | None = None

    def select(self, rows: torch.Tensor) -> "ModelOutputs":
        """Return the outputs for some of the views.

        Args:
            rows: int64 [n], or bool [B].
        """
        return ModelOutputs(self.logits[rows], {tap: x[rows] for tap, x in self.features.items()}, self.head)


class BatchSource(Protocol):
    """What the batches of one loader have in common."""

    @property
    def task(self) -> str:
        """What the hard targets and the teacher's outputs are, see data/tasks.py."""

    @property
    def codec(self) -> tuple[str, str]:
        """Name and kind of the codec of the teacher's logits, see pipeline/cache/codecs.py."""

    @property
    def fingerprint(self) -> str:
        """What identifies the cache, or the caches."""

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        """The input of a network, float32 [B, C, H, W], from views uint8 [B, C, S, S]."""

    def make_context(self, losses: Sequence[Any]) -> LossContext:
        """What some losses may use besides the rows of a batch."""


@dataclass(frozen=True)
class Batch:
    """B views with their labels and the teacher's outputs for them.

    Attributes:
        index: int64 [B], the row of the split that each view shows.
        draw: Which view of it: one number, or int64 [B] where the batch has several draws.
        views: uint8 [B, C, S, S], the same pixels as the teacher's input.
        labels: The hard targets: int64 [B], the class, -1 where there is none; of several labels int8 [B, K] of 0, 1,
            and -1 where unknown; of numbers float32 [B, D], NaN where unknown.
        logits: float32 [B, K] of the teacher, of other tasks its numbers or its embedding; [B, M, K] where M teachers
            are not combined, embeddings of several widths with zeros behind the narrower ones; NaN in rows that
            are missing in the cache; None without targets.
        features: {tap: [B, …]} of the teacher; float32 of the `taps` of `Cache.loader`.
        partner: The hard targets of the images that are mixed in; None where views are not mixed.
        share: float32 [B] in 0 … 1, the share of the view's own image; None where views are not mixed.
        row_weights: float32 [B], the weight of each row in a term; None for 1 each.
        source: What the batches of one loader have in common; None for a batch of another origin.
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
    source: BatchSource | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        """Return B, the number of views."""
        return len(self.index)

    @cached_property
    def images(self) -> torch.Tensor:
        """The views normalised as the input of the teacher, float32 [B, C, H, W]; computed when first read.

        Raises:
            UsageError: The batch does not come from a loader of a cache.
        """
        if self.source is None:
            raise UsageError(
                "this batch has views alone: its images are normalised by the loader of a softcache.Cache"
            )
        return self.source.prepare_input(self.views)

    def slice(self, start: int, stop: int) -> "Batch":
        """Return some rows in a sequence, which share memory with this batch.

        Args:
            start: The first row, from 0.
            stop: The row after the last one.
        """
        return self._map(lambda x: x[start:stop])

    def select(self, rows: torch.Tensor) -> "Batch":
        """Return a copy of some rows.

        Args:
            rows: int64 [n], or bool [B].
        """
        return self._map(lambda x: x[rows])

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU copies it while the CPU goes on."""
        return self._map(lambda x: x.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> "Batch":
        """Return the batch on a device; itself where it is there already.

        Args:
            device: The device. A copy to a GPU is started and not waited for.
            non_blocking: Accepted for code that passes it to a tensor; nothing is waited for in either case.
        """
        target, current = torch.device(device), self.index.device
        if target.type == current.type and target.index in (None, current.index):
            return self
        return self._map(lambda x: copy_to_device(x, target))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with a function applied to each of its tensors."""

        def apply(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else function(x)

        return Batch(
            index=function(self.index),
            draw=self.draw if isinstance(self.draw, int) else function(self.draw),
            views=function(self.views),
            labels=function(self.labels),
            logits=apply(self.logits),
            features={tap: function(x) for tap, x in self.features.items()},
            partner=apply(self.partner),
            share=apply(self.share),
            row_weights=apply(self.row_weights),
            source=self.source,
        )
