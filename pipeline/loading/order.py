"""The order of a training: which rows, in which draws, make up each batch.

An epoch uses every row once, in one draw. With k draws per decode, k epochs are one pass: every row once, in k draws,
so that an image is decoded once for k views ("Augment your batch", Hoffer et al. 2020, arXiv 1901.09335).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.sampling import SAMPLERS, resample_rows
from softcache.data.tasks import HardTargets
from softcache.pipeline.batch import TargetSource

Rows = NDArray[np.int64]
BLOCK_ROWS, WINDOW_BLOCKS = 64, 64  # of targets on disk: rows read as one block, and blocks shuffled with one another
_PART_ROWS = 64 * BLOCK_ROWS * WINDOW_BLOCKS  # of a pass, whose order is computed at once: 2 MB
_SHUFFLE, _DRAW, _SAMPLE = 40, 41, 42  # what a random number is for


@dataclass(frozen=True)
class EpochOrder:
    """The seeded order of the rows of a training.

    The rows of a step depend on (seed, step) alone. So a training can begin at any step, and one that was interrupted
    resumes to the same weights.

    Args:
        seed: Seed of the order; the views have their own.
        rows: int64 [N], the positions that are used, in any order.
        labels: The hard targets of each index of the split. Only a sampler reads them: the class, int64.
        batch_size: Views per batch, a multiple of draws_per_decode.
        draws: Number of draws; 0 for a new draw in every epoch.
        draws_per_decode: k, the draws of each decoded image; it divides draws.
        sampler: A name of SAMPLERS. An epoch then has N rows drawn by class, some of them more than once, and every
            row needs a label. Empty: every row once.
        cache: Where the targets are read from; None without a cache.
        split: Name of the split in the cache.
    """

    seed: int
    rows: Rows
    labels: HardTargets
    batch_size: int
    draws: int
    draws_per_decode: int
    sampler: str
    cache: TargetSource | None
    split: str = "train"

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches with N views in all. For k = 1 their sizes differ by at most one row: none has 1 row left
        over."""
        return -(-len(self.rows) // self.batch_size)

    def batches(self, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], list[Rows]]]:
        """Yield the batches of the steps start to stop - 1, those of one pass at a time.

        Of a long pass that is read from disk, they come in parts: its order as a whole takes 16 bytes a row.

        Yields:
            The k draws of the pass, and of each batch the positions, int64 [n]. A batch has the n * k views of these
            positions in these draws.
        """
        steps_per_pass, step = self.draws_per_decode * self.steps_per_epoch, start
        while step < stop:
            pass_number, first = divmod(step, steps_per_pass)
            draws, shuffled = self.select_draws(pass_number), self._shuffle_pass(pass_number)
            length = len(self.rows)
            batches_per_part = steps_per_pass
            if isinstance(shuffled, ShuffledBlocks):
                batches_per_part = max(1, _PART_ROWS * steps_per_pass // length)
            last = min(first + stop - step, steps_per_pass)
            for begin in range(first, last, batches_per_part):
                end = min(begin + batches_per_part, last)
                bounds = [_find_bound(i, length, steps_per_pass) for i in range(begin, end + 1)]
                part = shuffled[bounds[0] : bounds[-1]]
                yield draws, [part[i - bounds[0] : j - bounds[0]] for i, j in pairwise(bounds)]
            step += last - first

    def select_draws(self, pass_number: int) -> tuple[int, ...]:
        """The k draws of a pass. They differ, because k divides the number of draws."""
        k = self.draws_per_decode
        return tuple(self.select_draw(epoch) for epoch in range(k * pass_number, k * pass_number + k))

    def select_draw(self, epoch: int) -> int:
        """The draw of an epoch: all draws come once in a seeded order, then once more in another one."""
        if self.draws == 0:
            return epoch
        cycle, place = divmod(epoch, self.draws)
        return int(rng.permutation((self.seed, _DRAW, cycle), self.draws)[place])

    def shuffle_rows(self, pass_number: int) -> Rows:
        """The positions of a pass, in their order.

        Rows in memory are shuffled freely. Of rows on disk, blocks of 64 neighbours are shuffled, then the rows inside
        every 64 such blocks: reads stay long, and memory bounded.
        """
        return self._shuffle_pass(pass_number)[:]

    def _shuffle_pass(self, pass_number: int) -> "Rows | ShuffledBlocks":
        """The positions of a pass in their order, of rows on disk in a form that is computed where it is needed."""
        key, rows = (self.seed, _SHUFFLE, pass_number), self._sample_rows(pass_number)
        draws = self.select_draws(pass_number)
        if self.fits_in_memory(draws):
            return rows[rng.permutation(key, len(rows))]
        return ShuffledBlocks(key, rows, max(1, WINDOW_BLOCKS // len(draws)))

    def fits_in_memory(self, draws: tuple[int, ...]) -> bool:
        """Whether the logits of these draws are read from memory, not from disk.

        Taps are left out of account: a student's order of rows must not depend on what else is read.
        """
        cache = self.cache
        return cache is None or all(cache.fits_in_memory(self.split, draw, (), len(draws)) for draw in draws)

    def _sample_rows(self, pass_number: int) -> Rows:
        """The positions of a pass, before they are shuffled."""
        if not self.sampler:
            return self.rows
        index = self.rows if self.cache is None else self.cache.index_at(self.split, self.rows)
        key = (self.seed, _SAMPLE, pass_number)
        return self.rows[resample_rows(self.labels[index], SAMPLERS[self.sampler], key)]


class ShuffledBlocks:
    """Rows in the order of shuffled blocks, of which a slice computes only the windows that it meets.

    Args:
        key: Of the random numbers.
        rows: int64 [N], in any order.
        width: Blocks of a window, inside which the rows are shuffled.
    """

    def __init__(self, key: tuple[int, ...], rows: Rows, width: int):
        self._key, self._width = key, width
        self._rows = rows if (rows[1:] >= rows[:-1]).all() else np.sort(rows)
        self._blocks = -(-len(rows) // BLOCK_ROWS)
        self._order = rng.permutation(key, self._blocks)
        long_blocks = len(rows) % self._blocks  # the first ones, with a row more than the others
        lengths = len(rows) // self._blocks + (self._order < long_blocks)
        self._ends = np.cumsum(np.add.reduceat(lengths, np.arange(0, self._blocks, width)))  # of the windows

    def __getitem__(self, places: slice) -> Rows:
        """The positions from one place of the order to another one."""
        start, stop, _ = places.indices(len(self._rows))
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop))
        windows = [self._make_window(window) for window in range(first, min(last + 1, len(self._ends)))]
        offset = int(self._ends[first - 1]) if first else 0
        return np.concatenate([self._rows[:0], *windows])[start - offset : stop - offset]

    def _make_window(self, window: int) -> Rows:
        blocks = self._order[window * self._width : (window + 1) * self._width].tolist()
        bounds = [[_find_bound(i, len(self._rows), self._blocks) for i in (block, block + 1)] for block in blocks]
        rows = np.concatenate([self._rows[start:stop] for start, stop in bounds])
        return rows[rng.permutation((*self._key, window), len(rows))]


def _find_bound(part: int, length: int, parts: int) -> int:
    """Where a part begins, of rows that are cut into parts as by np.array_split: the first are a row longer."""
    return part * (length // parts) + min(part, length % parts)


@dataclass(frozen=True)
class SequentialOrder:
    """The rows of a held-out split as they are given, in draw 0, the same in every epoch.

    Args:
        rows: int64 [N], the positions that are used, in their order.
        batch_size: The most views of a batch. Batches differ by one row at most, so that none is too small to be
            divided among ranks.
        cache: Where the targets are read from.
        split: Name of the split in the cache.
    """

    rows: Rows
    batch_size: int
    cache: TargetSource | None
    split: str

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def batches(self, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], list[Rows]]]:
        """Yield as `EpochOrder.batches`."""
        step = start
        while step < stop:
            first = step % self.steps_per_epoch
            batches = np.array_split(self.rows, self.steps_per_epoch)[first : first + stop - step]
            yield (0,), batches
            step += len(batches)

    def fits_in_memory(self, draws: tuple[int, ...]) -> bool:
        """Whether the logits are read from memory, not from disk."""
        return self.cache is None or self.cache.fits_in_memory(self.split, 0)
