"""Images in files: decoded when they are needed, never all in memory."""

import os
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from softcache.base.progress import Progress
from softcache.data.file_digests import FileDigests
from softcache.data.file_records import FileRecords
from softcache.data.tasks import HardTargets

from .decoded_images import DecodedImages
from .decoding import open_image


@dataclass(frozen=True)
class ImageFolder(DecodedImages):
    """Images in the files of a folder. An ImageSource, see views.py.

    Attributes:
        root: The folder.
        names: Paths of the images, relative to `root`, with slashes.
        mode: "L" for grey images or "RGB"; every image is converted to it.
        size: Side of the images in pixels where all are squares of one size, else 0.
        is_transposed: Whether images are turned as their EXIF orientation says.
        split: Name of the split of which these are all images, for messages; empty where they are not.
    """

    root: Path
    names: tuple[str, ...]
    mode: str
    size: int
    is_transposed: bool = False
    split: str = ""
    _records: FileRecords = field(default_factory=FileRecords, compare=False, repr=False)  # filled by hash_content

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: NDArray[np.int64]) -> "ImageFolder":
        """Return the images at `index`, int64 [M], in that order."""
        names = tuple(self.names[i] for i in index)
        return replace(self, names=names, split="", _records=self._records.take(index))

    def describe(self, i: int) -> str:
        """Implement ImageSource.describe: the path of the file."""
        return str(self.root / self.names[i])

    def hash_content(self, labels: HardTargets, progress: Progress, recorded: FileDigests | None = None) -> str:
        """Return the SHA-256, in hexadecimal, of the name, label and bytes of every file, in the order of the images.

        Each file is read once, unless it is recorded and has not changed. From then on, every file that is decoded is
        compared with what was read.

        Args:
            labels: int64 [N].
            progress: Shows how many files are read.
            recorded: The recorded digests of this folder's files; None where there are none.

        Raises:
            UnreadableImageError: A file cannot be read.
            CacheError: A file changes while it is read.
        """
        digests, stamps = (recorded or FileDigests(self.root)).hash_files(self.names, progress)
        digest, content = sha256(), digests.tobytes()
        for i, (name, label) in enumerate(zip(self.names, labels.tolist(), strict=True)):
            digest.update(os.fsencode(name) + f"\0{label}\0".encode() + content[32 * i : 32 * (i + 1)])
        self._records.replace(FileRecords.of_arrays(digests, stamps))
        return digest.hexdigest()

    def decode(self, i: int) -> Image.Image:
        """Implement DecodedImages.decode."""
        path = self.root / self.names[i]
        with self._records.open(i, path, f"{self.split} row {i}".lstrip()) as file, open_image(path, file) as image:
            return self._convert(i, image, self.is_transposed)
