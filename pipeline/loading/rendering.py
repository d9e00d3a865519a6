"""Views rendered ahead of the teacher or of a validation, by a thread or by worker processes."""

from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from softcache.base.errors import CacheError, UsageError
from softcache.data.views.draws import Draw
from softcache.data.views.pairs import render_pairs
from softcache.data.views.policy import ViewPolicy
from softcache.data.views.render import ImageSource, render
from softcache.pipeline.cache.checksums import compute_crc32

from .prefetch import map_in_workers, prefetch, share_memory

Rows = NDArray[np.int64]


class ViewRenderer(Dataset[Any]):
    """Renders views in a worker process: (index [B], draw) -> views uint8 [B, C, S, S].

    A CacheError or a UsageError takes the place of the views, see map_in_workers. With the policy of a teacher's views
    the item is (teacher's views, CRC-32 [B] of each view).
    """

    def __init__(self, images: ImageSource, views: ViewPolicy, seed: int, teacher_views: ViewPolicy | None = None):
        self.images, self.views, self.seed, self.teacher_views = images, views, seed, teacher_views

    def __getitem__(self, key: tuple[Rows, Draw]) -> Any:
        try:
            if self.teacher_views is None:
                return share_memory(render(self.images, self.views, self.seed, *key))
            views, checksums = _render_for_teacher(self.images, self.views, self.teacher_views, self.seed, *key)
            return share_memory(views), share_memory(torch.from_numpy(checksums))
        except (CacheError, UsageError) as error:
            return error


def render_batches(
    images: ImageSource, views: ViewPolicy, seed: int, batches: list[Rows], draw: int, workers: int = 0
) -> Generator[torch.Tensor, None, None]:
    """Yield the views uint8 [B, C, S, S] of each batch of indices, in order, rendered ahead.

    The caller closes the generator, see contextlib.closing: else its thread or its processes outlive an error.

    Args:
        images: Where the pixels come from.
        views: The view policy.
        seed: Seed of the views.
        batches: int64 [B] each, indices of the split.
        draw: The draw of all views.
        workers: Number of processes that render; 0 for a thread of this one.

    Raises:
        CacheError: An image cannot be read.
    """
    if workers:
        yield from map_in_workers(ViewRenderer(images, views, seed), ((batch, draw) for batch in batches), workers)
    else:
        yield from prefetch(render(images, views, seed, batch, draw) for batch in batches)


def render_with_checksums(
    images: ImageSource,
    views: ViewPolicy,
    seed: int,
    batches: list[Rows],
    draw: int,
    teacher_views: ViewPolicy,
    workers: int = 0,
    pinned: bool = False,
) -> Generator[tuple[torch.Tensor, NDArray[np.uint32]], None, None]:
    """As render_batches, with the CRC-32 [B] of each view, computed where it is rendered: 1 µs for 3 KB.

    Args:
        teacher_views: The policy of the views that are yielded: `views`, or these at another size. The checksums are
            those of `views`, which the students get.
        images, views, seed, batches, draw, workers: As in render_batches.
        pinned: Put the views into pinned memory, from which a GPU copies while this thread goes on. Only without
            workers.

    Raises:
        CacheError: An image cannot be read.
    """
    if workers:
        renderer = ViewRenderer(images, views, seed, teacher_views)
        with closing(map_in_workers(renderer, ((batch, draw) for batch in batches), workers)) as items:
            for rendered, checksums in items:
                yield rendered, checksums.numpy()
        return

    def render_batch(index: Rows) -> tuple[torch.Tensor, NDArray[np.uint32]]:
        rendered, checksums = _render_for_teacher(images, views, teacher_views, seed, index, draw)
        return rendered.pin_memory() if pinned else rendered, checksums

    yield from prefetch(render_batch(batch) for batch in batches)


def _render_for_teacher(
    images: ImageSource, views: ViewPolicy, teacher_views: ViewPolicy, seed: int, index: Rows, draw: Draw
) -> tuple[torch.Tensor, NDArray[np.uint32]]:
    """Render the views of a teacher, and compute the CRC-32 [B] of the views that its students get."""
    if teacher_views == views:
        rendered = render(images, views, seed, index, draw)
        return rendered, compute_crc32(rendered)
    student_views, rendered = render_pairs(images, (views, teacher_views), seed, index, draw)
    return rendered, compute_crc32(student_views)
