"""Images that are decoded one by one when a view needs them: what those in files and those of a dataset share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from softcache.base.errors import CacheError, make_printable
from softcache.data.views.render import pad_images

from .decoding import GREY_MODES, Box, apply_orientation, center_crop, resized_crop
from .image_arrays import stack_images


class DecodedImages(ABC):
    """Images of which a subclass decodes one at a time. The views that an ImageSource loads are made here.

    Attributes:
        mode: "L" for grey images or "RGB"; every image is converted to it.
        size: Side of the images in pixels where all are squares of one size, else 0.
    """

    mode: str
    size: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def describe(self, i: int) -> str:
        """Implement ImageSource.describe."""

    @abstractmethod
    def decode(self, i: int) -> Image.Image:
        """Return image i in `mode`."""

    def _convert(self, i: int, image: Image.Image, is_transposed: bool) -> Image.Image:
        """Convert image i, which is open, to `mode`, turned as its EXIF orientation says where that is meant.

        Raises:
            CacheError: It is in colour, and the images are grey.
        """
        if self.mode == "L" and image.mode not in GREY_MODES:
            raise CacheError(
                f"the image {make_printable(self.describe(i), None)} is in colour ({image.mode}), but the images that"
                " were sampled to detect the mode are all grey: convert it to grey, or all images to RGB"
            )
        return (apply_orientation(image) if is_transposed else image).convert(self.mode)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return 1 if self.mode == "L" else 3

    def load_plain(
        self, index: NDArray[np.int64], size: int, resize: int, interpolation: str = "bilinear"
    ) -> torch.Tensor:
        """Implement ImageSource.load_plain. Equal neighbours in `index` are decoded once."""
        views: list[NDArray[np.uint8]] = []
        for i, repeats in groupby(index.tolist()):
            views += [center_crop(self.decode(i), size or self.size, resize, interpolation)] * len(list(repeats))
        return stack_images(views)

    def load_padded(
        self, index: NDArray[np.int64], size: int, resize: int, pad: int, interpolation: str = "bilinear"
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Implement ImageSource.load_padded."""
        return pad_images(self.load_plain(index, size, resize, interpolation).numpy(), pad), np.arange(len(index))

    def load_boxes(
        self,
        index: NDArray[np.int64],
        size: int,
        box: Callable[[int, int, int], Box],
        interpolation: str = "bilinear",
    ) -> torch.Tensor:
        """Implement ImageSource.load_boxes. Equal neighbours in `index` are decoded once."""
        views = []
        for i, rows in groupby(range(len(index)), lambda row: int(index[row])):
            image = self.decode(i)
            views += [resized_crop(image, size or self.size, box(row, *image.size), interpolation) for row in rows]
        return stack_images(views)
