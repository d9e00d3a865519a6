"""Transfer set (+ cache) -> TargetBatch, in a seeded order, prepared ahead of time.

Round r shows every row once, in one draw. With k draws per decode, k rounds are one lap: every row once, in k draws at
once, so that a image is decoded once for k views ("Augment your batch", Hoffer et al. 2020, arXiv 1901.09335). Which
rows make up step s depends on (seed, s) alone, so that a training can begin at any step: that is how it resumes to the
same weights.
"""

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.sampling import SAMPLERS, resample_rows
from softcache.data.transfer_set import Labels, Split
from softcache.data.views import Draw, ImageSource, ViewPolicy, draw_mixup, render
from softcache.pipeline.batch import Batch, Targets, TargetSource

from .device_cache import DeviceCache, fits_on_device
from .prefetch import Renderer, map_in_workers, prefetch

Rows = NDArray[np.int64]
_BLOCK, _BLOCKS = 64, 64  # rows read together, and how many such blocks are mixed, when a draw is on disk
_GROUP_BYTES = 8 << 20  # of pixels rendered at once: fewer, larger calls for small images


@dataclass(frozen=True)
class Stream:
    """What a training reads. split: images and labels; views with seed: what is seen of them.

    order_seed: of the order, not of the views. labels [N]: hard targets, -1 where hidden. rows: positions that
    are used, in any order. draws: how many views there are, 0 for a new one each round (no cache).
    cache, taps: where targets come from, unless targets is false: then only its order is used.
    workers: processes that decode a folder; 0 decodes in this one, in a thread. sampler: of SAMPLERS; a round then
    shows as many rows, some more than once; every row has a label. draws_per_decode: k, which divides draws and
    batch_size. device: where batches are wanted; resident_on: where images in memory and targets are to lie; None is
    for a GPU, where it is the device and they fit. rank, world: of every batch only the views of this rank's rows are
    rendered, those of `part`; all else is of the whole batch.
    """

    split: Split
    views: ViewPolicy
    view_seed: int
    order_seed: int
    batch_size: int
    labels: Labels
    rows: Rows
    draws: int = 0
    cache: TargetSource | None = None
    taps: tuple[str, ...] = ()
    read_targets: bool = True
    workers: int = 0
    start_method: str | None = None
    sampler: str = ""
    draws_per_decode: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    resident_device: torch.device | None = None
    rank: int = 0
    world: int = 1

    @property
    def steps_per_round(self) -> int:
        """Batches that show as many views as there are rows. Where k is 1, batches differ by one row at most: none is
        a leftover of 1."""
        return -(-len(self.rows) // self.batch_size)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start to stop, on the device. A thread prepares them ahead or, for a folder, processes
        do; where all of it lies on the device nobody needs to.
        """
        if self._device_cache is not None:
            groups = self._gathered(self._device_cache, start, stop)
        else:
            groups = self._by_processes(start, stop) if self.workers else prefetch(self._here(start, stop))
        try:
            for group, cuts in groups:
                seen = 0
                for a, b in pairwise(cuts):
                    batch = group.slice(a, b)
                    if self.world > 1:
                        first, last = rank_rows(b - a, self.rank, self.world)
                        batch = replace(batch, views=group.views[seen : (seen := seen + last - first)])
                    yield batch
        finally:
            groups.close()

    def draw_of_round(self, round_: int) -> int:
        """Which draw a round shows: a seeded permutation of all draws, then another one."""
        if self.draws == 0:
            return round_
        cycle, place = divmod(round_, self.draws)
        return int(rng.permutation((self.order_seed, 41, cycle), self.draws)[place])

    @cached_property
    def _device_cache(self) -> DeviceCache | None:
        """What lies on a device, where it does. It stays there from one call of batches to the next."""
        cache = self.cache if self.read_targets else None
        of = (self.split.images, self.views, cache, self.draws, self.taps)
        place = self.resident_device or (self.device if fits_on_device(*of, self.device) else None)
        return None if place is None else DeviceCache(*of, place)

    def _here(self, start: int, stop: int) -> Iterator[tuple[Batch, list[int]]]:
        for group in self._groups(start, stop):
            views = render(self.split.images, self.views, self.view_seed, *group.shown)
            yield self._join(group, views, group.targets()).to(self.device), group.cuts

    def _by_processes(self, start: int, stop: int) -> Generator[tuple[Batch, list[int]], None, None]:
        """Only pixels come from the processes; targets are read in this one."""
        under_way: deque[_Group] = deque()

        def noted() -> Iterator[tuple[Rows, Draw]]:
            for group in self._groups(start, stop):
                under_way.append(group)
                yield group.shown

        renderer = Renderer(self.split.images, self.views, self.view_seed)
        for views in map_in_workers(renderer, noted(), self.workers, self.start_method):
            group = under_way.popleft()
            yield self._join(group, views, group.targets()).to(self.device), group.cuts

    def _gathered(self, there: DeviceCache, start: int, stop: int) -> Generator[tuple[Batch, list[int]], None, None]:
        """Pixels and targets from where they lie on a device."""
        for group in self._groups(start, stop):
            views = there.views(self.view_seed, *group.shown)
            targets = there.targets(group.positions, group.draws)
            yield self._join(group, views, targets).to(there.device), group.cuts

    def _groups(self, start: int, stop: int) -> Iterator["_Group"]:
        """Whole batches, as many together as fit _GROUP_BYTES of pixels; their targets are read by the window."""
        per_lap, step = self.draws_per_decode * self.steps_per_round, start
        pixels = 3 * (self.views.size or 1) ** 2
        together = max(1, _GROUP_BYTES // (pixels * self.batch_size))
        while step < stop:
            lap, first = divmod(step, per_lap)
            draws = self._draws_of(lap)
            batches = np.array_split(self._lap(lap), per_lap)[first : first + stop - step]
            step += len(batches)
            long = together if self._in_memory(draws) else max(together, _BLOCK * _BLOCKS // self.batch_size)
            for w in range(0, len(batches), long):
                window = _Window(self, draws, np.concatenate(batches[w : w + long]))
                at = 0
                for g in range(w, min(w + long, len(batches)), together):
                    lengths = [len(b) for b in batches[g : min(g + together, w + long)]]
                    yield _Group(window, at, [0, *np.cumsum(lengths).tolist()])
                    at += sum(lengths)

    def _draws_of(self, lap: int) -> tuple[int, ...]:
        """The draws of a lap. k divides draws, so that they differ."""
        k = self.draws_per_decode
        return tuple(self.draw_of_round(round_) for round_ in range(k * lap, k * lap + k))

    def _in_memory(self, draws: tuple[int, ...]) -> bool:
        cache = self.cache
        return cache is None or all(cache.fits_in_memory("train", draw, (), len(draws)) for draw in draws)

    def _lap(self, lap: int) -> Rows:
        """Positions of a lap in the order in which they are shown."""
        key, rows, draws = (self.order_seed, 40, lap), self._sampled(lap), self._draws_of(lap)
        if self._in_memory(draws):
            return rows[rng.permutation(key, len(rows))]
        # Shuffled blocks, then shuffled inside windows of 64 of them: bounded memory, long reads.
        blocks = np.array_split(np.sort(rows), -(-len(rows) // _BLOCK))
        shuffled = [blocks[b] for b in rng.permutation(key, len(blocks))]
        width = max(1, _BLOCKS // len(draws))
        windows = [np.concatenate(shuffled[w : w + width]) for w in range(0, len(shuffled), width)]
        return np.concatenate([w[rng.permutation((*key, i), len(w))] for i, w in enumerate(windows)])

    def _sampled(self, lap: int) -> Rows:
        """The positions of a lap, in no order yet."""
        if not self.sampler:
            return self.rows
        index = self.rows if self.cache is None else self.cache.index_at("train", self.rows)
        return self.rows[resample_rows(self.labels[index], SAMPLERS[self.sampler], (self.order_seed, 42, lap))]

    def _join(self, group: "_Group", views: torch.Tensor, targets: Targets) -> Batch:
        index, draw = group.index, group.draw
        partner = share = None
        if self.views.mixup > 0:
            other, w = draw_mixup(self.views, self.view_seed, index, draw, len(self.split))
            partner, share = torch.from_numpy(self.labels[other]), torch.from_numpy(w / 256).float()
        return Batch(
            torch.from_numpy(index),
            draw if isinstance(draw, int) else torch.from_numpy(draw),
            views,
            torch.from_numpy(self.labels[index]),
            *targets,
            partner,
            share,
        )


def rank_rows(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Where a rank's rows of a batch begin and end; the parts of two ranks differ by one row at most."""
    return rows * rank // world, rows * (rank + 1) // world


class _Window:
    """Positions [n] whose targets in k draws are read in one go, when the first of them is asked for."""

    def __init__(self, stream: Stream, draws: tuple[int, ...], positions: Rows):
        self.stream, self.draws, self.positions = stream, draws, positions
        cache = stream.cache
        self.index = positions if cache is None else cache.index_at("train", positions)
        self._targets: Targets | None = None

    def targets(self) -> Targets:
        """Row by row: logits [n * k, …], features {tap: [n * k, …]}."""
        cache, k = self.stream.cache, len(self.draws)
        if cache is None or not self.stream.read_targets:
            return None, {}
        if self._targets is None:
            taps = self.stream.taps
            read = [cache.read_targets("train", draw, self.positions, taps, k) for draw in self.draws]
            logits = _side_by_side([z for z, _ in read])
            self._targets = logits, {tap: _side_by_side([features[tap] for _, features in read]) for tap in taps}
        return self._targets


def _side_by_side(draws: list[torch.Tensor]) -> torch.Tensor:
    """[n * k, …]: the n rows of each of k draws, row by row. By NumPy: see views.render."""
    if len(draws) == 1:
        return draws[0]
    rows = np.stack([x.numpy() for x in draws], 1)
    return torch.from_numpy(rows.reshape(-1, *rows.shape[2:]))


class _Group:
    """Some whole batches of a window, rendered in one call: of each image its k draws, then of the next.

    index [n * k]; draw: theirs, one number where k is 1; positions [n]. cuts: where in it batches begin and end.
    """

    def __init__(self, window: _Window, at: int, images: list[int]):
        """pictures: where batches begin and end, counted in images from at."""
        k, n = len(window.draws), images[-1]
        self.window, self.draws = window, window.draws
        self.positions = window.positions[at : at + n]
        self.index = np.repeat(window.index[at : at + n], k)
        self.draw: Draw = window.draws[0] if k == 1 else np.tile(np.array(window.draws), n)
        self.cuts = [k * cut for cut in images]
        self._rows = slice(k * at, k * (at + n))

    @property
    def shown(self) -> tuple[Rows, Draw]:
        """Index and draw of the rows whose views this rank renders."""
        stream = self.window.stream
        if stream.world == 1:
            return self.index, self.draw
        parts = [(a, rank_rows(b - a, stream.rank, stream.world)) for a, b in pairwise(self.cuts)]
        rows = np.concatenate([np.arange(a + first, a + stop) for a, (first, stop) in parts])
        return self.index[rows], self.draw if isinstance(self.draw, int) else self.draw[rows]

    def targets(self) -> Targets:
        logits, features = self.window.targets()
        rank_rows = None if logits is None else logits[self._rows]
        return rank_rows, {tap: x[self._rows] for tap, x in features.items()}


def render_batches(
    images: ImageSource, views: ViewPolicy, seed: int, batches: list[Rows], draw: int, workers: int = 0
) -> Iterator[torch.Tensor]:
    """The views of each batch of indices, in order, rendered ahead by a thread or by worker processes."""
    if workers:
        yield from map_in_workers(Renderer(images, views, seed), ((b, draw) for b in batches), workers)
    else:
        yield from prefetch(render(images, views, seed, batch, draw) for batch in batches)
