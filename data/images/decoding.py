"""Image files into arrays of pixels, without PyTorch: for folders of images and for `softcache predict`.

Everything is resized with Pillow's filters with antialiasing, which compute in 8-bit fixed point and so give the same
pixels on every machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from softcache.base.errors import UnreadableImageError
from softcache.data.file_records import open_regular_file

GREY_MODES = {"1", "L"}
# Both with antialiasing. A view is bilinear; a published teacher may have been trained with bicubic ones.
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the stored image


@contextmanager
def open_image(path: Path | str, file: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Open an image file of at most 8 bits a channel; its pixels are decoded when they are first used.

    Args:
        path: The image, for messages; it is opened where there is no `file`. Text names what is no file.
        file: The open file.

    Raises:
        UnreadableImageError: The file is missing, is not an image, is damaged, or has more than 8 bits a channel.
            Errors of the decoder inside the `with` block are reported in the same way.
    """
    try:
        with nullcontext(file) if file else open_regular_file(Path(path)) as opened, Image.open(opened) as image:
            bits = count_bits(image)
            if bits > 8:  # Pillow would clip grey pixels at 255, and cut colours to 8 bits
                reason = f"has more than 8 bits a channel ({bits} bits, mode {image.mode}): convert it to 8 bits first"
                raise UnreadableImageError(path, reason)
            yield image
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        cause = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImageError(path, f"cannot be decoded: {cause}") from None


def apply_orientation(image: Image.Image) -> Image.Image:
    """Return an image turned and mirrored as its EXIF orientation says: as a camera's user sees it."""
    return ImageOps.exif_transpose(image)


def count_bits(image: Image.Image) -> int:
    """Return the bits of a channel in the file of an image that was opened and not decoded yet.

    Pillow decodes 16-bit grey into the modes I and F, but 16-bit colour into RGB, where the mode does not show it.
    """
    if image.mode[0] in "IF":
        return 32 if image.mode in ("I", "F") else 16
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(258, (8,))))  # type: ignore[attr-defined]
    if image.format == "JPEG2000":
        return _count_jpeg2000_bits(image)
    tiles = image.tile  # type: ignore[attr-defined]
    arguments = tiles[0][3] if tiles else ""
    if image.format == "PPM" and isinstance(arguments, tuple) and len(arguments) == 2:
        return int(arguments[1]).bit_length()  # the largest value
    if image.format in ("PNG", "SGI"):  # RGB;16B
        return 16 if ";16" in str(arguments) else 8
    return 8


def _count_jpeg2000_bits(image: Image.Image) -> int:
    """Return the bits of the first channel, which stand in the SIZ marker of the codestream."""
    file = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    header = file.read(65_536)
    start = header.find(b"\xff\x4f\xff\x51")
    return (header[start + 42] & 0x7F) + 1 if 0 <= start < len(header) - 42 else 8


def center_crop(image: Image.Image, size: int, resize: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """Scale an image so that its shorter side is `resize`, and cut out the centre.

    Args:
        image: In mode L or RGB.
        size: Side of the crop in pixels.
        resize: Length of the shorter side in pixels, at least `size`; 0 stands for `size`. An image whose shorter side
            has this length is not resampled.
        interpolation: A name of FILTERS.

    Returns:
        uint8 [C, size, size].
    """
    short_side = max(resize or size, size)
    W, H = image.size
    if min(W, H) != short_side:
        scale = short_side / min(W, H)
        W, H = max(round(W * scale), size), max(round(H * scale), size)
        image = image.resize((W, H), FILTERS[interpolation])
    left, top = (W - size) // 2, (H - size) // 2
    return to_array(image.crop((left, top, left + size, top + size)))


def resized_crop(image: Image.Image, size: int, box: Box, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """Cut a box out of an image in mode L or RGB, and resize it to uint8 [C, size, size]."""
    return to_array(image.resize((size, size), FILTERS[interpolation], box=box))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image as uint8 [C, H, W], C being 1 for mode L and 3 for mode RGB."""
    pixels = np.array(image, dtype=np.uint8)  # a copy: torch does not take Pillow's read-only buffer
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
