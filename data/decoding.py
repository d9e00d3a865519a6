"""Image files into arrays of pixels, without PyTorch: for folders of images and for `softcache predict`.

Everything is resized with Pillow's bilinear filter with antialiasing, which computes in 8-bit fixed point and so gives
the same pixels on every machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from softcache.base.errors import CacheError
from softcache.base.files import open_input_file

GREY_MODES = {"1", "L"}
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the stored image


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file of at most 8 bits a channel; its pixels are decoded when they are first used.

    Raises:
        CacheError: The file is missing, is not a regular file, is not an image, is damaged, or has more than 8 bits a
            channel. Errors of the decoder inside the `with` block are reported in the same way.
    """
    try:
        with open_input_file(path) as file, Image.open(file) as image:
            if image.mode[0] in "IF":  # Pillow clips such pixels at 255: a 16-bit image would come out white
                raise CacheError(f"the image {path} has more than 8 bits a channel ({image.mode}): convert it first")
            yield image
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise CacheError(f"the image {path} cannot be decoded: {reason}") from None


def center_crop(image: Image.Image, size: int, resize: int) -> NDArray[np.uint8]:
    """Scale an image so that its shorter side is `resize`, and cut out the centre.

    Args:
        image: In mode L or RGB.
        size: Side of the crop in pixels.
        resize: Length of the shorter side in pixels, at least `size`; 0 stands for `size`. An image whose shorter side
            has this length is not resampled.

    Returns:
        uint8 [C, size, size].
    """
    short_side = max(resize or size, size)
    W, H = image.size
    if min(W, H) != short_side:
        scale = short_side / min(W, H)
        W, H = max(round(W * scale), size), max(round(H * scale), size)
        image = image.resize((W, H), Image.Resampling.BILINEAR)
    left, top = (W - size) // 2, (H - size) // 2
    return to_array(image.crop((left, top, left + size, top + size)))


def resized_crop(image: Image.Image, size: int, box: Box) -> NDArray[np.uint8]:
    """Cut a box out of an image in mode L or RGB, and resize it to uint8 [C, size, size]."""
    return to_array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image as uint8 [C, H, W], C being 1 for mode L and 3 for mode RGB."""
    pixels = np.array(image, dtype=np.uint8)  # a copy: torch does not take Pillow's read-only buffer
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
