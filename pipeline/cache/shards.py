"""Reading and writing shards. The only module that imports h5py.

A shard is one closed HDF5 file: one draw (or held-out split) times one range of rows. Datasets are contiguous,
unfiltered and of fixed shape, so that a reader needs their offsets and nothing else of HDF5. Rows are read with
preadv, which reports a truncated file as an error (a memory map dies by SIGBUS), and no HDF5 handle stays open, so
that none can cross into another process.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.base.files import open_regular_file, publish_bytes

Arrays = dict[str, NDArray[np.generic]]
Layout = dict[str, tuple[tuple[int, ...], str]]  # {dataset: (shape, dtype)}
Stamp = tuple[int, ...]  # device, inode, size and times of a file: they differ when the file was changed

# The newest format that HDF5 1.10 (2016) can read. Its object headers carry checksums, without which
# flipped metadata bits gave wrong values silently in 4 of 3,200 trials.
_LIBVER = ("v110", "v110")
_SUPERBLOCKS = (b"\x89HDF\r\n\x1a\n\x02", b"\x89HDF\r\n\x1a\n\x03")
_HASH_BLOCK = 1 << 22
_MAX_LINKS, _MAX_ATTRIBUTES = 4096, 16


# Writing


@dataclass(frozen=True)
class ShardDigest:
    """Size and digests of a closed shard.

    Attributes:
        bytes: Size of the file.
        checksum: xxh3-128 of the file.
        payload: xxh3-128 of its datasets, see `hash_arrays`.
    """

    bytes: int
    checksum: str
    payload: str


def write_shard(path: Path, arrays: Arrays, attributes: Mapping[str, str | int]) -> ShardDigest:
    """Publish a shard: under its path there is either the complete file or none.

    Args:
        path: Of the file; its folder exists.
        arrays: {dataset: rows}.
        attributes: Short values that are stored in the file itself; the digest of the arrays is added to them.
    """
    payload = hash_arrays(arrays)
    content = _build_file(arrays, {**attributes, "payload": payload})
    publish_bytes(path, content)
    return ShardDigest(len(content), xxhash.xxh3_128_hexdigest(content), payload)


def _build_file(arrays: Arrays, attributes: Mapping[str, str | int]) -> bytes:
    """Build the file in memory: a full disk is then an ordinary OSError of ours, not one inside HDF5."""
    with h5py.File("shard", "w", driver="core", backing_store=False, libver=_LIBVER) as file:
        for name in sorted(arrays):
            file.create_dataset(name, data=arrays[name], track_times=False)
        for key, value in attributes.items():
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else np.int64(value)
        file.flush()
        content: bytes = file.id.get_file_image()
        return content


def measure_overhead(layout: Layout, attributes: Mapping[str, str | int]) -> int:
    """Measure the bytes of a shard that are no rows, from a file of zeros that is built in memory.

    Args:
        layout: {dataset: (shape, dtype)}. From some hundred rows on, the number of rows makes no difference.
        attributes: As of `write_shard`.
    """
    arrays: Arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
    content = _build_file(arrays, {**attributes, "payload": "0" * 32})
    return len(content) - sum(array.nbytes for array in arrays.values())


def hash_arrays(arrays: Arrays) -> str:
    """Compute the xxh3-128 of names, dtypes, shapes and bytes: equal for equal rows, whatever HDF5 writes around."""
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        rows = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{rows.dtype.str}\0{rows.shape}\0".encode())
        digest.update(rows.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_file(fd: int) -> str:
    """Compute the xxh3-128 of an open file, from its first byte to its last."""
    digest, offset, block = xxhash.xxh3_128(), 0, bytearray(_HASH_BLOCK)
    while count := os.preadv(fd, [block], offset):
        digest.update(memoryview(block)[:count])
        offset += count
    return digest.hexdigest()


# Reading


class Shard:
    """A shard that was checked against what is expected of it, open for reading rows by offset.

    Size and checksum are checked before HDF5 sees the file, and its structure before any row is read.

    Args:
        folder: Of the cache, which is trusted.
        name: Path of the file in that folder, where no link is followed.
        layout: {dataset: (shape, dtype)} that the file must have.
        size: Bytes of the file; None where they are not known yet.
        checksum: xxh3-128 of the file; None where it is not known yet.
        verified_stamp: Stamp of the file when its checksum was last verified. Where it still is the stamp, the
            checksum is not computed again.

    Attributes:
        path: Of the file.
        layout: {dataset: (shape, dtype)}.
        attributes: Attributes of the file.
        is_verified: Whether the file has the verified stamp.

    Raises:
        CacheError: The file is missing, no regular file, damaged, or not of this layout.
    """

    _fd = -1  # until the file is open: __del__ runs also when opening it failed

    def __init__(
        self,
        folder: Path,
        name: str,
        layout: Layout,
        size: int | None = None,
        checksum: str | None = None,
        verified_stamp: Stamp | None = None,
    ):
        self.path = path = folder / name
        self.layout = layout
        self._row_bytes = {
            name: math.prod(shape[1:]) * np.dtype(dtype).itemsize for name, (shape, dtype) in layout.items()
        }
        self._fd = open_regular_file(folder, name)
        try:
            file_size = os.fstat(self._fd).st_size
            if size is not None and file_size != size:
                raise CacheError(f"{path}: {file_size} bytes instead of {size}: the file was cut or appended to")
            self.is_verified = verified_stamp == self.stamp
            if not self.is_verified and checksum is not None and (computed := hash_file(self._fd)) != checksum:
                raise CacheError(f"{path}: damaged, its checksum is {computed} instead of {checksum}")
            self._offsets, self.attributes = _inspect(path, self._fd, layout, file_size)
        except BaseException:
            self.close()
            raise

    @property
    def stamp(self) -> Stamp:
        """Device, inode, size and times of the file: they differ when it was changed."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def read(self, name: str, start: int = 0, count: int | None = None) -> NDArray[np.generic]:
        """Read rows `start` to `start + count` of a dataset, or to its end.

        Raises:
            CacheError: The file was truncated after it was opened.
        """
        shape, dtype = self.layout[name]
        rows = np.empty((shape[0] - start if count is None else count, *shape[1:]), dtype)
        self.read_into(name, start, rows.reshape(-1).view(np.uint8).data)
        return rows

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with the rows of a dataset from `start` on.

        Raises:
            CacheError: The file was truncated after it was opened.
        """
        offset = self._offsets[name] + start * self._row_bytes[name]
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                raise CacheError(f"{self.path}: the file ends inside {name}: it was cut after it was opened")
            buffer, offset = buffer[count:], offset + count

    def advise_read(self, name: str, start: int, count: int) -> None:
        """Tell the kernel which rows will be read, so that a disk fetches several runs at once."""
        size = self._row_bytes[name]
        offset = self._offsets[name] + start * size
        os.posix_fadvise(self._fd, offset, count * size, os.POSIX_FADV_WILLNEED)

    def read_all(self) -> Arrays:
        """Read every dataset."""
        return {name: self.read(name) for name in self.layout}

    def compute_digest(self) -> ShardDigest:
        """Compute size and digests of a shard that no manifest lists yet.

        Raises:
            CacheError: The datasets are not those that were written.
        """
        payload = self.verify_payload()
        return ShardDigest(os.fstat(self._fd).st_size, hash_file(self._fd), payload)

    def verify_payload(self) -> str:
        """Compute the digest of the datasets and compare it with the one that the file has as an attribute.

        Raises:
            CacheError: They differ.
        """
        payload = hash_arrays(self.read_all())
        if payload != self.attributes.get("payload"):
            written = make_printable(self.attributes.get("payload"))
            raise CacheError(f"{self.path}: damaged, the digest of its datasets is {payload} instead of {written}")
        return payload

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` is gone when Python ends
        if self._fd >= 0:
            close(self._fd)


def read_header(folder: Path, name: str) -> tuple[dict[str, str | int], Layout] | None:
    """Read attributes and layout of the file folder/name; None where it is no shard.

    Nothing is verified: this is what the file claims.
    """
    path = folder / name
    try:
        with os.fdopen(open_regular_file(folder, name), "rb") as raw, h5py.File(raw, "r") as file:
            _check_small(path, file)
            layout = {key: (tuple(file[key].shape), file[key].dtype.str) for key in sorted(_list_datasets(path, file))}
            return _read_attributes(path, file), layout
    except (CacheError, OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        return None


# The structure of a file, which may be hostile


def _inspect(path: Path, fd: int, layout: Layout, size: int) -> tuple[dict[str, int], dict[str, str | int]]:
    """Read the offsets of the datasets and the attributes through HDF5, which is closed again."""
    if os.pread(fd, 9, 0)[:9] not in _SUPERBLOCKS:
        raise CacheError(f"{path}: not an HDF5 file with checksums in its metadata")
    with os.fdopen(os.dup(fd), "rb") as raw:
        try:
            with h5py.File(raw, "r") as file:
                _check_small(path, file)
                datasets = _list_datasets(path, file)
                if datasets != set(layout):
                    differing = make_printable(", ".join(sorted(datasets ^ set(layout))))
                    raise CacheError(f"{path}: the datasets are not those of the manifest: {differing}")
                offsets = {name: _find_offset(path, file, name, *layout[name], size) for name in layout}
                return offsets, _read_attributes(path, file)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CacheError(f"{path}: not a readable HDF5 file ({make_printable(error, 120)})") from None


def _check_small(path: Path, file: h5py.File) -> None:
    """Refuse a file with more names than a shard has, before they are listed."""
    if len(file) > _MAX_LINKS or len(file.attrs) > _MAX_ATTRIBUTES:
        raise CacheError(f"{path}: {len(file)} names and {len(file.attrs)} attributes, more than a shard has")


def _list_datasets(path: Path, file: h5py.File) -> set[str]:
    """List datasets by full name, one group deep. Only hard links: a soft or external one can lead out of the file."""
    names = set()
    for outer in file:
        _check_hard_link(path, file, outer)
        if isinstance(file[outer], h5py.Dataset):
            names.add(outer)
            continue
        if not isinstance(file[outer], h5py.Group) or len(file[outer]) > _MAX_LINKS:
            raise CacheError(f"{path}: {make_printable(outer)} is neither a dataset nor a small group")
        for inner in file[outer]:
            _check_hard_link(path, file, f"{outer}/{inner}")
            names.add(f"{outer}/{inner}")
    return names


def _check_hard_link(path: Path, file: h5py.File, name: str) -> None:
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise CacheError(f"{path}: {make_printable(name)} is a {type(link).__name__}, which may lead out of the file")


def _find_offset(path: Path, file: h5py.File, name: str, shape: tuple[int, ...], dtype: str, size: int) -> int:
    """Find the first byte of a dataset, after checking that it is contiguous, unfiltered and inside the file."""
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise CacheError(f"{path}: {name} is no dataset")
    if dataset.external is not None or dataset.is_virtual:
        raise CacheError(f"{path}: {name} stores its data in other files")
    if dataset.shape != shape or dataset.dtype != np.dtype(dtype):
        raise CacheError(f"{path}: {name} is {dataset.dtype} {dataset.shape} instead of {np.dtype(dtype)} {shape}")
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    offset = dataset.id.get_offset()
    if dataset.chunks is not None or offset is None or dataset.id.get_storage_size() != needed:
        raise CacheError(f"{path}: {name} is not stored whole in one piece")
    if offset + needed > size:
        raise CacheError(f"{path}: {name} ends at byte {offset + needed} of a file of {size}")
    return int(offset)


def _read_attributes(path: Path, file: h5py.File) -> dict[str, str | int]:
    """Read the attributes: short strings and integers, or the file is refused."""
    attributes: dict[str, str | int] = {}
    for key in file.attrs:
        attribute = file.attrs.get_id(key)
        kind = attribute.dtype
        if kind.kind not in "Si" or kind.itemsize > 1024 or attribute.shape != ():
            raise CacheError(f"{path}: attribute {make_printable(key)} is of type {kind}, shape {attribute.shape}")
        value = file.attrs[key]
        attributes[key] = value.decode("ascii", "replace") if isinstance(value, bytes) else int(value)
    return attributes
