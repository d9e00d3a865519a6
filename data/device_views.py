"""Views of images that lie on a device: the very pixels of views.render, moved by torch where they are.

The random numbers are those of views.py, made by NumPy: a few bytes for each view. Nothing waits for the device.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from softcache.base import rng

from .image_arrays import ImageArrays
from .views import _FLIP, _LEFT, _TOP, Draw, ImageSource, ViewPolicy, draw_mixup


def copy_to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on a device. To a GPU it goes by way of pinned memory, and whoever sends it does not wait for the copy."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def can_render_on_device(images: ImageSource, policy: ViewPolicy) -> bool:
    """Whether the images are in memory and nothing is resized, which Pillow does."""
    if policy.resized_crop or not isinstance(images, ImageArrays):
        return False
    return {policy.size, policy.resize} <= {0, images.pixels.shape[-1]}


def render_on_device(
    images: torch.Tensor, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    """As views.render, of images uint8 [N, C, H, W] on any device: uint8 [B, C, H, W] on that device."""
    views = _render_one(images, policy, seed, index, draw)
    if policy.mixup > 0:
        partner, share = draw_mixup(policy, seed, index, draw, len(images))
        w = copy_to_device(torch.from_numpy(share).int(), images.device)[:, None, None, None]
        other = _render_one(images, policy, seed, partner, draw)
        views = ((views.int() * w + other.int() * (256 - w) + 128) >> 8).byte()
    return views


def _render_one(
    images: torch.Tensor, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    def numbers(purpose: int, below: int) -> torch.Tensor:
        return copy_to_device(torch.from_numpy(rng.integers((seed, draw, purpose), index, below)), images.device)

    views = images.index_select(0, copy_to_device(torch.from_numpy(index), images.device))
    if policy.crop and policy.pad:
        pad, (H, W) = policy.pad, images.shape[-2:]
        windows = F.pad(views, (pad, pad, pad, pad)).unfold(2, H, 1).unfold(3, W, 1)  # [B, C, 2p+1, 2p+1, H, W]
        rows = torch.arange(len(index), device=images.device)
        views = windows[rows, :, numbers(_TOP, 2 * pad + 1), numbers(_LEFT, 2 * pad + 1)]
    if policy.flip:
        turned = numbers(_FLIP, 2)[:, None, None, None] == 1
        views = torch.where(turned, views.flip(3), views)  # not by a mask: its length would have to be waited for
    return views
