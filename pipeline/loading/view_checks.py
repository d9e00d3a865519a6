"""Proof, while views are used, that they are the ones that the teacher saw."""

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.images.image_arrays import ImageArrays
from softcache.data.views.draws import Draw
from softcache.data.views.render import ImageSource
from softcache.pipeline.batch import TargetSource
from softcache.pipeline.cache.checksums import compute_crc32, compute_joined_crc32, join_crc32
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import make_view_error
from softcache.pipeline.teachers.ensemble import MissingTargets, TeacherEnsemble

Rows = NDArray[np.int64]


class ViewChecks:
    """Compares the views of a split with their checksums in the caches.

    Views of files are compared whenever they are rendered. Images in memory do not change: each of their views is
    compared the first time, whichever training it is for.

    Args:
        source: The cache, or several as one teacher. Rows whose targets are missing are not compared.
        split: `train`, `val` or `test`.
        images: All images of the split.
    """

    def __init__(self, source: TargetSource, split: str, images: ImageSource):
        self._caches: tuple[CacheReader, ...] = ()
        self._missing: MissingTargets = {}
        if isinstance(source, TeacherEnsemble):
            self._caches, self._missing = source.members, source.missing if split == "train" else {}
        elif isinstance(source, CacheReader):
            self._caches = (source,)
        self._split, self._images = split, images
        self._positions: Rows | None = None  # by index

    def compare_views(
        self, views: torch.Tensor, index: Rows, draw: Draw, positions: Rows | None = None, draws_at_once: int = 1
    ) -> None:
        """Compare views with their checksums, where that has not been done for all of them.

        Args:
            views: uint8 [B, C, S, S] or float32 [B, *shape], on any device.
            index: int64 [B], the image of each.
            draw: One draw for all, or int64 [B].
            positions: int64 [B], the position of each in the row order of the caches, where that is known.
            draws_at_once: How many draws are read in turns.

        Raises:
            CacheError: A view is another one; the message names its row.
        """
        positions = self._find_positions(index) if positions is None else positions
        if not len(index) or self._are_compared(positions, draw):
            return
        views = views.cpu()
        joined = compute_joined_crc32(views)
        crcs: NDArray[np.uint32] | None = None
        for cache in self._caches:
            known, expected = self._read_checksums(cache, positions, draw, draws_at_once)
            if known.all() and join_crc32(expected, views[0].numel() * views.element_size()) == joined:
                continue
            crcs = compute_crc32(views) if crcs is None else crcs
            self._compare(cache, crcs, expected, known, index, draw)
        self._note_compared(positions, draw)

    def compare_checksums(
        self, crcs: NDArray[np.uint32], index: Rows, draw: Draw, positions: Rows, draws_at_once: int
    ) -> None:
        """Compare the checksums of views, uint32 [B], that were computed elsewhere. Otherwise as `compare_views`."""
        if self._are_compared(positions, draw):
            return
        for cache in self._caches:
            known, expected = self._read_checksums(cache, positions, draw, draws_at_once)
            self._compare(cache, crcs, expected, known, index, draw)
        self._note_compared(positions, draw)

    def _compare(
        self,
        cache: CacheReader,
        crcs: NDArray[np.uint32],
        expected: NDArray[np.uint32],
        known: NDArray[np.bool_],
        index: Rows,
        draw: Draw,
    ) -> None:
        wrong = np.flatnonzero(known & (crcs != expected))
        if len(wrong):
            first = int(wrong[0])
            raise make_view_error(
                cache,
                self._images,
                split=self._split,
                index=int(index[first]),
                draw=draw if isinstance(draw, int) else int(draw[first]),
                wrong=len(wrong),
                compared=len(crcs),
            )

    def _read_checksums(
        self, cache: CacheReader, positions: Rows, draw: Draw, draws_at_once: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
        """Read which rows have a checksum, bool [B], and the checksums, uint32 [B], 0 where there is none."""
        known, expected = np.ones(len(positions), bool), np.zeros(len(positions), np.uint32)
        for number in [draw] if isinstance(draw, int) else np.unique(draw).tolist():
            is_of_draw = np.ones(len(positions), bool) if isinstance(draw, int) else draw == number
            if number in self._missing:
                is_missing = is_of_draw & self._missing[number][positions]
                known &= ~is_missing
                is_of_draw &= ~is_missing
            if is_of_draw.any():
                expected[is_of_draw] = cache.read_checksums(
                    self._split, number, positions[is_of_draw], draws_at_once, in_memory=not self._missing
                )
        return known, expected

    def _find_positions(self, index: Rows) -> Rows:
        if not self._caches:
            return index
        if self._positions is None:
            self._positions = np.argsort(self._caches[0].row_order(self._split))
        return self._positions[index]

    def _are_compared(self, positions: Rows, draw: Draw) -> bool:
        """Whether there is nothing to compare with, or all of these views have been compared."""
        if not self._caches:
            return True
        if not isinstance(self._images, ImageArrays):
            return False
        compared = self._images.compared_views
        if isinstance(draw, int):
            return self._key(draw) in compared and bool(compared[self._key(draw)][positions].all())
        numbers = np.unique(draw).tolist()
        return all(self._are_compared(positions[draw == number], number) for number in numbers)

    def _note_compared(self, positions: Rows, draw: Draw) -> None:
        if not isinstance(self._images, ImageArrays):
            return
        for number in [draw] if isinstance(draw, int) else np.unique(draw).tolist():
            of_draw = self._images.compared_views.setdefault(self._key(number), np.zeros(len(self._images), bool))
            of_draw[positions if isinstance(draw, int) else positions[draw == number]] = True

    def _key(self, draw: int) -> tuple[object, ...]:
        return (*(cache.manifest.digest for cache in self._caches), self._split, draw)
