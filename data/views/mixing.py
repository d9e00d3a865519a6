"""Mixup: which second image a view is mixed with, and by which share."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base import rng

from .draws import MIXUP_PARTNER, MIXUP_SHARE, Draw
from .policy import ViewPolicy


def draw_mixup(
    policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the second image of each mixed view, and the first one's share.

    Args:
        policy: A policy with mixup > 0.
        seed: The seed of the views.
        index: int64 [B], the first images.
        draw: One draw for all, or int64 [B].
        n: Number of images to draw from.

    Returns:
        The partners, int64 [B] in [0, n), never the image itself unless n is 1; and the shares of the first images,
        int64 [B] in units of 1/256, 0 to 256.
    """
    step = 1 + rng.integers((seed, draw, MIXUP_PARTNER), index, max(n - 1, 1))
    table = _tabulate_shares(policy.mixup)
    share = table[rng.integers((seed, draw, MIXUP_SHARE), index, len(table))]
    return (index + step) % n, share


@lru_cache(maxsize=8)
def _tabulate_shares(alpha: float) -> NDArray[np.int64]:
    """4,096 equally likely shares of Beta(alpha, alpha), rounded to 1/256: the same pixels on every machine."""
    from scipy.stats import beta  # not at the top: `softcache losses` starts in 2.5 s instead of 4.4 s

    quantiles = (np.arange(4096) + 0.5) / 4096
    shares: NDArray[np.int64] = np.rint(256 * beta.ppf(quantiles, alpha, alpha)).astype(np.int64)
    return shares


def mix_images(views: torch.Tensor, partners: torch.Tensor, share: NDArray[np.int64]) -> torch.Tensor:
    """Return the rounded weighted mean of uint8 [B, C, S, S] and its partners, with weights share / 256, int64 [B]."""
    weight = share.astype(np.uint16)[:, None, None, None]
    mixed = np.multiply(views.numpy(), weight, dtype=np.uint16)  # the sums are at most 255 * 256 + 128: no overflow
    mixed += np.multiply(partners.numpy(), 256 - weight, dtype=np.uint16)
    mixed += 128
    mixed >>= 8
    return torch.from_numpy(mixed.astype(np.uint8))
