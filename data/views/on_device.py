"""Views of images that are on a device: the same pixels as views.render gives, computed by torch on that device.

The random numbers are those of render.py, computed by NumPy on the CPU: a few bytes for each view. Nothing waits for
the device.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.images.image_arrays import ImageArrays

from .draws import CROP_LEFT, CROP_TOP, FLIP, Draw
from .erasing import draw_erased
from .mixing import draw_mixing
from .policy import ViewPolicy
from .rectangles import Rectangles
from .render import ImageSource


def copy_to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device. A copy to a GPU goes through pinned memory, and nothing waits for its end."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def can_render_on_device(images: ImageSource, policy: ViewPolicy) -> bool:
    """Return whether the images are in memory, and their views are made by copies, masks and means.

    Only Pillow resizes images, and colours are changed by NumPy alone.
    """
    if policy.resized_crop or policy.changes_colors or not isinstance(images, ImageArrays):
        return False
    return {policy.size, policy.resize} <= {0, images.size}


def render_on_device(
    images: torch.Tensor, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    """Render the views of a batch of images, as views.render does, on the device of the images.

    Args:
        images: uint8 [N, C, H, W], all images.
        policy: How views are made; see `can_render_on_device`.
        seed: The seed of the views.
        index: int64 [B], the images to render, in [0, N).
        draw: One draw for all, or int64 [B].

    Returns:
        uint8 [B, C, H, W].
    """
    views = _render_unmixed(images, policy, seed, index, draw)
    if policy.mixes_images:
        mixing = draw_mixing(policy, seed, index, draw, len(images), images.shape[-1])
        partner_views = _render_unmixed(images, policy, seed, mixing.partner, draw)
        if policy.mixup > 0:
            weight = copy_to_device(torch.from_numpy(mixing.weight).int(), images.device)[:, None, None, None]
            views = ((views.int() * weight + partner_views.int() * (256 - weight) + 128) >> 8).byte()
        if policy.cutmix > 0:
            views = torch.where(_make_masks(mixing.boxes, images), partner_views, views)
    return views


def _make_masks(rectangles: Rectangles, images: torch.Tensor) -> torch.Tensor:
    """Whether a pixel is in the rectangle of its view, bool [B, 1, H, W] on the device of the images."""
    sides = copy_to_device(torch.from_numpy(rectangles), images.device).T[..., None]  # [4, B, 1]
    pixels = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (pixels >= sides[:2]) & (pixels < sides[2:])  # [B, S] each
    masks: torch.Tensor = (rows[:, :, None] & columns[:, None])[:, None]
    return masks


def _render_unmixed(
    images: torch.Tensor, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    def draw_integers(purpose: int, below: int) -> torch.Tensor:
        return copy_to_device(torch.from_numpy(rng.integers((seed, draw, purpose), index, below)), images.device)

    views = images.index_select(0, copy_to_device(torch.from_numpy(index), images.device))
    if policy.crop and policy.pad:
        pad, (H, W) = policy.pad, images.shape[-2:]
        windows = F.pad(views, (pad, pad, pad, pad)).unfold(2, H, 1).unfold(3, W, 1)  # [B, C, 2p+1, 2p+1, H, W]
        rows = torch.arange(len(index), device=images.device)
        views = windows[rows, :, draw_integers(CROP_TOP, 2 * pad + 1), draw_integers(CROP_LEFT, 2 * pad + 1)]
    if policy.flip:
        is_flipped = draw_integers(FLIP, 2)[:, None, None, None] == 1
        views = torch.where(is_flipped, views.flip(3), views)  # a mask's length would have to be waited for
    if policy.erasing > 0:
        rectangles = draw_erased(policy.erasing, seed, index, draw, images.shape[-1])
        views = views.masked_fill(_make_masks(rectangles, images), 0)
    return views
