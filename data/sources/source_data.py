"""What every data source loads."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.data.image_arrays import ImageArrays
from softcache.data.image_folder import ImageFolder

Images = ImageArrays | ImageFolder


class LabelledImages(NamedTuple):
    """Images and their labels.

    Attributes:
        images: N images, in memory or in files.
        labels: int64 [N], the class of each image, -1 where it is unknown.
    """

    images: Images
    labels: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> "LabelledImages":
        """Return the images and labels at `index`, int64 [M], in that order."""
        return LabelledImages(self.images.take(index), self.labels[index])


class SourceData(NamedTuple):
    """A data set as its files have it.

    Attributes:
        splits: "train", and "val" and "test" where the data set has them.
        classes: The names of the classes, in the order of the labels; empty where no image has a label.
    """

    splits: dict[str, LabelledImages]
    classes: tuple[str, ...]
