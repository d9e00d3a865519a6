"""Rectangles of whole pixels inside of a view."""

import numpy as np
from numpy.typing import NDArray

Rectangles = NDArray[np.int64]  # [B, 4]: top, left, bottom, right; of the last two, the row and column after it


def scale_rectangles(rectangles: Rectangles, side: int, new_side: int) -> Rectangles:
    """Scale rectangles from views of a side to views of another side, and round half up to whole pixels."""
    if side == new_side:
        return rectangles
    return (2 * rectangles * new_side + side) // (2 * side)
