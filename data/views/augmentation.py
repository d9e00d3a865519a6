"""What is done to the pixels of a view after it is cut out and flipped, in the order of the functions here."""

import numpy as np
from numpy.typing import NDArray

from .draws import Draw
from .erasing import draw_erased, erase
from .jitter import jitter, make_some_gray
from .policy import ViewPolicy
from .randaugment import augment_randomly


def augment(pixels: NDArray[np.uint8], policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw) -> None:
    """Change views in place, as far as the policy says so.

    Args:
        pixels: uint8 [B, C, S, S].
        policy: How views are made.
        seed: The seed of the views.
        index: int64 [B], the image of each.
        draw: One draw for all, or int64 [B].
    """
    side = policy.drawn_size or pixels.shape[-1]
    if policy.randaugment:
        augment_randomly(pixels, policy.randaugment, seed=seed, index=index, draw=draw, drawn_side=side)
    if policy.jitter > 0 or policy.hue > 0:
        jitter(pixels, policy.jitter, policy.hue, seed=seed, index=index, draw=draw)
    if policy.gray > 0:
        make_some_gray(pixels, policy.gray, seed, index, draw)
    if policy.erasing > 0:
        erase(pixels, draw_erased(policy.erasing, seed, index, draw, side), side)
