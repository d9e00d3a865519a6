"""Erasing: a rectangle of a view is black (Zhong et al. 2020, "Random Erasing Data Augmentation")."""

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng

from .draws import ERASING, ERASING_AREA, ERASING_LEFT, ERASING_RATIO, ERASING_TOP, Draw
from .ratios import RATIOS, tabulate_ratios
from .rectangles import Rectangles, scale_rectangles

_ATTEMPTS = 10
_AREAS = (0.02, 0.33)  # least and largest share of the view


def draw_erased(probability: float, seed: int, index: NDArray[np.int64], draw: Draw, side: int) -> Rectangles:
    """Draw what is erased from each view, with the distribution of torchvision's RandomErasing and its defaults.

    An attempt draws an area, uniform from 2 to 33 % of the view's, and a ratio of height to width, log-uniform from
    0.3 to 3.3. The first of ten attempts whose height and width are below the side gets a uniform position.

    Args:
        probability: Of a view to be erased in part.
        seed: The seed of the views.
        index: int64 [B], the images.
        draw: One draw for all, or int64 [B].
        side: Of a student's view, in pixels.

    Returns:
        int64 [B, 4], empty for a view that stays whole.
    """
    attempts = np.arange(_ATTEMPTS)[:, None]
    least, largest = _AREAS
    area = (least + (largest - least) * rng.uniform((seed, draw, ERASING_AREA, attempts), index)) * (side * side)
    numbers = rng.integers((seed, draw, ERASING_RATIO, attempts), index, RATIOS)
    ratio = tabulate_ratios("3/10", "33/10")[numbers]
    heights, widths = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [attempts, B]
    fits = (heights < side) & (widths < side)
    is_erased = fits.any(0) & (rng.uniform((seed, draw, ERASING), index) < probability)
    first, rows = fits.argmax(0), np.arange(len(index))
    sizes = []
    for lengths, purpose in ((heights, ERASING_TOP), (widths, ERASING_LEFT)):
        length = lengths[first, rows].astype(np.int64)
        start = (rng.uniform((seed, draw, purpose), index) * (side - length + 1)).astype(np.int64)
        sizes += [start, start + length]
    top, bottom, left, right = sizes
    rectangles: Rectangles = np.where(is_erased[:, None], np.stack([top, left, bottom, right], axis=1), 0)
    return rectangles


def erase(pixels: NDArray[np.uint8], rectangles: Rectangles, side: int) -> None:
    """Blacken rectangles of views uint8 [B, C, S, S] in place.

    Args:
        pixels: The views.
        rectangles: As `draw_erased` gives them, for views of the side.
        side: The side for which they were drawn.
    """
    scaled = scale_rectangles(rectangles, side, pixels.shape[-1]).tolist()
    for view, (top, left, bottom, right) in zip(pixels, scaled, strict=True):
        view[:, top:bottom, left:right] = 0
