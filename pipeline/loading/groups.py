"""Batches that are prepared in one go: the targets of a window, and the views of a group of batches in it."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.views.draws import Draw
from softcache.pipeline.batch import Targets, TargetSource

Rows = NDArray[np.int64]


class TargetWindow:
    """The targets of the batches of a window, read from the cache in one go when the first of them is needed.

    Args:
        cache: Where the targets are read from.
        taps: The taps whose features are read.
        draws: The k draws of the pass.
        positions: int64 [n], the positions of all batches of the window.
        split: Name of the split.
    """

    def __init__(
        self, cache: TargetSource, taps: tuple[str, ...], draws: tuple[int, ...], positions: Rows, split: str
    ):
        self._cache, self._taps, self._draws, self._positions = cache, taps, draws, positions
        self._split = split

    def read(self, start: int, stop: int) -> Targets:
        """The targets of the positions start to stop - 1 of the window.

        Returns:
            Logits float32 [(stop - start) * k, …] and features {tap: [(stop - start) * k, …]}: the k draws of the
            first position, then those of the next.
        """
        logits, features = self._targets
        k = len(self._draws)
        rows = slice(k * start, k * stop)
        return logits[rows], {tap: x[rows] for tap, x in features.items()}

    @cached_property
    def _targets(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        k = len(self._draws)
        per_draw = [
            self._cache.read_targets(self._split, draw, self._positions, self._taps, k) for draw in self._draws
        ]
        logits = _interleave([logits for logits, _ in per_draw])
        return logits, {tap: _interleave([features[tap] for _, features in per_draw]) for tap in self._taps}


def _interleave(draws: list[torch.Tensor]) -> torch.Tensor:
    """[n * k, …]: the n rows of k draws, row by row. Copied by NumPy, for the reason given at data.views.render."""
    if len(draws) == 1:
        return draws[0]
    rows = np.stack([x.numpy() for x in draws], 1)
    return torch.from_numpy(rows.reshape(-1, *rows.shape[2:]))


@dataclass(frozen=True)
class BatchGroup:
    """Consecutive batches of a window whose views are rendered in one call: k draws of an image, then of the next.

    Attributes:
        draws: The k draws of the pass.
        positions: int64 [n], of the images of all batches of the group.
        index: int64 [n * k], the index in the split of each view's image.
        draw: The draw of each view: one number where k is 1, else int64 [n * k].
        boundaries: Where the batches begin and end among the n * k views: 0, …, n * k.
        window: Where the targets are read from; None for batches without targets.
        first: The place of the group's first position in the window.
    """

    draws: tuple[int, ...]
    positions: Rows
    index: Rows
    draw: Draw
    boundaries: list[int]
    window: TargetWindow | None
    first: int

    @staticmethod
    def create(
        batches: list[Rows],
        draws: tuple[int, ...],
        cache: TargetSource | None,
        window: TargetWindow | None,
        first: int,
        split: str,
    ) -> "BatchGroup":
        """The group of some batches of a split, each given by its positions, int64 [n]."""
        k, positions = len(draws), np.concatenate(batches)
        index = positions if cache is None else cache.index_at(split, positions)
        return BatchGroup(
            draws=draws,
            positions=positions,
            index=np.repeat(index, k),
            draw=draws[0] if k == 1 else np.tile(np.array(draws), len(positions)),
            boundaries=[0, *(k * np.cumsum([len(batch) for batch in batches])).tolist()],
            window=window,
            first=first,
        )

    def select_views(self, rank: int, world: int) -> tuple[Rows, Draw]:
        """Index and draw of the views that a rank renders: of every batch its part, of one rank all."""
        rows = self._select_rows(rank, world)
        return self.index[rows], self.draw if isinstance(self.draw, int) else self.draw[rows]

    def select_positions(self, rank: int, world: int) -> Rows:
        """The positions of the views that a rank renders."""
        return np.repeat(self.positions, len(self.draws))[self._select_rows(rank, world)]

    def _select_rows(self, rank: int, world: int) -> Rows | slice:
        if world == 1:
            return slice(None)
        parts = [(start, get_rank_rows(stop - start, rank, world)) for start, stop in pairwise(self.boundaries)]
        return np.concatenate([np.arange(start + first, start + last) for start, (first, last) in parts])

    def read_targets(self) -> Targets:
        """Logits [n * k, …] and features {tap: [n * k, …]} of all views; None and {} without targets."""
        if self.window is None:
            return None, {}
        return self.window.read(self.first, self.first + len(self.positions))


def get_rank_rows(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Where a rank's rows of a batch begin and end. The parts of two ranks differ by one row at most."""
    return rows * rank // world, rows * (rank + 1) // world
