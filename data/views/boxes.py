"""The boxes of resized crops, drawn for (index, draw)."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.images.decoding import Box

from .draws import (
    ATTEMPT_AREA,
    ATTEMPT_LEFT,
    ATTEMPT_RATIO,
    ATTEMPT_TOP,
    BOX_AREA,
    BOX_LEFT,
    BOX_RATIO,
    BOX_TOP,
    Draw,
)
from .policy import ViewPolicy
from .ratios import RATIOS, tabulate_ratios

_BOX_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


def draw_boxes(policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw) -> Callable[[int, int, int], Box]:
    """Draw the boxes of resized crops, in the way of the policy's revision.

    Args:
        policy: A policy with a resized crop.
        seed: The seed of the views.
        index: int64 [B], the images.
        draw: One draw for all, or int64 [B].

    Returns:
        The box of an image: (row of the batch, width, height of the stored image) -> box.
    """
    if policy.revision == 1:
        return _draw_boxes_of_revision_1(policy, seed, index, draw)
    return _draw_fitting_boxes(policy, seed, index, draw)


def _draw_fitting_boxes(
    policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> Callable[[int, int, int], Box]:
    """Draw the boxes of resized crops with the distribution of torchvision's RandomResizedCrop.

    An attempt draws an area, uniform from min_scale to 1 of the image's (with several crops, within the scales of the
    draw, see `_find_scales`), and a ratio, log-uniform from 3/4 to 4/3. The
    first of ten attempts whose box fits into the image gets a uniform position. When none fits, the box is the largest
    one in the centre whose ratio is within these bounds.

    Only sums, products, quotients and square roots are computed here: IEEE 754 rounds those correctly on every
    machine, but not logarithms and powers. The ratios therefore come from a table.
    """
    attempts = np.arange(_BOX_ATTEMPTS)[:, None]
    area = rng.uniform((seed, draw, ATTEMPT_AREA, attempts), index)
    least, largest = _find_scales(policy, draw)
    shares = (least + (largest - least) * area).T.tolist()
    numbers = rng.integers((seed, draw, ATTEMPT_RATIO, attempts), index, RATIOS)
    ratios = tabulate_ratios("3/4", "4/3")[numbers].T.tolist()
    top, left = (rng.uniform((seed, draw, purpose), index).tolist() for purpose in (ATTEMPT_TOP, ATTEMPT_LEFT))

    def box(row: int, width: int, height: int) -> Box:
        for share, ratio in zip(shares[row], ratios[row], strict=True):
            area = share * (width * height)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(left[row] * (width - w + 1)), int(top[row] * (height - h + 1))
                return float(x), float(y), float(x + w), float(y + h)
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        x, y = (width - w) // 2, (height - h) // 2
        return float(x), float(y), float(x + w), float(y + h)

    return box


def _find_scales(policy: ViewPolicy, draw: Draw) -> tuple[float | NDArray[np.float64], float | NDArray[np.float64]]:
    """Return the least and the largest share of a box, of each draw: global crops, then local ones, then again."""
    if not policy.global_crops + policy.local_crops:
        return policy.min_scale, 1.0
    is_global = np.asarray(draw) % (policy.global_crops + policy.local_crops) < policy.global_crops
    return np.where(is_global, policy.global_scale, policy.min_scale), np.where(is_global, 1.0, policy.global_scale)


def _draw_boxes_of_revision_1(
    policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> Callable[[int, int, int], Box]:
    """Draw the boxes of resized crops as for caches without a revision: every draw is made to fit.

    The mean area is 0.54 where `_draw_fitting_boxes` has 0.48, and more boxes touch two opposite sides of the image.
    """
    area, ratio, top, left = (
        rng.uniform((seed, draw, purpose), index) for purpose in (BOX_AREA, BOX_RATIO, BOX_TOP, BOX_LEFT)
    )

    def box(row: int, width: int, height: int) -> Box:
        share = policy.min_scale + (1.0 - policy.min_scale) * area[row]
        share = min(share, 4 * height / (3 * width), 4 * width / (3 * height))  # the most that such ratios allow
        aspect = (3.0 + ratio[row]) / (4.0 - ratio[row])
        aspect = min(max(aspect, share * width / height), width / (share * height))  # so that the box fits
        w = min(max(1, round(float(np.sqrt(share * width * height * aspect)))), width)
        h = min(max(1, round(float(np.sqrt(share * width * height / aspect)))), height)
        x, y = int(left[row] * (width - w + 1)), int(top[row] * (height - h + 1))
        return float(x), float(y), float(x + w), float(y + h)

    return box
