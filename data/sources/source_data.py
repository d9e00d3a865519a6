"""What every data source loads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.data.content_index import ContentIndex
from softcache.data.images.dataset_images import DatasetImages
from softcache.data.images.encoded_images import EncodedImages
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.images.image_folder import ImageFolder
from softcache.data.images.row_arrays import RowArrays
from softcache.data.tasks import HardTargets

Images = ImageArrays | ImageFolder | DatasetImages | EncodedImages | RowArrays


class LabelledImages(NamedTuple):
    """Images and their labels.

    Attributes:
        images: N images, in memory, in files, or of a dataset; or N rows of numbers.
        labels: int64 [N], the class of each image, -1 where it is unknown; or the hard targets of another task, see
            data/tasks.py.
    """

    images: Images
    labels: HardTargets

    def take(self, index: NDArray[np.int64]) -> "LabelledImages":
        """Return the images and labels at `index`, int64 [M], in that order."""
        return LabelledImages(self.images.take(index), self.labels[index])


class SourceData(NamedTuple):
    """A data set as its files have it.

    Attributes:
        splits: "train", and "val" and "test" where the data set has them.
        classes: The names of the classes, in the order of the labels; empty where no image has a label.
        unreadable: Paths of images that are left out because they cannot be decoded.
        left_out: A line that counts and names the files that are no rows of the set; empty where there are none.
        notes: Lines about the data that a user should see before a teacher is trained or run on them.
        layout: The option `layout` with which a folder was read; empty where "basic" reads the same.
    """

    splits: dict[str, LabelledImages]
    classes: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    left_out: str = ""
    notes: tuple[str, ...] = ()
    layout: str = ""


@dataclass(frozen=True)
class ReadingOptions:
    """How a data set is read.

    Attributes:
        root: Folder of the data sets that torchvision reads.
        classes: The order of the class folders: by their text (""), "natural", "number", or the path of a file with
            one name a line, which also names labels that are numbers. A sequence is the order of a cache: it is taken
            where it has the names of the folders.
        exif: "transpose" to turn images as their EXIF orientation says; "stored" for pixels as they are stored.
        unreadable: What to do with images that cannot be decoded: "error", or "skip" to leave them out. A sequence is
            the record of a cache: the paths that it left out.
        layout: How the splits and labels of a folder are found: "any" by all names of splits, with tables of labels,
            and with images beside the class folders as unlabelled rows; "basic" by the folders train, val and test and
            their class folders alone; "unlabelled" reads no labels.
        columns: Which columns of a table hold images and labels, see table_columns.parse_columns; "" finds them.
        task: The form of the hard targets: "classes", "labels" or "numbers"; "" for that which the data have. Of
            "embedding" it is "classes", and hard targets of another form may be left out.
        index: Where it is recorded what the files hold, so that unchanged ones are not read again.
    """

    root: Path = Path("datasets")
    classes: str | Sequence[str] = ""
    exif: str = "stored"
    unreadable: str | Sequence[str] = "error"
    layout: str = "any"
    columns: str = ""
    task: str = ""
    index: ContentIndex = field(default_factory=lambda: ContentIndex(None))


DEFAULT_READING = ReadingOptions()
