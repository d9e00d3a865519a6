"""Views: the pixels for (index, draw), always the same ones.

A view is a pure function of (view policy, seed, index, draw). The teacher sees it in stage one, the
student sees it again in stage two, and a checksum of it travels in the cache. Every random number
comes from `rng.bits`, so neither batch size, order, workers nor processes can change a pixel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta

from softcache.base import rng
from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import check_parameters, parse_number, parse_spec

Draw = int | NDArray[np.int64]  # of all rows, or of each
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the stored image

# One number per thing that is drawn, so that a new knob never shifts the numbers of an old one.
_TOP, _LEFT, _FLIP, _AREA, _RATIO, _BOX_TOP, _BOX_LEFT, _PARTNER, _SHARE = range(9)


class ImageSource(Protocol):
    """Where pixels come from: a tensor in memory or a folder of files."""

    def __len__(self) -> int: ...

    def load_plain(self, index: NDArray[np.int64], size: int, resize: int) -> torch.Tensor:
        """uint8 [B, C, size, size]: as stored, or the shorter side made `resize` and the centre cut out."""

    def load_padded(
        self, index: NDArray[np.int64], size: int, resize: int, pad: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """uint8 [N, C, S + 2 pad, S + 2 pad], and which rows [B] of it are the plain images index [B] with zeros
        around them."""

    def load_boxes(self, index: NDArray[np.int64], size: int, box: Callable[[int, int, int], Box]) -> torch.Tensor:
        """uint8 [B, C, size, size]: box(row, width, height) cut out of image row and resized."""


@dataclass(frozen=True)
class ViewPolicy:
    """How a view is made from a image. size and resize in pixels; 0 means: as the data are.

    pad: zero padding before a random crop of the original size (He et al. 2016, section 4.2).
    min_scale: least share of the image's area in a resized crop (Szegedy et al. 2015), ratio 3/4 to 4/3.
    mixup: alpha of the Beta distribution of the two shares, 0 for none (Zhang et al. 2018).
    """

    name: str
    crop: bool = False
    flip: bool = False
    resized_crop: bool = False
    pad: int = 0
    min_scale: float = 1.0
    mixup: float = 0.0
    size: int = 0
    resize: int = 0

    def parameters(self) -> dict[str, float]:
        """The knobs that this policy has, with their values: part of a cache's identity."""
        return {knob: getattr(self, knob) for knob in _parameters_of(self)}

    def without_augmentation(self) -> "ViewPolicy":
        """The policy of held-out splits: the same size, nothing random."""
        return replace(VIEW_POLICIES["none"], size=self.size, resize=self.resize)


VIEW_POLICIES: dict[str, ViewPolicy] = {
    "none": ViewPolicy("none"),
    "crop": ViewPolicy("crop", crop=True, pad=4),
    "crop-flip": ViewPolicy("crop-flip", crop=True, flip=True, pad=4),
    "resized-crop-flip": ViewPolicy("resized-crop-flip", resized_crop=True, flip=True, min_scale=0.08),
}


def _parameters_of(policy: ViewPolicy) -> list[str]:
    own = ["pad"] if policy.crop else ["min_scale"] if policy.resized_crop else []
    return [*own, "mixup", "size", "resize"]


def parse_views(spec: str) -> ViewPolicy:
    """`crop-flip:pad=4,mixup=0.2` -> ViewPolicy. Raises UsageError for an unknown name or knob."""
    name, given = parse_spec(spec, "views")
    if name not in VIEW_POLICIES:
        raise unknown_name_error("view policy", name, VIEW_POLICIES)
    policy = VIEW_POLICIES[name]
    check_parameters(spec, "views", given, _parameters_of(policy))
    values: dict[str, float] = {}
    for knob, text in given.items():
        value = parse_number(spec, "views", knob, text)
        low, high = (0.001, 1.0) if knob == "min_scale" else (0.0, 4096.0)
        if not low <= value <= high:
            raise UsageError(f"views '{spec}': {knob}={text} is outside {low:g} to {high:g}")
        if knob in ("pad", "size", "resize") and value != int(value):
            raise UsageError(f"views '{spec}': {knob}={text} is not a whole number")
        values[knob] = int(value) if knob in ("pad", "size", "resize") else value
    return replace(policy, **values)  # type: ignore[arg-type]


