"""The mode and size of a set of images, by looking at some of them."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .decoding import GREY_MODES

_SAMPLED_IMAGES = 128  # of each split, at least
_ORIENTATION, _UPRIGHT = 0x0112, 1  # EXIF tag, and its value for pixels that are stored as they are seen


class ImageSample(NamedTuple):
    """What some images have in common.

    Attributes:
        mode: "L" where every image is grey, else "RGB".
        size: Their common side in pixels where all are squares of it, else 0.
        turned: How many have an EXIF orientation by which a viewer turns them.
        images: How many were looked at.
    """

    mode: str
    size: int
    turned: int
    images: int

    def describe_turned(self) -> str:
        """Describe, for the user, that some images would look otherwise in a viewer."""
        return (
            f"{self.turned} of {self.images} images that were looked at have an EXIF orientation, and are used as"
            " their pixels are stored: --exif transpose turns them as a viewer does"
        )


def choose_sample(rows: int) -> NDArray[np.int64]:
    """Choose which of N images are looked at: all of up to 128, else at least so many at regular distances."""
    return np.arange(0, rows, max(1, rows // _SAMPLED_IMAGES))


def inspect_images(images: Iterable[AbstractContextManager[Image.Image]]) -> ImageSample:
    """Look at some images; their pixels are not decoded.

    Args:
        images: At least one, as `decoding.open_image` opens them.

    Raises:
        UnreadableImageError: One of them cannot be opened.
    """
    modes, sizes, turned, count = set(), set(), 0, 0
    for opened in images:
        with opened as image:
            count += 1
            modes.add(image.mode)
            sizes.add(image.size)
            if "exif" in image.info or image.format == "TIFF":  # of other images, PNG would be decoded to look for it
                turned += image.getexif().get(_ORIENTATION, _UPRIGHT) not in (_UPRIGHT, 0)
    width, height = next(iter(sizes))
    size = width if len(sizes) == 1 and width == height else 0
    return ImageSample("L" if modes <= GREY_MODES else "RGB", size, turned, count)
