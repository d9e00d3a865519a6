"""Mixup and CutMix: which second image a view is mixed with, by which share, and in which box."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base import rng

from .draws import CUTMIX_LEFT, CUTMIX_SHARE, CUTMIX_TOP, MIX_KIND, MIXUP_PARTNER, MIXUP_SHARE, Draw
from .policy import ViewPolicy
from .rectangles import Rectangles, scale_rectangles

_QUANTILES = 4096  # of a table of shares
_WHOLE = 1 << 16  # the share 1 of CutMix


@dataclass(frozen=True)
class Mixing:
    """How the views of a batch are mixed with views of other images.

    Attributes:
        partner: int64 [B] in [0, n), the images that are mixed in.
        weight: int64 [B], of the view's own pixels in the mean of both, in units of 1/256; 256 where a box is cut.
        boxes: int64 [B, 4], where the partner alone is seen, in pixels of views of the side; empty in a mean.
        side: Of a view, in pixels.
    """

    partner: NDArray[np.int64]
    weight: NDArray[np.int64]
    boxes: Rectangles
    side: int

    @property
    def share(self) -> NDArray[np.float64]:
        """float64 [B] in 0 … 1, the share of the view's own image: its weight, or the area outside of the box."""
        top, left, bottom, right = self.boxes.T
        area = self.side * self.side
        share: NDArray[np.float64] = self.weight / 256 * ((area - (bottom - top) * (right - left)) / area)
        return share  # the product of two factors, of which one is 1


def draw_mixing(policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw, n: int, side: int) -> Mixing:
    """Draw the second image of each mixed view, and how both are seen.

    Args:
        policy: A policy that mixes images.
        seed: The seed of the views.
        index: int64 [B], the first images.
        draw: One draw for all, or int64 [B].
        n: Number of images to draw from.
        side: Of a student's view, in pixels; any number for rows of numbers.
    """
    partner, weight = _draw_partners(seed, index, draw, n), np.full(len(index), 256)
    boxes = np.zeros((len(index), 4), np.int64)
    if policy.mixup > 0:
        weight = draw_mixup(policy, seed, index, draw, n)[1]
    if policy.cutmix > 0:
        boxes = _draw_cut_boxes(policy.cutmix, seed, index, draw, side)
    if policy.mixup > 0 and policy.cutmix > 0:
        is_cut = rng.integers((seed, draw, MIX_KIND), index, 2) == 1
        weight, boxes = np.where(is_cut, 256, weight), np.where(is_cut[:, None], boxes, 0)
    return Mixing(partner, weight, boxes, side)


def draw_mixup(
    policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the second image of each view, and the first one's share, where all views are means of two.

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
    table = _tabulate_shares(policy.mixup, 256)
    share = table[rng.integers((seed, draw, MIXUP_SHARE), index, _QUANTILES)]
    return _draw_partners(seed, index, draw, n), share


def _draw_partners(seed: int, index: NDArray[np.int64], draw: Draw, n: int) -> NDArray[np.int64]:
    return (index + 1 + rng.integers((seed, draw, MIXUP_PARTNER), index, max(n - 1, 1))) % n


def _draw_cut_boxes(alpha: float, seed: int, index: NDArray[np.int64], draw: Draw, side: int) -> Rectangles:
    """Draw the boxes as torchvision's CutMix: int64 [B, 4].

    The centre is a uniform pixel, half the side is floor(side / 2 * sqrt(1 - share)), and what is outside of the view
    is cut off. The square root is one of a whole number below 2**53, so its floor is exact.
    """
    share = _tabulate_shares(alpha, _WHOLE)[rng.integers((seed, draw, CUTMIX_SHARE), index, _QUANTILES)]
    roots = np.sqrt(((_WHOLE - share) * side * side).astype(np.float64))
    half = roots.astype(np.int64) // 512  # 2 * sqrt(65536)
    top, left = (rng.integers((seed, draw, purpose), index, side) for purpose in (CUTMIX_TOP, CUTMIX_LEFT))
    return np.clip(np.stack([top - half, left - half, top + half, left + half], axis=1), 0, side)


@lru_cache(maxsize=8)
def _tabulate_shares(alpha: float, whole: int) -> NDArray[np.int64]:
    """4,096 equally likely shares of Beta(alpha, alpha), rounded to 1 / whole: the same pixels on every machine.

    The middles of 4,096 parts of 0 … 1 are no ties of 1/256 (but of 1/4096) where alpha is 1.
    """
    from scipy.stats import beta  # not at the top: `softcache losses` starts in 2.5 s instead of 4.4 s

    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    shares: NDArray[np.int64] = np.rint(whole * beta.ppf(quantiles, alpha, alpha)).astype(np.int64)
    return shares


def mix_images(views: torch.Tensor, partners: torch.Tensor, mixing: Mixing) -> torch.Tensor:
    """Return views uint8 [B, C, S, S] mixed with their partners: a rounded weighted mean, or a box of the partner."""
    pixels, partner_pixels = views.numpy(), partners.numpy()
    if (mixing.weight < 256).any():
        weight = mixing.weight.astype(np.uint16)[:, None, None, None]
        mixed = np.multiply(pixels, weight, dtype=np.uint16)  # the sums are at most 255 * 256 + 128: no overflow
        mixed += np.multiply(partner_pixels, 256 - weight, dtype=np.uint16)
        mixed += 128
        mixed >>= 8
        pixels = mixed.astype(np.uint8)
    if mixing.boxes.any():
        boxes = scale_rectangles(mixing.boxes, mixing.side, pixels.shape[-1]).tolist()
        for view, partner, (top, left, bottom, right) in zip(pixels, partner_pixels, boxes, strict=True):
            view[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return torch.from_numpy(pixels)
