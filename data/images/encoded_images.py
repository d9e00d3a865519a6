"""Encoded images inside larger files, such as tar shards: each is read by its offset, and decoded when needed."""

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from softcache.base.errors import CacheError, UnreadableImageError, make_printable
from softcache.base.files import open_input_file
from softcache.base.progress import Progress
from softcache.data.tasks import HardTargets

from .dataset_items import hash_rows
from .decoded_images import DecodedImages
from .decoding import open_image

_MAX_OPEN_FILES = 128  # of one set of images in one process


class ByteFile(NamedTuple):
    """A file that holds encoded images.

    Attributes:
        path: Where the bytes are.
        origin: The data file that they come from, for messages: the same file, or the one that they were copied from.
    """

    path: Path
    origin: Path


class _OpenFile:
    """A file descriptor that is closed when nothing refers to it any more."""

    def __init__(self, path: Path):
        with open_input_file(path) as file:
            self.fd = os.dup(file.fileno())

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` is gone when Python ends
        if hasattr(self, "fd"):
            close(self.fd)


class ByteFiles:
    """Files of which parts are read by several threads and processes. A pickled one opens its files anew.

    Args:
        files: The files, at least one.

    Attributes:
        files: The files.
        common_folder: The innermost folder that holds the data files that they come from.
    """

    def __init__(self, files: tuple[ByteFile, ...]):
        self.files = files
        self.common_folder = os.path.commonpath([file.origin.absolute().parent for file in files])
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()  # the file that was opened last at the end

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the paths alone."""
        return ByteFiles, (self.files,)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Read bytes of a file; fewer where it ends before.

        Raises:
            CacheError: The file cannot be opened or read.
        """
        path = self.files[number].path
        try:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = _OpenFile(path)
                while len(self._open) > _MAX_OPEN_FILES:
                    self._open.popitem(last=False)  # closed when the threads that read it have done so
            content = os.pread(file.fd, length, offset)
            while len(content) < length and (rest := os.pread(file.fd, length - len(content), offset + len(content))):
                content += rest
            return content
        except OSError as error:
            raise CacheError(f"'{make_printable(path, None)}' cannot be read: {error.strerror}") from None


@dataclass(frozen=True, eq=False)
class EncodedImages(DecodedImages):
    """Images inside of files. An ImageSource, see views.py.

    The bytes of an image are compared with their digest whenever it is decoded.

    Attributes:
        files: The files that hold them.
        places: int64 [N, 3], of each image the number of its file, and the offset and number of its bytes there.
        digests: uint8 [N, 32], SHA-256 of the bytes of each image.
        rows: int64 [N], the row of each image in its file, for messages.
        names: Of each file the names of all of its rows, for messages; empty where they have none.
        mode: "L" for grey images or "RGB"; every image is converted to it.
        size: Side of the images in pixels where all are squares of one size, else 0.
        is_transposed: Whether images are turned as their EXIF orientation says.
    """

    files: ByteFiles
    places: NDArray[np.int64]
    digests: NDArray[np.uint8]
    rows: NDArray[np.int64]
    names: tuple[tuple[str, ...], ...]
    mode: str = "RGB"
    size: int = 0
    is_transposed: bool = False

    def __len__(self) -> int:
        return len(self.places)

    def take(self, index: NDArray[np.int64]) -> "EncodedImages":
        """Return the images at `index`, int64 [M], in that order."""
        return replace(self, places=self.places[index], digests=self.digests[index], rows=self.rows[index])

    def describe(self, i: int) -> str:
        """Implement ImageSource.describe: the file, the row and, where it has one, the name of the row."""
        number, row = int(self.places[i, 0]), int(self.rows[i])
        name = f" ({self.names[number][row]})" if self.names[number] else ""
        return f"{self.files.files[number].origin} row {row}{name}"

    def name_row(self, i: int) -> str:
        """Return a name of image i that does not depend on where the files are: its file below their common folder."""
        origins = self.files.files
        folder = self.files.common_folder
        return f"{os.path.relpath(origins[int(self.places[i, 0])].origin, folder)} row {int(self.rows[i])}"

    def hash_content(self, labels: HardTargets, _progress: Progress) -> str:
        """Return the SHA-256 of the digests and labels, in hexadecimal; no image is read."""
        return hash_rows(self.digests, labels)

    def open(self, i: int) -> AbstractContextManager[Image.Image]:
        """Open image i, see `decoding.open_image`.

        Raises:
            CacheError: Its bytes are not those that were read before.
        """
        number, offset, length = self.places[i].tolist()
        content = self.files.read(number, offset, length)
        if sha256(content).digest() != self.digests[i].tobytes():
            file = self.files.files[number]
            place = "" if file.path == file.origin else f", in the copy '{make_printable(file.path, None)}'"
            raise CacheError(
                f"the image {make_printable(self.describe(i), None)}{place}, has other bytes than when it was read"
                " before. Put the file back, or start again with --rehash"
            )
        return open_image(self.describe(i), io.BytesIO(content))

    def find_error(self, i: int) -> UnreadableImageError | None:
        """Decode image i, and return the error where it cannot be decoded."""
        try:
            with self.open(i) as image:
                image.load()
        except UnreadableImageError as error:
            return error
        return None

    def decode(self, i: int) -> Image.Image:
        """Implement DecodedImages.decode."""
        with self.open(i) as image:
            return self._convert(i, image, self.is_transposed)
