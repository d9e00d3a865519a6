"""Jitter: random brightness, contrast, saturation and hue, in random order; and random grey views."""

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng

from .color import Pixels, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, convert_to_gray
from .draws import GRAY, JITTER_BRIGHTNESS, JITTER_CONTRAST, JITTER_HUE, JITTER_ORDER, JITTER_SATURATION, Draw

_STEPS = (  # each with what its factors are drawn for
    (adjust_brightness, JITTER_BRIGHTNESS),
    (adjust_contrast, JITTER_CONTRAST),
    (adjust_saturation, JITTER_SATURATION),
    (adjust_hue, JITTER_HUE),
)
_ORDERS = np.array(list(permutations(range(len(_STEPS)))))


def jitter(pixels: Pixels, strength: float, hue: float, *, seed: int, index: NDArray[np.int64], draw: Draw) -> None:
    """Change the colours of views in place, with the distribution of torchvision's ColorJitter.

    Args:
        pixels: uint8 [B, C, S, S].
        strength: Factors of brightness, contrast and saturation are uniform from 1 - strength to 1 + strength.
        hue: It is turned by a uniform part of the circle from -hue to hue.
        seed: The seed of the views.
        index: int64 [B], the images.
        draw: One draw for all, or int64 [B].
    """
    orders = _ORDERS[rng.integers((seed, draw, JITTER_ORDER), index, len(_ORDERS))]
    factors = draw_factors(strength, hue, seed, index, draw)
    for place in range(len(_STEPS)):
        for number, (step, _) in enumerate(_STEPS):
            rows = np.flatnonzero(orders[:, place] == number)
            if (strength if step is not adjust_hue else hue) > 0 and len(rows):
                pixels[rows] = step(pixels[rows], factors[number, rows])


def draw_factors(strength: float, hue: float, seed: int, index: NDArray[np.int64], draw: Draw) -> NDArray[np.float64]:
    """Draw the factors of brightness, contrast, saturation, and the part of the circle of hue, float64 [4, B]."""
    numbers = [2 * rng.uniform((seed, draw, purpose), index) - 1 for _, purpose in _STEPS]  # from -1 to below 1
    return np.stack([*(1 + strength * number for number in numbers[:3]), hue * numbers[3]])


def make_some_gray(pixels: Pixels, probability: float, seed: int, index: NDArray[np.int64], draw: Draw) -> None:
    """Make views grey in place, each with the probability; as torchvision's RandomGrayscale."""
    rows = np.flatnonzero(rng.uniform((seed, draw, GRAY), index) < probability)
    pixels[rows] = convert_to_gray(pixels[rows])
