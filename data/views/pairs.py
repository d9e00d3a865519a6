"""Views of an image at two resolutions, from one decoding: the student's, and those of a teacher with a larger
input."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from softcache.data.images.decoded_images import DecodedImages

from .draws import Draw
from .policy import ViewPolicy
from .render import ImageSource, render

_DECODED_AT_ONCE = 8  # images; of 12 megapixels each, they take 300 MB


def render_pairs(
    images: ImageSource,
    policies: tuple[ViewPolicy, ViewPolicy],
    seed: int,
    index: NDArray[np.int64],
    draw: Draw,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render the same views of a batch of images at two resolutions.

    Args:
        images: N images.
        policies: The policy of the views, and the same one at another size, see ViewPolicy.at_size.
        seed: The seed of the views.
        index: int64 [B], in [0, N).
        draw: One draw for all, or int64 [B].

    Returns:
        uint8 [B, C, size, size] of each policy, as `render` gives them.

    Raises:
        CacheError: An image file cannot be decoded.
    """
    if not isinstance(images, DecodedImages):
        first, second = (render(images, policy, seed, index, draw) for policy in policies)
        return first, second
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for i in range(0, len(index), _DECODED_AT_ONCE):
        rows = slice(i, i + _DECODED_AT_ONCE)
        decoded = _DecodedOnce(images)
        for policy, views in zip(policies, parts, strict=True):
            part_draw = draw if isinstance(draw, int) else draw[rows]
            views.append(render(decoded, policy, seed, index[rows], part_draw))
    first, second = map(torch.cat, parts)
    return first, second


@dataclass
class _DecodedOnce(DecodedImages):
    """Images of another source, each of which is decoded once and then kept."""

    images: DecodedImages
    kept: dict[int, Image.Image] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mode, self.size = self.images.mode, self.images.size

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, i: int) -> str:
        """Implement ImageSource.describe."""
        return self.images.describe(i)

    def decode(self, i: int) -> Image.Image:
        """Implement DecodedImages.decode."""
        if i not in self.kept:
            self.kept[i] = self.images.decode(i)
        return self.kept[i]
