"""A transfer set and its targets on one device, from which the loader gathers whole groups of batches."""

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.images.image_arrays import ImageArrays
from softcache.data.views.draws import Draw
from softcache.data.views.on_device import can_render_on_device, copy_to_device, render_on_device
from softcache.data.views.policy import ViewPolicy
from softcache.data.views.render import ImageSource
from softcache.pipeline.batch import Targets, TargetSource

Rows = NDArray[np.int64]
_FREE_PARTS = 3  # one third of the free memory of a GPU is used: the rest is for the network and its gradients
_READ_ROWS = 65_536  # rows of a draw that are read at once


class DeviceCache:
    """Images in memory and the targets of the first draws of a cache, on a device.

    A draw is copied when its targets are first needed.

    Args:
        images: Images in memory, at their own size.
        policy: The view policy; it resizes nothing, because Pillow does that on the CPU.
        cache: Where targets come from; None for images alone.
        draws: Number of draws for which there is to be memory.
        taps: Taps whose features are copied.
        device: Where to keep all of it.
        split: Name of the split.

    Raises:
        ValueError: The images are not in memory, or the policy resizes them.
    """

    def __init__(
        self,
        images: ImageSource,
        policy: ViewPolicy,
        cache: TargetSource | None,
        draws: int,
        taps: tuple[str, ...],
        device: torch.device,
        split: str = "train",
    ):
        if not (isinstance(images, ImageArrays) and can_render_on_device(images, policy)):
            raise ValueError("only images in memory, at their own size, are rendered on a device")
        self.device, self._policy, self._cache, self._taps = device, policy, cache, taps
        self._split = split
        self._images = images.pixels.to(device)  # uint8 [N, C, H, W]; waits, but pins no second copy of the set
        self._copied_draws: set[int] = set()
        if cache is not None:
            self._rows, (logits, features) = len(cache.row_order(split)), _read_one_row(cache, taps, split)
            self._logits = self._allocate(draws, logits)
            self._features = {tap: self._allocate(draws, x) for tap, x in features.items()}

    def _allocate(self, draws: int, row: torch.Tensor) -> torch.Tensor:
        """Memory for all rows of draw 0, then of draw 1 …: a batch of several draws is still one gather."""
        return torch.empty(draws * self._rows, *row.shape[1:], dtype=row.dtype, device=self.device)

    def render_views(self, seed: int, index: Rows, draw: Draw) -> torch.Tensor:
        """As data.views.render: uint8 [B, C, H, W], on the device."""
        return render_on_device(self._images, self._policy, seed, index, draw)

    def gather_targets(self, positions: Rows, draws: tuple[int, ...]) -> Targets:
        """The targets at positions [n] in k draws: the k draws of the first position, then those of the next.

        Returns:
            Logits float32 [n * k, …] and features {tap: [n * k, …]} on the device; None and {} without a cache.
        """
        if self._cache is None:
            return None, {}
        for draw in draws:
            if draw not in self._copied_draws:
                self._copy_draw(self._cache, draw)
        rows = (positions[:, None] + self._rows * np.array(draws)).ravel()
        index = copy_to_device(torch.from_numpy(rows), self.device)
        features = {tap: x.index_select(0, index) for tap, x in self._features.items()}
        return self._logits.index_select(0, index), features

    def _copy_draw(self, cache: TargetSource, draw: int) -> None:
        for start in range(0, self._rows, _READ_ROWS):
            positions = np.arange(start, min(start + _READ_ROWS, self._rows))
            logits, features = cache.read_targets(self._split, draw, positions, self._taps)
            first = draw * self._rows + start
            rows = slice(first, first + len(positions))
            self._logits[rows] = copy_to_device(logits, self.device)
            for tap, x in features.items():
                self._features[tap][rows] = copy_to_device(x, self.device)
        self._copied_draws.add(draw)


def fits_on_device(
    images: ImageSource,
    policy: ViewPolicy,
    cache: TargetSource | None,
    draws: int,
    taps: tuple[str, ...],
    device: torch.device,
    split: str = "train",
) -> bool:
    """Whether the device is a GPU on which images and targets take at most a third of the free memory.

    Args: As of DeviceCache. Images that it refuses fit nowhere.
    """
    if device.type != "cuda" or not can_render_on_device(images, policy):
        return False
    size = images.load_plain(np.zeros(1, np.int64), 0, 0).nbytes * len(images)
    if cache is not None:
        logits, features = _read_one_row(cache, taps, split)
        row_size = logits.nbytes + sum(x.nbytes for x in features.values())
        size += draws * len(cache.row_order(split)) * row_size
    free, _ = torch.cuda.mem_get_info(device)
    return size * _FREE_PARTS <= free


def _read_one_row(
    cache: TargetSource, taps: tuple[str, ...], split: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The targets of one row, for their shapes and sizes."""
    return cache.read_targets(split, 0, np.zeros(1, np.int64), taps)
