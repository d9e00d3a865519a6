"""Images whose views are compared, and what a policy makes of them."""

from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.images.image_arrays import ImageArrays
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render


def make_images(n: int, channels: int = 3, size: int = 9) -> ImageArrays:
    """Images from a formula: no generator, so that a pin is about views alone."""
    i, c, y, x = np.indices((n, channels, size, size))
    values = 37 * i + 91 * c + 5 * y * y + 11 * x + 3 * x * y + 7 * i * x
    return ImageArrays(torch.from_numpy((values % 256).astype(np.uint8)))


def render_views(images: ImageArrays, spec: str, seed: int = 0, draw: int = 0) -> NDArray[np.uint8]:
    """A view of each image, uint8 [N, C, S, S]."""
    views: NDArray[np.uint8] = render(images, parse_views(spec), seed, np.arange(len(images)), draw).numpy()
    return views


def compute_checksums(views: NDArray[np.uint8]) -> str:
    """The CRC-32 of each view, in hexadecimal."""
    return " ".join(f"{crc32(view.tobytes()):08x}" for view in views)
