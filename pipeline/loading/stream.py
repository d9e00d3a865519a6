"""Batches for a training, from a transfer set and a cache, in a seeded order and prepared ahead of time.

How the steps of a training are divided (k: draws per decode; one draw in most trainings):

    pass    |------------------------------------------------|  every row once, in k draws: k epochs (order.py)
    window  |-----------------|-----------------|------------|  batches whose targets are read in one go (groups.py)
    group   |--------|--------|--------|--------|--------|---|  batches whose views are rendered in one call
    batch   |--|--|--|--|--|--|--|--|--|--|--|--|--|--|--|---|  n images in k draws: one step
"""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.images.row_arrays import RowArrays
from softcache.data.tasks import HardTargets
from softcache.data.transfer_set import Split
from softcache.data.views.draws import Draw
from softcache.data.views.mixing import draw_mixing
from softcache.data.views.policy import ViewPolicy
from softcache.data.views.render import render
from softcache.pipeline.batch import Batch, BatchSource, Targets, TargetSource

from .device_cache import DeviceCache, fits_on_device
from .groups import BatchGroup, TargetWindow, get_rank_rows
from .order import BLOCK_ROWS, WINDOW_BLOCKS, EpochOrder, SequentialOrder
from .prefetch import map_in_workers, prefetch
from .rendering import ViewRenderer
from .view_checks import ViewChecks

Rows = NDArray[np.int64]
LoadedGroups = Generator[tuple[BatchGroup, Batch], None, None]
GROUP_BYTES = 8 << 20  # of pixels rendered in one call: fewer, larger calls for small images


