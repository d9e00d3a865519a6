"""Pictures in memory, and the resizing that they share with pictures in files."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .decoding import array_of, centred
from .views import Box, with_border

_BORDERED_BYTES = 2 << 30  # of pictures that are kept with their border as well


@dataclass(frozen=True)
class MemoryPictures:
    """A small set as one tensor. images: uint8 [N, C, H, W] with C 1 or 3 and H == W."""

    images: torch.Tensor
    _bordered: dict[int, NDArray[np.uint8]] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        """What travels to another process: not what can be made again."""
        return MemoryPictures, (self.images,)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: NDArray[np.int64]) -> "MemoryPictures":
        """The pictures index, in that order."""
        return MemoryPictures(self.images[torch.from_numpy(index)])

    def plain(self, index: NDArray[np.int64], size: int, resize: int) -> torch.Tensor:
        """As Pictures.plain. One gather unless another size is asked for."""
        if self._as_stored(size, resize):
            return torch.from_numpy(self.images.numpy()[index])  # NumPy: see views.render
        return stacked([centre(self._image(i), size or self.images.shape[-1], resize) for i in index])

    def padded(
        self, index: NDArray[np.int64], size: int, resize: int, pad: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """As Pictures.padded. All of them are padded once, so that a crop is one gather: 0.6 us of a 32 x 32 picture
        instead of 3.1 us, for 1.6 times the memory again."""
        N, C, H, W = self.images.shape
        if not self._as_stored(size, resize) or N * C * (H + 2 * pad) * (W + 2 * pad) > _BORDERED_BYTES:
            return with_border(self.plain(index, size, resize).numpy(), pad), np.arange(len(index))
        if pad not in self._bordered:
            self._bordered[pad] = with_border(self.images.numpy(), pad)
        return self._bordered[pad], index

    def _as_stored(self, size: int, resize: int) -> bool:
        stored = self.images.shape[-1]
        return size in (0, stored) and resize in (0, stored)

    def boxed(self, index: NDArray[np.int64], size: int, box: Callable[[int, int, int], Box]) -> torch.Tensor:
        """As Pictures.boxed."""
        H, W = self.images.shape[-2:]
        return stacked([cut(self._image(i), size or H, box(row, W, H)) for row, i in enumerate(index)])

    def _image(self, i: int) -> Image.Image:
        pixels = self.images[int(i)].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def stacked(views: list[torch.Tensor]) -> torch.Tensor:
    """B pictures uint8 [C, S, S] as one tensor [B, C, S, S]."""
    return torch.from_numpy(np.stack([view.numpy() for view in views]))


def centre(image: Image.Image, size: int, resize: int) -> torch.Tensor:
    """As decoding.centred."""
    return torch.from_numpy(centred(image, size, resize))


def cut(image: Image.Image, size: int, box: Box) -> torch.Tensor:
    """uint8 [C, size, size]: the box, resized with Pillow's bilinear filter."""
    return pixels_of(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def pixels_of(image: Image.Image) -> torch.Tensor:
    """As decoding.array_of."""
    return torch.from_numpy(array_of(image))
