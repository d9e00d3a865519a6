"""Images without pixels, which record the boxes of resized crops."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.images.decoding import Box
from softcache.data.views.draws import Draw
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render


class BoxRecorder:
    """Images of given sizes, without pixels, that record which boxes are cut out of them."""

    def __init__(self, *sizes: tuple[int, int]):
        self.sizes = sizes
        self.boxes: list[Box] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def load_plain(
        self, index: NDArray[np.int64], size: int, resize: int, interpolation: str = "bilinear"
    ) -> torch.Tensor:
        raise AssertionError("a resized crop loads boxes")

    def load_boxes(
        self,
        index: NDArray[np.int64],
        size: int,
        box: Callable[[int, int, int], Box],
        interpolation: str = "bilinear",
    ) -> torch.Tensor:
        self.boxes += [box(row, *self.sizes[i]) for row, i in enumerate(index)]
        return torch.zeros(len(index), 3, size, size, dtype=torch.uint8)


def draw_boxes(
    spec: str, sizes: list[tuple[int, int]], seed: int = 0, index: NDArray[np.int64] | None = None, draw: Draw = 0
) -> NDArray[np.float64]:
    """Return the boxes of views of images of these sizes (width, height): [B, 4], left, top, right, bottom."""
    recorder = BoxRecorder(*sizes)
    render(recorder, parse_views(spec), seed, np.arange(len(sizes)) if index is None else index, draw)
    return np.array(recorder.boxes)
