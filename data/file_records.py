"""Proof that image files are still those whose content was hashed when they were loaded."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UnreadableImageError, make_printable
from softcache.base.files import open_input_file

_OTHER_CONTENT = "its content is not the one that was read then"
Stamp = tuple[int, int, int, int]  # inode, size, and the times of the last change of content and of the inode, in ns


class FileRecord(NamedTuple):
    """What is known of a file.

    Attributes:
        digest: SHA-256 of its bytes.
        stamp: Its stamp while they were read.
    """

    digest: bytes
    stamp: Stamp


class FileRecords:
    """The records of N files. A file is compared with its record whenever it is opened.

    A file with the recorded stamp has the recorded bytes: writing to a file changes a time, and another file in its
    place has another inode. That comparison takes 2 us. Where the stamp differs (a copy, a touched file, a link that
    leads elsewhere), the bytes are hashed again.

    Args:
        records: In the order of the images; none where the files were not hashed, and then nothing is compared.
    """

    def __init__(self, records: Sequence[FileRecord] = ()):
        digests = np.frombuffer(b"".join(record.digest for record in records), np.uint8)
        self._digests: NDArray[np.uint8] = digests.reshape(-1, 32)
        self._stamps: NDArray[np.int64] = np.array([record.stamp for record in records], np.int64).reshape(-1, 4)

    @staticmethod
    def of_arrays(digests: NDArray[np.uint8], stamps: NDArray[np.int64]) -> "FileRecords":
        """Make records of digests, uint8 [N, 32], and stamps, int64 [N, 4]."""
        records = FileRecords()
        records._digests, records._stamps = digests, stamps
        return records

    def replace(self, other: "FileRecords") -> None:
        """Take over the records of another object."""
        self._digests, self._stamps = other._digests, other._stamps

    def take(self, index: NDArray[np.int64]) -> "FileRecords":
        """Return the records at `index`, int64 [M], in that order; none where there are none."""
        taken = FileRecords()
        if len(self._stamps):
            taken._digests, taken._stamps = self._digests[index], self._stamps[index]
        return taken

    @contextmanager
    def open(self, i: int, path: Path, row: str) -> Iterator[BinaryIO]:
        """Open file i and compare it with its record, before it is read and after.

        Args:
            i: Which file.
            path: Where it is.
            row: Its row in words, for messages.

        Raises:
            UnreadableImageError: It was not hashed, and cannot be opened or is no regular file.
            CacheError: It was hashed, and has other bytes now, or cannot be opened any more.
        """
        if not len(self._stamps):
            with open_regular_file(path) as file:
                yield file
            return
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open_regular_file(path))
            except UnreadableImageError as error:
                raise _make_changed_error(path, row, f"now it {error.reason}") from None
            expected = tuple(self._stamps[i].tolist())
            if get_stamp(file) != expected:
                content, stamp = _read(file, path)
                if sha256(content).digest() != self._digests[i].tobytes():
                    raise _make_changed_error(path, row, _OTHER_CONTENT)
                self._stamps[i] = stamp
                yield io.BytesIO(content)
                return
            yield file
            if get_stamp(file) != expected and sha256(_read(file, path)[0]).digest() != self._digests[i].tobytes():
                raise _make_changed_error(path, row, _OTHER_CONTENT)


def hash_file(path: Path) -> FileRecord:
    """Read a file once, and return its record.

    Raises:
        UnreadableImageError: It cannot be read, or is no regular file.
        CacheError: It changes while it is read.
    """
    with open_regular_file(path) as file:
        content, stamp = _read(file, path)
        return FileRecord(sha256(content).digest(), stamp)


@contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read it. A pipe, socket or device is refused, not waited for.

    Raises:
        UnreadableImageError: It cannot be opened, or is no regular file.
    """
    try:
        file = open_input_file(path)
    except OSError as error:
        raise UnreadableImageError(path, f"cannot be read: {error.strerror}") from None
    except CacheError as error:
        raise UnreadableImageError(path, f"cannot be read: {error}") from None
    with file:
        yield file


def get_stamp(file: BinaryIO) -> Stamp:
    """Return the stamp of an open file."""
    return _make_stamp(os.fstat(file.fileno()))


def stat_file(path: str | Path) -> Stamp:
    """Return the stamp of a file, or that of the file to which a link leads.

    Raises:
        OSError: There is no such file.
    """
    return _make_stamp(os.stat(path))


def _make_stamp(status: os.stat_result) -> Stamp:
    return status.st_ino & 0x7FFF_FFFF_FFFF_FFFF, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(file: BinaryIO, path: Path) -> tuple[bytes, Stamp]:
    """Read a file from its beginning; return its bytes, and its stamp, which was the same before and after."""
    for _ in range(3):
        stamp = get_stamp(file)
        file.seek(0)
        try:
            content = file.read()
        except OSError as error:
            raise UnreadableImageError(path, f"cannot be read: {error.strerror}") from None
        if get_stamp(file) == stamp:
            return content, stamp
    raise CacheError(f"the image {make_printable(path, None)} changes while it is read: another program writes to it")


def _make_changed_error(path: Path, row: str, change: str) -> CacheError:
    return CacheError(
        f"{row}, the image {make_printable(path, None)}, has changed since this command began: {change}. Put the file"
        " back, or start again with the images as they are now"
    )
