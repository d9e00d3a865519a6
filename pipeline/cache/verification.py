"""What proves that a cache is of these images and of this teacher: views rendered again, rows asked again."""

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.data.transfer_set import TransferSet
from softcache.data.views import render

from .reader import Cache
from .rows import Positions

_PIXEL_BYTES = 8 << 20  # of views that are rendered together


def verify_views(
    cache: Cache,
    transfer_set: TransferSet,
    draws: int,
    gaps: dict[int, NDArray[np.bool_]] | None = None,
    views: int = 256,
) -> None:
    """Render so many views of the first draws and the held-out splits again. Raises CacheError where one differs.

    gaps: positions of the training split that are not asked for, by draw.
    """
    some = min(draws, 8)
    places = [("train", d * draws // some) for d in range(some)]
    places += [(split, 0) for split in cache.manifest.splits if split != "train"]
    for split, draw in places:
        there = np.arange(cache.manifest.splits[split])
        if gaps and split == "train" and draw in gaps:
            there = there[~gaps[draw]]
        count = min(len(there), -(-views // len(places)))
        positions = there[np.arange(count) * len(there) // max(count, 1)]
        seen = cache.read_rows(split, draw, "view_crc32", positions)
        compare_views(cache, transfer_set, split, draw, positions, seen)


def compare_views(
    cache: Cache,
    transfer_set: TransferSet,
    split: str,
    draw: int,
    positions: Positions,
    seen: NDArray[np.generic],
) -> None:
    """Render the views at positions [n]; their checksums must be seen [n]. Raises CacheError, naming the first."""
    index = cache.index_at(split, positions)
    policy = cache.views if split == "train" else cache.views.without_augmentation()
    together = max(1, _PIXEL_BYTES // (3 * max(cache.views.size, cache.views.resize) ** 2))
    for at in range(0, len(index), together):
        part = index[at : at + together]
        views = render(transfer_set.splits[split].images, policy, cache.seed, part, draw)
        wrong = np.flatnonzero(compute_crc32(views) != seen[at : at + together])
        if len(wrong):
            raise CacheError(
                f"{len(wrong)} of {len(part)} views of '{cache.folder}' come out differently here, the first is"
                f" {split} index {part[wrong[0]]}, draw {draw}: a image, the decoder or a library changed."
                f" The cache was written with {_format_versions(cache.manifest.versions)}"
            )


def compute_crc32(views: torch.Tensor) -> NDArray[np.uint32]:
    """CRC-32 [B] of the bytes of uint8 views [B, C, H, W]."""
    return np.array([zlib.crc32(view) for view in views.contiguous().numpy()], np.uint32)


def _format_versions(versions: dict[str, str]) -> str:
    return make_printable(", ".join(f"{name} {version}" for name, version in versions.items()))
