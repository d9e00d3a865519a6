"""RandAugment: some operations of one magnitude on each view (Cubuk et al. 2020, arXiv:1909.13719).

Operations, magnitudes and signs are those of torchvision's RandAugment with 31 magnitudes, nearest pixels and black
where the image ends.
"""

import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import UsageError

from . import color
from .affine import make_rotation, make_shear, make_translation, sample_nearest
from .color import Pixels
from .draws import RANDAUGMENT_OPERATION, RANDAUGMENT_SIGN, Draw

OPERATIONS = (  # in the order of their numbers
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "stretch_contrast",
    "equalize",
)
_FIRST_MOVE, _LAST_MOVE = 1, 5  # of OPERATIONS
_BLENDS = (color.adjust_brightness, color.adjust_saturation, color.adjust_contrast, color.adjust_sharpness)
_FIRST_BLEND = 6
_MOST_OPERATIONS, _LARGEST_MAGNITUDE = 16, 30


def parse_randaugment(text: str) -> tuple[int, int]:
    """Parse the number of operations on each view and their magnitude, such as 2x9.

    Raises:
        UsageError: The text is something else, or a number is out of its range.
    """
    if not (match := re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", text)):
        raise UsageError(f"randaugment={text} is not OPERATIONSxMAGNITUDE, such as 2x9")
    operations, magnitude = int(match[1]), int(match[2])
    if not (1 <= operations <= _MOST_OPERATIONS and magnitude <= _LARGEST_MAGNITUDE):
        raise UsageError(
            f"randaugment={text} is outside 1x0 to {_MOST_OPERATIONS}x{_LARGEST_MAGNITUDE}: operations and magnitude"
        )
    return operations, magnitude


def augment_randomly(
    pixels: Pixels, text: str, *, seed: int, index: NDArray[np.int64], draw: Draw, drawn_side: int
) -> None:
    """Apply random operations to views in place, one after the other.

    Args:
        pixels: uint8 [B, C, S, S].
        text: Number of operations and their magnitude, see `parse_randaugment`.
        seed: The seed of the views.
        index: int64 [B], the images.
        draw: One draw for all, or int64 [B].
        drawn_side: Of a student's view: translations are whole pixels of it.
    """
    slots, magnitude = parse_randaugment(text)
    for slot in range(slots):
        operations, signs = draw_operations(seed, index, draw, slot)
        _move(pixels, operations, signs, magnitude, drawn_side)
        factors = 1 + signs.astype(np.float64) * (0.03 * magnitude)
        for number, adjust in enumerate(_BLENDS, start=_FIRST_BLEND):
            rows = np.flatnonzero(operations == number)
            pixels[rows] = adjust(pixels[rows], factors[rows])
        rows = np.flatnonzero(operations == OPERATIONS.index("posterize"))
        pixels[rows] = color.posterize(pixels[rows], 8 - (8 * magnitude + 30) // 60)
        rows = np.flatnonzero(operations == OPERATIONS.index("solarize"))
        pixels[rows] = color.solarize(pixels[rows], (511 - 17 * magnitude) // 2)
        rows = np.flatnonzero(operations == OPERATIONS.index("stretch_contrast"))
        pixels[rows] = color.stretch_contrast(pixels[rows])
        rows = np.flatnonzero(operations == OPERATIONS.index("equalize"))
        pixels[rows] = color.equalize(pixels[rows])


def draw_operations(
    seed: int, index: NDArray[np.int64], draw: Draw, slot: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the number of the operation of a slot, int64 [B], and its sign, 1 or -1, int64 [B]."""
    operations = rng.integers((seed, draw, RANDAUGMENT_OPERATION, slot), index, len(OPERATIONS))
    return operations, 1 - 2 * rng.integers((seed, draw, RANDAUGMENT_SIGN, slot), index, 2)


def _move(
    pixels: Pixels, operations: NDArray[np.int64], signs: NDArray[np.int64], magnitude: int, drawn_side: int
) -> None:
    """Shear, translate and rotate the views whose operation is one of these, in place and at once."""
    rows = np.flatnonzero((operations >= _FIRST_MOVE) & (operations <= _LAST_MOVE))
    table = _tabulate_moves(magnitude, drawn_side, pixels.shape[-1])
    pixels[rows] = sample_nearest(pixels[rows], table[operations[rows] - _FIRST_MOVE, (1 - signs[rows]) // 2])


@lru_cache(maxsize=8)
def _tabulate_moves(magnitude: int, drawn_side: int, side: int) -> NDArray[np.int64]:
    """The coefficients of each move, int64 [5, 2, 6]: with the sign 1, and with -1."""
    signs = np.array([1, -1])
    tangents = signs * round((1 << 16) * 0.01 * magnitude)
    steps = signs * (150 * drawn_side * magnitude // (331 * 30))
    return np.stack(
        [
            make_shear(tangents, side, is_vertical=False),
            make_shear(tangents, side, is_vertical=True),
            make_translation(steps, drawn_side, side, is_vertical=False),
            make_translation(steps, drawn_side, side, is_vertical=True),
            make_rotation(magnitude, signs, side),
        ]
    )
