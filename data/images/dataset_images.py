"""The images of a user's own dataset: read from it whenever a view is rendered, or all of them in memory."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from softcache.base.errors import CacheError
from softcache.base.progress import Progress
from softcache.data.tasks import HardTargets

from .dataset_items import MapDataset, describe_row, hash_image, hash_rows, read_item
from .decoded_images import DecodedImages
from .image_arrays import ImageArrays


@dataclass(frozen=True, eq=False)
class DatasetImages(DecodedImages):
    """Images that a dataset returns, read again for each view. An ImageSource, see views.py.

    Can be sent to worker processes where the dataset can.

    Attributes:
        dataset: Where the images come from.
        split: Name of the split of which it is the dataset, for messages.
        rows: int64 [N], the row of the dataset of each image.
        digests: uint8 [N, 32], `hash_image` of each image when all of them were read.
        mode: "L" for grey images or "RGB"; every image is converted to it.
        size: Side of the images in pixels where all are squares of one size, else 0.
    """

    dataset: MapDataset
    split: str
    rows: NDArray[np.int64]
    digests: NDArray[np.uint8]
    mode: str
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: NDArray[np.int64]) -> "DatasetImages":
        """Return the images at `index`, int64 [M], in that order."""
        return replace(self, rows=self.rows[index], digests=self.digests[index])

    def describe(self, i: int) -> str:
        """Implement ImageSource.describe: the row of the dataset."""
        return describe_row(self.split, int(self.rows[i]))

    def hash_content(self, labels: HardTargets, _progress: Progress) -> str:
        """Return the SHA-256 of the digests and labels, in hexadecimal; no image is read."""
        return hash_rows(self.digests, labels)

    def decode(self, i: int) -> Image.Image:
        """Implement DecodedImages.decode."""
        image, _ = read_item(self.dataset, int(self.rows[i]), self.split)
        if hash_image(image) != self.digests[i].tobytes():
            raise CacheError(
                f"{self.describe(i)} is another image than when the dataset was read before: it must return the same"
                " image whenever a row is read. Give it without random transforms: the views are made here"
            )
        return image if image.mode == self.mode else image.convert(self.mode)


@dataclass(frozen=True)
class DatasetArrays(ImageArrays):
    """Images of a dataset in memory, whose content has the same digest as if they were not.

    Attributes:
        digests: uint8 [N, 32], `hash_image` of each image.
    """

    digests: NDArray[np.uint8] = field(kw_only=True, compare=False, repr=False)

    def take(self, index: NDArray[np.int64]) -> "DatasetArrays":
        """Return the images at `index`, int64 [M], in that order."""
        return DatasetArrays(self.pixels[torch.from_numpy(index)], digests=self.digests[index])

    def hash_content(self, labels: HardTargets, _progress: Progress) -> str:
        """Return the SHA-256 of the digests and labels, in hexadecimal."""
        return hash_rows(self.digests, labels)
