"""A transfer set and its targets on one device, from which a stream gathers whole groups of batches."""

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.device_views import can_render_on_device, copy_to_device, render_on_device
from softcache.data.image_arrays import ImageArrays
from softcache.data.views import Draw, ImageSource, ViewPolicy
from softcache.pipeline.batch import Targets, TargetSource

Rows = NDArray[np.int64]
_SHARE = 3  # a third of what is free on a GPU: the rest is for the network and what it keeps for the gradient
_READ = 65_536  # rows of a draw that are read at once


class DeviceCache:
    """Images that are in memory, and what the first draws of the cache say of them, once a draw is asked for.

    cache: None where no targets are wanted; draws: so many are used. Raises ValueError where Pillow would resize.
    """

    def __init__(
        self,
        images: ImageSource,
        policy: ViewPolicy,
        cache: TargetSource | None,
        draws: int,
        taps: tuple[str, ...],
        device: torch.device,
    ):
        if not (isinstance(images, ImageArrays) and can_render_on_device(images, policy)):
            raise ValueError("only images in memory, at their own size, are rendered on a device")
        self.device, self._policy, self._cache, self._taps = device, policy, cache, taps
        self._images = images.pixels.to(device)  # uint8 [N, C, H, W]; waits, but pins no second copy of the set
        self._filled: set[int] = set()
        if cache is not None:
            self._rows, (logits, features) = len(cache.row_order("train")), _row(cache, taps)
            self._logits = self._table(draws, logits)
            self._features = {tap: self._table(draws, x) for tap, x in features.items()}

    def _table(self, draws: int, row: torch.Tensor) -> torch.Tensor:
        """Room for all rows of draw 0, then of draw 1 …: a batch of several draws is still one gather."""
        return torch.empty(draws * self._rows, *row.shape[1:], dtype=row.dtype, device=self.device)

    def views(self, seed: int, index: Rows, draw: Draw) -> torch.Tensor:
        """As data.views.render."""
        return render_on_device(self._images, self._policy, seed, index, draw)

    def targets(self, positions: Rows, draws: tuple[int, ...]) -> Targets:
        """Of rows at positions [n] in k draws, row by row: logits float32 [n * k, …], features {tap: [n * k, …]}."""
        if self._cache is None:
            return None, {}
        for draw in draws:
            self._fill(draw)
        places = (positions[:, None] + self._rows * np.array(draws)).ravel()
        at = copy_to_device(torch.from_numpy(places), self.device)
        return self._logits.index_select(0, at), {tap: x.index_select(0, at) for tap, x in self._features.items()}

    def _fill(self, draw: int) -> None:
        if draw in self._filled:
            return
        assert self._cache is not None
        for start in range(0, self._rows, _READ):
            positions = np.arange(start, min(start + _READ, self._rows))
            logits, features = self._cache.read_targets("train", draw, positions, self._taps)
            first = draw * self._rows + start
            rows = slice(first, first + len(positions))
            self._logits[rows] = copy_to_device(logits, self.device)
            for tap, x in features.items():
                self._features[tap][rows] = copy_to_device(x, self.device)
        self._filled.add(draw)


def fits_on_device(
    images: ImageSource,
    policy: ViewPolicy,
    cache: TargetSource | None,
    draws: int,
    taps: tuple[str, ...],
    device: torch.device,
) -> bool:
    """Whether images and the targets of all draws take up no more than a third of what is free on a GPU."""
    if device.type != "cuda" or not can_render_on_device(images, policy):
        return False
    size = images.load_plain(np.zeros(1, np.int64), 0, 0).nbytes * len(images)
    if cache is not None:
        logits, features = _row(cache, taps)
        size += draws * len(cache.row_order("train")) * (logits.nbytes + sum(x.nbytes for x in features.values()))
    free, _ = torch.cuda.mem_get_info(device)
    return size * _SHARE <= free


def _row(cache: TargetSource, taps: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The targets of one row, for their shapes and sizes."""
    return cache.read_targets("train", 0, np.zeros(1, np.int64), taps)
