"""Transfer set (+ cache) -> TargetBatch, in a seeded order, prepared ahead of time.

Round r shows every row once, in one draw. Which rows make up step s depends on (seed, s) alone, so that a
training can begin at any step: that is how it resumes to the same weights.
"""

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from data import counter
from data.errors import Refused
from data.long_tail import SAMPLERS, resampled
from data.transfer_set import Labels, Split
from data.views import Pictures, ViewPolicy, mixup_of, render

from .records import TargetBatch

Rows = NDArray[np.int64]
T = TypeVar("T")
_BLOCK, _BLOCKS = 64, 64  # rows read together, and how many such blocks are mixed, when a draw is on disk
_GROUP_BYTES = 8 << 20  # of pixels rendered at once: fewer, larger calls for small pictures


class Source(Protocol):
    """Where targets come from: a cache, or several as one teacher."""

    def order(self, split: str) -> Rows: ...

    def resident(self, split: str, draw: int, taps: tuple[str, ...] = ()) -> bool: ...

    def targets(
        self, split: str, draw: int, positions: Rows, taps: tuple[str, ...] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class Stream:
    """What a training reads. split: pictures and labels; views with seed: what is seen of them.

    order_seed: of the order, not of the views. labels [N]: hard targets, -1 where hidden. rows: positions that
    are used, in any order. draws: how many views there are, 0 for a new one each round (no cache).
    cache, taps: where targets come from, unless targets is false: then only its order is used.
    workers: processes that decode a folder; 0 decodes in this one, in a thread. sampler: of SAMPLERS; a round then
    shows as many rows, some more than once; every row has a label.
    """

    split: Split
    views: ViewPolicy
    view_seed: int
    order_seed: int
    batch_size: int
    labels: Labels
    rows: Rows
    draws: int = 0
    cache: Source | None = None
    taps: tuple[str, ...] = ()
    targets: bool = True
    workers: int = 0
    start_method: str | None = None
    sampler: str = ""

    @property
    def steps_per_round(self) -> int:
        """Batches that show every row once. They differ by one row at most: none is a leftover of 1."""
        return -(-len(self.rows) // self.batch_size)

    def batches(self, start: int, stop: int) -> Iterator[TargetBatch]:
        """The batches of steps start to stop, prepared ahead by a thread or, for a folder, by processes."""
        groups = self._by_processes(start, stop) if self.workers else _ahead(self._here(start, stop))
        try:
            for group, cuts in groups:
                for a, b in pairwise(cuts):
                    yield group.rows(a, b)
        finally:
            groups.close()

    def draw_of(self, round_: int) -> int:
        """Which draw a round shows: a seeded permutation of all draws, then another one."""
        if self.draws == 0:
            return round_
        cycle, place = divmod(round_, self.draws)
        return int(counter.permutation((self.order_seed, 41, cycle), self.draws)[place])

    def _here(self, start: int, stop: int) -> Iterator[tuple[TargetBatch, list[int]]]:
        for group in self._groups(start, stop):
            views = render(self.split.pictures, self.views, self.view_seed, group.index, group.draw)
            yield self._join(group, views), group.cuts

    def _by_processes(self, start: int, stop: int) -> Generator[tuple[TargetBatch, list[int]], None, None]:
        """Only pixels come from the processes; targets are read in this one."""
        under_way: deque[_Group] = deque()

        def noted() -> Iterator[tuple[Rows, int]]:
            for group in self._groups(start, stop):
                under_way.append(group)
                yield group.index, group.draw

        renderer = _Renderer(self.split.pictures, self.views, self.view_seed)
        for views in _by_workers(renderer, noted(), self.workers, self.start_method):
            group = under_way.popleft()
            yield self._join(group, views), group.cuts

    def _groups(self, start: int, stop: int) -> Iterator["_Group"]:
        """Whole batches, as many together as fit _GROUP_BYTES of pixels; their targets are read by the window."""
        per_round, step = self.steps_per_round, start
        pixels = 3 * (self.views.size or 1) ** 2
        together = max(1, _GROUP_BYTES // (pixels * self.batch_size))
        while step < stop:
            round_, first = divmod(step, per_round)
            draw = self.draw_of(round_)
            batches = np.array_split(self._round(round_), per_round)[first : first + stop - step]
            step += len(batches)
            resident = self.cache is None or self.cache.resident("train", draw)
            long = together if resident else max(together, _BLOCK * _BLOCKS // self.batch_size)
            for w in range(0, len(batches), long):
                window = _Window(self, draw, np.concatenate(batches[w : w + long]))
                at = 0
                for g in range(w, min(w + long, len(batches)), together):
                    lengths = [len(b) for b in batches[g : min(g + together, w + long)]]
                    yield _Group(window, at, [0, *np.cumsum(lengths).tolist()])
                    at += sum(lengths)

    def _round(self, round_: int) -> Rows:
        """Positions of a round in the order in which they are shown."""
        key, rows = (self.order_seed, 40, round_), self._sampled(round_)
        if self.cache is None or self.cache.resident("train", self.draw_of(round_)):
            return rows[counter.permutation(key, len(rows))]
        # Shuffled blocks, then shuffled inside windows of 64 of them: bounded memory, long reads.
        blocks = np.array_split(np.sort(rows), -(-len(rows) // _BLOCK))
        shuffled = [blocks[b] for b in counter.permutation(key, len(blocks))]
        windows = [np.concatenate(shuffled[w : w + _BLOCKS]) for w in range(0, len(shuffled), _BLOCKS)]
        return np.concatenate([w[counter.permutation((*key, i), len(w))] for i, w in enumerate(windows)])

    def _sampled(self, round_: int) -> Rows:
        """The positions of a round, in no order yet."""
        if not self.sampler:
            return self.rows
        index = self.rows if self.cache is None else self.cache.order("train")[self.rows]
        return self.rows[resampled(self.labels[index], SAMPLERS[self.sampler], (self.order_seed, 42, round_))]

    def _join(self, group: "_Group", views: torch.Tensor) -> TargetBatch:
        index = group.index
        partner = share = None
        if self.views.mixup > 0:
            other, w = mixup_of(self.views, self.view_seed, index, group.draw, len(self.split))
            partner, share = torch.from_numpy(self.labels[other]), torch.from_numpy(w / 256).float()
        logits, features = group.targets()
        labels = torch.from_numpy(self.labels[index])
        return TargetBatch(torch.from_numpy(index), group.draw, views, labels, logits, features, partner, share)


class _Window:
    """Positions [n] of one draw whose targets are read in one go, when the first of them is asked for."""

    def __init__(self, stream: Stream, draw: int, positions: Rows):
        self.stream, self.draw, self.positions = stream, draw, positions
        cache = stream.cache
        self.index = positions if cache is None else cache.order("train")[positions]
        self._targets: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None

    def targets(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        cache = self.stream.cache
        if cache is None or not self.stream.targets:
            return None, {}
        if self._targets is None:
            self._targets = cache.targets("train", self.draw, self.positions, self.stream.taps)
        return self._targets


class _Group:
    """Some whole batches of a window, rendered in one call. cuts: where in the group the batches begin and end."""

    def __init__(self, window: _Window, at: int, cuts: list[int]):
        self.window, self.draw, self.cuts = window, window.draw, cuts
        self._rows = slice(at, at + cuts[-1])
        self.index = window.index[self._rows]

    def targets(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        logits, features = self.window.targets()
        part = None if logits is None else logits[self._rows]
        return part, {tap: x[self._rows] for tap, x in features.items()}


class _Renderer(Dataset[torch.Tensor | str]):
    """What a worker process does: (index, draw) -> views; what it refuses travels as text, not as a traceback."""

    def __init__(self, pictures: Pictures, views: ViewPolicy, seed: int):
        self.pictures, self.views, self.seed = pictures, views, seed

    def __getitem__(self, item: tuple[Rows, int]) -> torch.Tensor | str:
        try:
            return render(self.pictures, self.views, self.seed, *item)
        except Refused as refusal:
            return str(refusal)


def render_in_order(
    pictures: Pictures, views: ViewPolicy, seed: int, batches: list[Rows], draw: int, workers: int = 0
) -> Iterator[torch.Tensor]:
    """The views of each batch of indices, in order, rendered ahead by a thread or by worker processes."""
    if workers:
        yield from _by_workers(_Renderer(pictures, views, seed), ((b, draw) for b in batches), workers, None)
    else:
        yield from _ahead(render(pictures, views, seed, batch, draw) for batch in batches)


def _by_workers(
    renderer: _Renderer, items: Iterator[tuple[Rows, int]], workers: int, start_method: str | None
) -> Iterator[torch.Tensor]:
    """renderer[item] for each item, in order, by processes that live until the last one."""
    loader: DataLoader[Any] = DataLoader(
        renderer, sampler=_Once(items), batch_size=None, num_workers=workers, multiprocessing_context=start_method,
        generator=torch.Generator(),  # else it draws from the one that training resumes with
    )  # fmt: skip
    for views in loader:
        if isinstance(views, str):
            raise Refused(views)
        yield views


class _Once(Sampler[tuple[Rows, int]]):
    """A sampler over an iterator that is made as it goes."""

    def __init__(self, items: Iterator[tuple[Rows, int]]):
        self.items = items

    def __iter__(self) -> Iterator[tuple[Rows, int]]:
        return self.items


def _ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made by a thread, at most depth ahead. What it raises is raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # handed to the thread that consumes
            put(None, error)

    thread = threading.Thread(target=work, name="softcache-stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield cast(T, item)
    finally:
        stopped.set()
        thread.join()
