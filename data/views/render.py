"""Augmented views: the pixels, or the numbers of a row, for (index, draw), which are always the same.

A view is a pure function of (view policy, seed, index, draw). The teacher gets it in stage one, the student gets it
again in stage two, and a checksum of it is stored in the cache. Every random number comes from `rng.bits`, so
neither batch size, order, workers nor processes can change a pixel.
"""

import decimal
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.images.decoding import Box

from .policy import ViewPolicy
from .rows import add_noise, mix_rows

Draw = int | NDArray[np.int64]  # one draw for all images of a batch, or int64 [B], one for each

# What a random number decides: a part of its key, so that a new parameter never shifts the numbers of an old one.
CROP_TOP, CROP_LEFT, FLIP, BOX_AREA, BOX_RATIO, BOX_TOP, BOX_LEFT, MIXUP_PARTNER, MIXUP_SHARE = range(9)
ATTEMPT_AREA, ATTEMPT_RATIO, ATTEMPT_TOP, ATTEMPT_LEFT = range(9, 13)  # the first two followed by the attempt
NOISE = 13  # followed by the number of four entries of a row

_BOX_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


class ImageSource(Protocol):
    """N images as `render` reads them: in memory (ImageArrays), in files (ImageFolder), of a dataset (DatasetImages).

    Rows of numbers (RowArrays) are read the same way; they have no size, and their views are float32 [B, *shape].

    In all methods, `index` is int64 [B] with values in [0, N), and `size`, `resize` and `interpolation` are those of
    ViewPolicy.
    """

    def __len__(self) -> int: ...

    def describe(self, i: int) -> str:
        """Return where image i is stored, such as its file or row; empty where it is one of many in a file."""

    def load_plain(
        self, index: NDArray[np.int64], size: int, resize: int, interpolation: str = "bilinear"
    ) -> torch.Tensor:
        """Return the images as stored, or scaled until the shorter side is `resize` and cut to their centre.

        Returns:
            uint8 [B, C, size, size], a copy that the caller may change.
        """

    def load_padded(
        self, index: NDArray[np.int64], size: int, resize: int, pad: int, interpolation: str = "bilinear"
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return plain images with a border of zeros.

        Returns:
            Images, uint8 [M, C, size + 2 * pad, size + 2 * pad], not to be changed, and the rows of them that are the
            images `index`, int64 [B]. M is B, or N where all images are padded at once.
        """

    def load_boxes(
        self,
        index: NDArray[np.int64],
        size: int,
        box: Callable[[int, int, int], Box],
        interpolation: str = "bilinear",
    ) -> torch.Tensor:
        """Cut one box out of each image and resize it.

        Args:
            box: Called with (row of the batch, width, height of the stored image).

        Returns:
            uint8 [B, C, size, size].
        """


def render(images: ImageSource, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw) -> torch.Tensor:
    """Render the views of a batch of images.

    A file is decoded once for neighbours in `index` that are the same image, so k draws of an image, one after the
    other, cost one decoding.

    The pixels are moved by NumPy, not by torch: training renders in a background thread, where torch's kernels would
    start a second team of OpenMP threads that spins against the student's: 5.6 s instead of 3.4 s for 3,000 steps of
    a small student on 2 cores.

    Args:
        images: N images.
        policy: How views are made.
        seed: The seed of the views, any int.
        index: int64 [B], the images to render, in [0, N).
        draw: Which of its views is rendered of each image: one draw for all, or int64 [B].

    Returns:
        uint8 [B, C, size, size]; of rows of numbers, float32 [B, *shape].

    Raises:
        CacheError: An image file cannot be decoded.
    """
    views = _render_unmixed(images, policy, seed, index, draw)
    if policy.mixup > 0:
        partner, share = draw_mixup(policy, seed, index, draw, len(images))
        mix = _mix if views.dtype == torch.uint8 else mix_rows
        views = mix(views, _render_unmixed(images, policy, seed, partner, draw), share)
    return views


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


def _mix(views: torch.Tensor, partners: torch.Tensor, share: NDArray[np.int64]) -> torch.Tensor:
    """Rounded weighted mean of uint8 [B, C, S, S] and its partners, with weights share / 256, int64 [B]."""
    weight = share.astype(np.uint16)[:, None, None, None]
    mixed = np.multiply(views.numpy(), weight, dtype=np.uint16)  # the sums are at most 255 * 256 + 128: no overflow
    mixed += np.multiply(partners.numpy(), 256 - weight, dtype=np.uint16)
    mixed += 128
    mixed >>= 8
    return torch.from_numpy(mixed.astype(np.uint8))


def _render_unmixed(
    images: ImageSource, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    if policy.resized_crop:
        draw_boxes = _draw_boxes if policy.revision == 2 else _draw_boxes_of_revision_1
        boxes = draw_boxes(policy, seed, index, draw)
        views = images.load_boxes(index, policy.size, boxes, policy.interpolation)
    elif policy.crop and policy.pad:
        views = _random_crop(images, policy, seed, index, draw)
    else:
        views = images.load_plain(index, policy.size, policy.resize, policy.interpolation)
    if policy.noise:
        views = add_noise(views, policy.std, (seed, draw, NOISE), index)
    if policy.flip:
        pixels = views.numpy()  # changed in place: every branch above made a copy
        is_flipped = rng.integers((seed, draw, FLIP), index, 2) == 1
        pixels[is_flipped] = pixels[is_flipped][..., ::-1]
    return views


def _random_crop(
    images: ImageSource, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    pad = policy.pad * policy.scale
    padded, rows = images.load_padded(index, policy.size, policy.resize, pad, policy.interpolation)
    top = policy.scale * rng.integers((seed, draw, CROP_TOP), index, 2 * policy.pad + 1)
    left = policy.scale * rng.integers((seed, draw, CROP_LEFT), index, 2 * policy.pad + 1)
    size = padded.shape[-1] - 2 * pad
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))  # [N, C, 2p+1, 2p+1, S, S]
    return torch.from_numpy(windows[rows, :, top, left])


def pad_images(images: NDArray[np.uint8], pad: int) -> NDArray[np.uint8]:
    """Return uint8 [B, C, H + 2 * pad, W + 2 * pad]: images uint8 [B, C, H, W] with a border of zeros."""
    B, C, H, W = images.shape
    padded = np.zeros((B, C, H + 2 * pad, W + 2 * pad), np.uint8)
    padded[:, :, pad : pad + H, pad : pad + W] = images
    return padded


def _draw_boxes(policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw) -> Callable[[int, int, int], Box]:
    """Draw the boxes of resized crops with the distribution of torchvision's RandomResizedCrop.

    An attempt draws an area, uniform from min_scale to 1 of the image's, and a ratio, log-uniform from 3/4 to 4/3. The
    first of ten attempts whose box fits into the image gets a uniform position. When none fits, the box is the largest
    one in the centre whose ratio is within these bounds.

    Only sums, products, quotients and square roots are computed here: IEEE 754 rounds those correctly on every
    machine, but not logarithms and powers. The ratios therefore come from a table.
    """
    attempts = np.arange(_BOX_ATTEMPTS)[:, None]
    area = rng.uniform((seed, draw, ATTEMPT_AREA, attempts), index)
    shares = (policy.min_scale + (1.0 - policy.min_scale) * area).T.tolist()
    ratios = _tabulate_ratios()[rng.integers((seed, draw, ATTEMPT_RATIO, attempts), index, _RATIOS)].T.tolist()
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


_RATIOS = 4096


@lru_cache(maxsize=1)
def _tabulate_ratios() -> NDArray[np.float64]:
    """4,096 equally likely ratios, log-uniform from 3/4 to 4/3: the same numbers on every machine.

    Python's decimal module rounds exponentials and logarithms correctly, unlike the C library.
    """
    with decimal.localcontext(decimal.Context(prec=30)):
        step = 2 * (decimal.Decimal(4) / 3).ln() / _RATIOS
        middles = (decimal.Decimal(2 * k + 1 - _RATIOS) / 2 for k in range(_RATIOS))
        return np.array([float((step * middle).exp()) for middle in middles])


def _draw_boxes_of_revision_1(
    policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> Callable[[int, int, int], Box]:
    """Draw the boxes of resized crops as for caches without a revision: every draw is made to fit.

    The mean area is 0.54 where `_draw_boxes` has 0.48, and more boxes touch two opposite sides of the image.
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
