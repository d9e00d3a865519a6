"""Files of images into pixels, without PyTorch: what a folder of images and `softcache predict` share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from softcache.base.errors import CacheError

GREY_MODES = {"1", "L"}


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """A image of 8 bits a channel. Raises CacheError, with its path, for one that cannot be decoded."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting would clip at 255: a 16-bit image would come out white
                raise CacheError(f"the image {path} has more than 8 bits a channel ({image.mode}): convert it first")
            yield image
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        why = "not a image" if isinstance(error, UnidentifiedImageError) else error
        raise CacheError(f"the image {path} cannot be decoded: {why}") from None


def center_crop(image: Image.Image, size: int, resize: int) -> NDArray[np.uint8]:
    """uint8 [C, size, size]: shorter side made `resize` (0: size), then the centre; untouched if it fits.

    Pillow's bilinear filter with antialiasing, in its 8-bit fixed-point arithmetic.
    """
    short = max(resize or size, size)
    W, H = image.size
    if min(W, H) != short:
        scale = short / min(W, H)
        W, H = max(round(W * scale), size), max(round(H * scale), size)
        image = image.resize((W, H), Image.Resampling.BILINEAR)
    left, top = (W - size) // 2, (H - size) // 2
    return to_array(image.crop((left, top, left + size, top + size)))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [C, H, W], C 1 for mode L and 3 for mode RGB."""
    pixels = np.array(image, dtype=np.uint8)  # a copy: torch does not take Pillow's read-only buffer
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
