"""Shears, translations and rotations of views, to the nearest pixel and in integers."""

import math

import numpy as np
from numpy.typing import NDArray

from .color import Pixels

_BITS = 17  # of a fixed-point number: coefficients of 2**-16, of coordinates in half pixels
_ONE = 1 << (_BITS - 1)


def make_shear(units: NDArray[np.int64], side: int, *, is_vertical: bool) -> NDArray[np.int64]:
    """Return the coefficients of shears that keep the upper left corner, for `sample_nearest`.

    Args:
        units: int64 [B], the tangent of the angle in units of 2**-16.
        side: Of a view, in pixels.
        is_vertical: Move columns, not rows.
    """
    one, shift = np.full_like(units, _ONE), units * side
    centre = np.full_like(units, _ONE * side)
    if is_vertical:
        return np.stack([one, 0 * units, centre, units, one, centre + shift], axis=1)
    return np.stack([one, units, centre + shift, 0 * units, one, centre], axis=1)


def make_translation(pixels: NDArray[np.int64], drawn_side: int, side: int, *, is_vertical: bool) -> NDArray[np.int64]:
    """Return the coefficients of translations to the right, or downwards, for `sample_nearest`.

    Args:
        pixels: int64 [B], by how many pixels of a view of the drawn side.
        drawn_side: In pixels.
        side: Of a view, in pixels.
        is_vertical: Move downwards.
    """
    one, zero = np.full_like(pixels, _ONE), 0 * pixels
    centre = np.full_like(pixels, _ONE * side)
    moved = centre - ((pixels * side) << _BITS) // drawn_side
    x, y = (centre, moved) if is_vertical else (moved, centre)
    return np.stack([one, zero, x, zero, one, y], axis=1)


def make_rotation(degrees: int, signs: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Return the coefficients of rotations about the centre, for `sample_nearest`.

    Args:
        degrees: The angle. Its sine and cosine are rounded to 2**-16, which no error of a last bit can change.
        signs: int64 [B], 1 to turn to the left, -1 to the right.
        side: Of a view, in pixels.
    """
    cosine = np.full_like(signs, round(_ONE * math.cos(math.radians(degrees))))
    sine = signs * round(_ONE * math.sin(math.radians(degrees)))
    centre = np.full_like(signs, _ONE * side)
    return np.stack([cosine, -sine, centre, sine, cosine, centre], axis=1)


def sample_nearest(pixels: Pixels, coefficients: NDArray[np.int64]) -> Pixels:
    """Return views whose pixels are the nearest ones at other coordinates; black outside of the image.

    Args:
        pixels: uint8 [B, C, S, S].
        coefficients: int64 [B, 6]: (a, b, c, d, e, f). With x and y the distances of a pixel from the centre in half
            pixels, its source is the column floor((a x + b y + c) / 2**17) and the row floor((d x + e y + f) / 2**17).
    """
    B, C, S, _ = pixels.shape
    half_pixels = 2 * np.arange(S, dtype=np.int32) + 1 - S
    a, b, c, d, e, f = coefficients.astype(np.int32).T[:, :, None]  # [B, 1] each
    columns = ((a * half_pixels + c)[:, None] + (b * half_pixels)[:, :, None]) >> _BITS  # [B, S, S]
    rows = ((d * half_pixels + f)[:, None] + (e * half_pixels)[:, :, None]) >> _BITS
    is_inside = (columns >= 0) & (columns < S) & (rows >= 0) & (rows < S)
    source = np.where(is_inside, rows * S + columns, S * S)
    with_black = np.zeros((B * C, S * S + 1), np.uint8)  # one black pixel behind each channel
    with_black[:, :-1] = pixels.reshape(B * C, S * S)
    first = (S * S + 1) * np.arange(B * C).reshape(B, C, 1)
    sampled: Pixels = with_black.ravel()[source.reshape(B, 1, S * S) + first].reshape(pixels.shape)
    return sampled