def render(images: ImageSource, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw) -> torch.Tensor:
    """The views uint8 [B, C, size, size] of the images index [B] in one draw, or in the draws [B].

    Files are decoded once for neighbours that are the same image: k draws of it, one after the other, cost one
    decoding.

    The pixels are moved by NumPy, not by torch: a stream renders in a thread of its own, where torch's kernels
    would start a second team of OpenMP threads that spins against the student's: 5.6 s instead of 3.4 s for 3,000
    steps of a small student on 2 cores.
    """
    views = _render_one(images, policy, seed, index, draw)
    if policy.mixup > 0:
        partner, share = draw_mixup(policy, seed, index, draw, len(images))
        views = _mix(views, _render_one(images, policy, seed, partner, draw), share)
    return views


def draw_mixup(
    policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Partner index [B], never the image itself unless it is alone, and share [B] of the image in 1/256."""
    step = 1 + rng.integers((seed, draw, _PARTNER), index, max(n - 1, 1))
    table = _beta_shares(policy.mixup)
    share = table[rng.integers((seed, draw, _SHARE), index, len(table))]
    return (index + step) % n, share


@lru_cache(maxsize=8)
def _beta_shares(alpha: float) -> NDArray[np.int64]:
    """4,096 equally likely shares of Beta(alpha, alpha) in whole 1/256: the same pixels on every machine."""
    middle = (np.arange(4096) + 0.5) / 4096
    shares: NDArray[np.int64] = np.rint(256 * beta.ppf(middle, alpha, alpha)).astype(np.int64)
    return shares


def _mix(one: torch.Tensor, other: torch.Tensor, share: NDArray[np.int64]) -> torch.Tensor:
    w = share.astype(np.uint16)[:, None, None, None]
    mixed = np.multiply(one.numpy(), w, dtype=np.uint16)  # 255 * 256 + 128 is the most that any of it can be
    mixed += np.multiply(other.numpy(), 256 - w, dtype=np.uint16)
    mixed += 128
    mixed >>= 8
    return torch.from_numpy(mixed.astype(np.uint8))


def _render_one(
    images: ImageSource, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    if policy.resized_crop:
        views = images.load_boxes(index, policy.size, _draw_boxes(policy, seed, index, draw))
    elif policy.crop and policy.pad:
        views = _random_crop(images, policy, seed, index, draw)
    else:
        views = images.load_plain(index, policy.size, policy.resize)
    if policy.flip:
        pixels = views.numpy()  # a copy of our own already, as every branch above makes one
        turned = rng.integers((seed, draw, _FLIP), index, 2) == 1
        pixels[turned] = pixels[turned][..., ::-1]
    return views


def _random_crop(
    images: ImageSource, policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw
) -> torch.Tensor:
    pad = policy.pad
    padded, rows = images.load_padded(index, policy.size, policy.resize, pad)
    top = rng.integers((seed, draw, _TOP), index, 2 * pad + 1)
    left = rng.integers((seed, draw, _LEFT), index, 2 * pad + 1)
    size = padded.shape[-1] - 2 * pad
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))  # [N, C, 2p+1, 2p+1, S, S]
    return torch.from_numpy(windows[rows, :, top, left])


def pad_images(views: NDArray[np.uint8], pad: int) -> NDArray[np.uint8]:
    """uint8 [B, C, S + 2 pad, S + 2 pad]: views [B, C, S, S] with zeros around them."""
    B, C, H, W = views.shape
    padded = np.zeros((B, C, H + 2 * pad, W + 2 * pad), np.uint8)
    padded[:, :, pad : pad + H, pad : pad + W] = views
    return padded


def _draw_boxes(policy: ViewPolicy, seed: int, index: NDArray[np.int64], draw: Draw) -> Callable[[int, int, int], Box]:
    """Boxes from sums, products, quotients and square roots alone.

    Those five are rounded correctly on every machine, which logarithms and powers are not: hence the
    ratio (3 + u) / (4 - u), which runs from 3/4 to 4/3 and is its own inverse at 1 - u, instead of the
    usual exp(uniform(log 3/4, log 4/3)).
    """
    area, ratio, top, left = (
        rng.uniform((seed, draw, purpose), index) for purpose in (_AREA, _RATIO, _BOX_TOP, _BOX_LEFT)
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
