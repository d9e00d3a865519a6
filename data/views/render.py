"""Augmented views: the pixels, or the numbers of a row, for (index, draw), which are always the same.

A view is a pure function of (view policy, seed, index, draw). The teacher gets it in stage one, the student gets it
again in stage two, and a checksum of it is stored in the cache. Every random number comes from `rng.bits`, so
neither batch size, order, workers nor processes can change a pixel.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.images.decoding import Box

from .augmentation import augment
from .boxes import draw_boxes
from .draws import CROP_LEFT, CROP_TOP, FLIP, NOISE, Draw
from .mixing import draw_mixing, mix_images
from .policy import ViewPolicy
from .rows import add_noise, mix_rows


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
    if policy.mixes_images:
        side = policy.drawn_size or views.shape[-1]
        mixing = draw_mixing(policy, seed, index, draw, len(images), side)
        partners = _render_unmixed(images, policy, seed, mixing.partner, draw)
        if views.dtype != torch.uint8:
            return mix_rows(views, partners, mixing.weight)
        views = mix_images(views, partners, mixing)
    return views


def _render_unmixed(
    images: ImageSource, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    if policy.resized_crop:
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
    if policy.changes_pixels:
        augment(views.numpy(), policy, seed, index, draw)
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
