"""Views with their checksums, made ahead: what stage one reads."""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from softcache.data.views import ImageSource, ViewPolicy, render
from softcache.pipeline.cache.verification import compute_crc32

from .prefetch import Renderer, Rows, ViewRequest, map_in_workers, prefetch

ViewsAndChecksums = tuple[torch.Tensor, NDArray[np.uint32]]


class _Checked(Dataset[Any]):
    """What a worker process does: (index, draw) -> views and the CRC-32 [B] of each, or as text what it refuses."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer

    def __getitem__(self, item: ViewRequest) -> Any:
        views = self.renderer[item]
        return views if isinstance(views, str) else (views, compute_crc32(views))


def render_with_checksums(
    images: ImageSource,
    views: ViewPolicy,
    seed: int,
    batches: list[Rows],
    draw: int,
    workers: int = 0,
    pinned: bool = False,
) -> Generator[ViewsAndChecksums, None, None]:
    """The views of each batch of indices, in order, and the CRC-32 [B] of each, computed where they are rendered: by
    a thread or by worker processes, ahead of the teacher. It takes 1 µs for 3 KB.

    pinned: in memory that a GPU reads while this thread goes on; by the thread alone.
    """
    if workers:
        checked: Any = _Checked(Renderer(images, views, seed))
        made: Any = map_in_workers(checked, ((batch, draw) for batch in batches), workers)
        for seen, crc in made:
            yield seen, crc.numpy()
        return

    def here(index: Rows) -> ViewsAndChecksums:
        seen = render(images, views, seed, index, draw)
        return seen.pin_memory() if pinned else seen, compute_crc32(seen)

    yield from prefetch(here(batch) for batch in batches)