@dataclass(frozen=True)
class BatchStream:
    """Loads the batches of a training: views, labels and, from a cache, the teacher's targets.

    Args:
        split: Images of the training split.
        views: The view policy.
        view_seed: Seed of the views.
        order_seed: Seed of the order of rows.
        batch_size: Views per batch, a multiple of draws_per_decode.
        labels: The hard targets of each index, int64 [N], -1 where it is hidden; or those of another task, see
            data/tasks.py.
        rows: int64 [n], the positions that are used, in any order.
        draws: Number of draws; 0 for a new draw in every epoch (without a cache).
        cache: Where targets come from. None: batches without targets, positions are indices.
        taps: Taps whose features are read from the cache.
        read_targets: Whether batches have targets. If not, the cache only says which index is at which position.
        workers: Processes that decode and render; 0 for a thread of this process.
        start_method: Of these processes: "fork", "spawn" or "forkserver"; None for the platform's default.
        sampler: A name of data.sampling.SAMPLERS. An epoch then has n rows drawn by class, some of them more than
            once, and every row needs a label. Empty: every row once.
        draws_per_decode: k, the draws of each decoded image; it divides draws and batch_size.
        device: Where the batches are to be.
        resident_device: Where to keep images in memory and targets, see DeviceCache. None: on device, where that is a
            GPU on which they fit.
        rank, world: Of several processes that share each batch. Only the views of this rank's rows are rendered,
            those of get_rank_rows; everything else is of the whole batch.
        name: Name of the split. A held-out split is read in the order of `rows`, in draw 0.
        source: Part of every batch.
    """

    split: Split
    views: ViewPolicy
    view_seed: int
    order_seed: int
    batch_size: int
    labels: HardTargets
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
    name: str = "train"
    source: BatchSource | None = None

    @cached_property
    def order(self) -> EpochOrder | SequentialOrder:
        """Which rows and draws make up each batch."""
        if self.name != "train":
            return SequentialOrder(self.rows, self.batch_size, self.cache, self.name)
        return EpochOrder(
            seed=self.order_seed,
            rows=self.rows,
            labels=self.labels,
            batch_size=self.batch_size,
            draws=self.draws,
            draws_per_decode=self.draws_per_decode,
            sampler=self.sampler,
            cache=self.cache,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        return self.order.steps_per_epoch

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield the batches of the steps start to stop - 1, on the device. The caller closes the generator.

        They are prepared ahead by a thread or, with workers, by processes. What lies on the device is gathered there
        when it is needed.

        Raises:
            CacheError: An image or a target cannot be read, or is damaged; or a view is not the one that the teacher
                saw.
            ValueError: A resident_device is given for images that cannot be rendered there, see DeviceCache.
        """
        groups: LoadedGroups
        if self._device_cache is not None:
            groups = self._gather_on_device(self._device_cache, start, stop)
        elif self.workers:
            groups = self._render_in_workers(start, stop)
        else:
            groups = prefetch(self._render_here(start, stop))
        with closing(groups):
            for group, batch in groups:
                # Here and not in the thread that prepares it: a copy belongs to the stream of the GPU in which the
                # batch is used, and that is a setting of each thread.
                yield from self._split_group(group, batch.to(self.device))

    @cached_property
    def _device_cache(self) -> DeviceCache | None:
        """Images and targets that lie on a device, where they do. They stay from one call of batches to the next."""
        images, cache = self.split.images, self.cache if self.read_targets else None
        device = self.resident_device
        if device is None and fits_on_device(
            images, self.views, cache, draws=self.draws, taps=self.taps, device=self.device, split=self.name
        ):
            device = self.device
        if device is None:
            return None
        return DeviceCache(images, self.views, cache, draws=self.draws, taps=self.taps, device=device, split=self.name)

    def _gather_on_device(self, device_cache: DeviceCache, start: int, stop: int) -> LoadedGroups:
        for group in self._make_groups(start, stop):
            views = device_cache.render_views(self.view_seed, *group.select_views(self.rank, self.world))
            self._check_views(group, views)
            targets = device_cache.gather_targets(group.positions, group.draws)
            yield group, self._assemble(group, views, targets).to(device_cache.device)

    def _render_here(self, start: int, stop: int) -> LoadedGroups:
        for group in self._make_groups(start, stop):
            index, draw = group.select_views(self.rank, self.world)
            views = render(self.split.images, self.views, self.view_seed, index, draw)
            self._check_views(group, views)
            batch = self._assemble(group, views, group.read_targets())
            yield group, batch.pin_memory() if self.device.type == "cuda" else batch

    def _render_in_workers(self, start: int, stop: int) -> LoadedGroups:
        """Worker processes render the views; the targets are read in this process."""
        requested: deque[BatchGroup] = deque()

        def request_views() -> Iterator[tuple[Rows, Draw]]:
            for group in self._make_groups(start, stop):
                requested.append(group)
                yield group.select_views(self.rank, self.world)

        renderer = ViewRenderer(self.split.images, self.views, self.view_seed, teacher_views=self.views)
        with closing(map_in_workers(renderer, request_views(), self.workers, self.start_method)) as rendered:
            for views, crcs in rendered:
                group = requested.popleft()
                self._check_views(group, views, crcs.numpy())
                yield group, self._assemble(group, views, group.read_targets())

    @cached_property
    def _checks(self) -> ViewChecks | None:
        """What compares the views with their checksums in the cache; None without a cache."""
        return None if self.cache is None else ViewChecks(self.cache, self.name, self.split.images)

    def _check_views(self, group: BatchGroup, views: torch.Tensor, crcs: NDArray[np.uint32] | None = None) -> None:
        """Compare the views of this rank's rows, or their checksums if given, with those that the teacher saw."""
        if self._checks is None:
            return
        index, draw = group.select_views(self.rank, self.world)
        positions = group.select_positions(self.rank, self.world)
        if crcs is None:
            self._checks.compare_views(views, index, draw, positions, len(group.draws))
        else:
            self._checks.compare_checksums(crcs, index, draw, positions, len(group.draws))

    def _make_groups(self, start: int, stop: int) -> Iterator[BatchGroup]:
        """Divide the batches of the steps start to stop - 1 into windows, and these into groups of GROUP_BYTES."""
        images = self.split.images
        view_bytes = images.view_bytes if isinstance(images, RowArrays) else 3 * (self.views.size or 1) ** 2
        group_size = max(1, GROUP_BYTES // (view_bytes * self.batch_size))  # in batches, as window_size
        for draws, batches in self.order.batches(start, stop):
            window_size = group_size
            if not self.order.fits_in_memory(draws):
                window_size = max(group_size, BLOCK_ROWS * WINDOW_BLOCKS // self.batch_size)
            for w in range(0, len(batches), window_size):
                window_batches = batches[w : w + window_size]
                window = None
                if self.cache is not None and self.read_targets:
                    window = TargetWindow(
                        self.cache, self.taps, draws, np.concatenate(window_batches), split=self.name
                    )
                first = 0
                for g in range(0, len(window_batches), group_size):
                    group = BatchGroup.create(
                        window_batches[g : g + group_size],
                        draws,
                        self.cache,
                        window=window,
                        first=first,
                        split=self.name,
                    )
                    yield group
                    first += len(group.positions)

    def _assemble(self, group: BatchGroup, views: torch.Tensor, targets: Targets) -> Batch:
        """All batches of a group as one. Of several ranks, it has the views of this rank's rows alone."""
        index, draw, (logits, features) = group.index, group.draw, targets
        partner = share = None
        if self.views.mixes_images:
            mixing = draw_mixing(self.views, self.view_seed, index, draw, len(self.split), views.shape[-1])
            partner = torch.from_numpy(self.labels[mixing.partner])
            share = torch.from_numpy(mixing.share).float()
        return Batch(
            index=torch.from_numpy(index),
            draw=draw if isinstance(draw, int) else torch.from_numpy(draw),
            views=views,
            labels=torch.from_numpy(self.labels[index]),
            logits=logits,
            features=features,
            partner=partner,
            share=share,
            source=self.source,
        )

    def _split_group(self, group: BatchGroup, batch: Batch) -> Iterator[Batch]:
        """Yield the batches of a group, which share its memory."""
        first_view = 0
        for start, stop in pairwise(group.boundaries):
            part = batch.slice(start, stop)
            if self.world > 1:  # the group has the views of this rank's rows alone, batch after batch
                first, last = get_rank_rows(stop - start, self.rank, self.world)
                part = replace(part, views=batch.views[first_view : first_view + last - first])
                first_view += last - first
            yield part
