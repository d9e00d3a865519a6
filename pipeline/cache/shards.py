"""HDF5 in and out: the only file that imports h5py.

A shard is one closed HDF5 file: one draw (or held-out split) times one range of rows. Datasets are
contiguous, unfiltered and of fixed shape, so a reader needs their offsets and nothing else of HDF5:
rows are read with preadv, which finds a truncated file instead of crashing on it (a memory map dies by
SIGBUS), and no HDF5 handle outlives the opening, so none can cross a process.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.base.files import open_regular_file, publish

Arrays = dict[str, NDArray[np.generic]]
Layout = dict[str, tuple[tuple[int, ...], str]]  # {dataset: (shape, dtype)}
Stamp = tuple[int, ...]  # of a file: changes when it does

# The newest format that HDF5 1.10 (2016) can read. Its object headers carry checksums, without which
# flipped metadata bits gave wrong values silently in 4 of 3,200 trials.
_LIBVER = ("v110", "v110")
_SUPERBLOCKS = (b"\x89HDF\r\n\x1a\n\x02", b"\x89HDF\r\n\x1a\n\x03")
_HASH_BLOCK = 1 << 22
_MOST_LINKS, _MOST_ATTRIBUTES = 4096, 16


@dataclass(frozen=True)
class ShardDigest:
    """What there is to know of a closed shard. bytes: file size; checksum of the file, payload of the datasets."""

    bytes: int
    checksum: str
    payload: str


def write_shard(path: Path, arrays: Arrays, attributes: Mapping[str, str | int]) -> ShardDigest:
    """Publish a shard: whole under its name, or not there. attributes: short facts kept in the file itself."""
    payload = payload_digest(arrays)
    image = _build_file(arrays, {**attributes, "payload": payload})
    publish(path, lambda temporary: _write_bytes(temporary, image))
    return ShardDigest(len(image), xxhash.xxh3_128_hexdigest(image), payload)


def _build_file(arrays: Arrays, attributes: Mapping[str, str | int]) -> bytes:
    """The bytes of the file, made in memory: a full disk is then an ordinary OSError of ours, not one inside HDF5."""
    with h5py.File("shard", "w", driver="core", backing_store=False, libver=_LIBVER) as file:
        for name in sorted(arrays):
            file.create_dataset(name, data=arrays[name], track_times=False)
        for key, value in attributes.items():
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else np.int64(value)
        file.flush()
        image: bytes = file.id.get_file_image()
        return image


def _write_bytes(path: Path, image: bytes) -> None:
    path.write_bytes(image)


def payload_digest(arrays: Arrays) -> str:
    """xxh3-128 of names, dtypes, shapes and bytes: equal for equal content, whatever HDF5 writes around it."""
    whole = xxhash.xxh3_128()
    for name in sorted(arrays):
        rows = np.ascontiguousarray(arrays[name])
        whole.update(f"{name}\0{rows.dtype.str}\0{rows.shape}\0".encode())
        whole.update(rows.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def file_checksum(fd: int) -> str:
    """xxh3-128 of a whole file, read by offset."""
    whole, offset, block = xxhash.xxh3_128(), 0, bytearray(_HASH_BLOCK)
    while count := os.preadv(fd, [block], offset):
        whole.update(memoryview(block)[:count])
        offset += count
    return whole.hexdigest()


class Shard:
    """A shard that has been checked against what is expected of it, open for reading by offset."""

    _fd = -1  # until it is open: __del__ runs also when opening was refused

    def __init__(
        self,
        folder: Path,
        name: str,
        layout: Layout,
        size: int | None = None,
        checksum: str | None = None,
        known: Stamp | None = None,
    ):
        """Open folder/name and check, before any row is used, that it is what is expected.

        layout: every dataset with its whole shape and dtype; size and checksum: None where not yet known;
        known: the stamp of the file when its checksum was last found right, to save finding it again.
        Raises CacheError with the reason. HDF5 sees the file only after its checksum was right.
        """
        self.path = path = folder / name
        self.layout = layout
        self._row_bytes = {
            name: math.prod(shape[1:]) * np.dtype(dtype).itemsize for name, (shape, dtype) in layout.items()
        }
        self._fd = open_regular_file(folder, name)
        try:
            found_size = os.fstat(self._fd).st_size
            if size is not None and found_size != size:
                raise CacheError(f"{path}: {found_size} bytes instead of {size}: the file was cut or appended to")
            self.is_verified = known == self.stamp
            if not self.is_verified and checksum is not None and (found := file_checksum(self._fd)) != checksum:
                raise CacheError(f"{path}: damaged, its checksum is {found} instead of {checksum}")
            self._offsets, self.attributes = _inspect(path, self._fd, layout, found_size)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int = 0, count: int | None = None) -> NDArray[np.generic]:
        """Rows start to start + count of a dataset. Raises CacheError when the file has become shorter."""
        shape, dtype = self.layout[name]
        rows = np.empty((shape[0] - start if count is None else count, *shape[1:]), dtype)
        self.read_into(name, start, rows.reshape(-1).view(np.uint8).data)
        return rows

    def read_into(self, name: str, start: int, room: memoryview) -> None:
        """As many rows from start on as there is room for, in bytes. Raises as read."""
        offset = self._offsets[name] + start * self._row_bytes[name]
        while room:
            got = os.preadv(self._fd, [room], offset)
            if got == 0:
                raise CacheError(f"{self.path}: the file ends inside {name}: it was cut after it was opened")
            room, offset = room[got:], offset + got

    def advise_read(self, name: str, start: int, count: int) -> None:
        """Have the kernel fetch rows that will be read: several runs at once, where they are on a disk."""
        size = self._row_bytes[name]
        offset = self._offsets[name] + start * size
        os.posix_fadvise(self._fd, offset, count * size, os.POSIX_FADV_WILLNEED)

    @property
    def stamp(self) -> Stamp:
        """What changes when the file does: device, number, size, times."""
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def read_all(self) -> Arrays:
        """Every dataset, whole."""
        return {name: self.read(name) for name in self.layout}

    def digest(self) -> ShardDigest:
        """What there is to know of the shard, after its datasets were found to be what they were when written.

        Raises CacheError when they are not: the shard vouches for itself, before any manifest does.
        """
        payload = self.verify_payload()
        return ShardDigest(os.fstat(self._fd).st_size, file_checksum(self._fd), payload)

    def verify_payload(self) -> str:
        """The digest of the datasets. Raises CacheError when it is not the one that was written into the shard."""
        payload = payload_digest(self.read_all())
        if payload != self.attributes.get("payload"):
            written = make_printable(self.attributes.get("payload"))
            raise CacheError(f"{self.path}: damaged, its payload is {payload} instead of {written}")
        return payload

    def close(self) -> None:
        """Give the file back; reading is over."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


def read_claims(folder: Path, name: str) -> tuple[dict[str, str | int], Layout] | None:
    """What a file says that it is: its attributes and the layout of its datasets; None where it is no shard."""
    path = folder / name
    try:
        with os.fdopen(open_regular_file(folder, name), "rb") as raw, h5py.File(raw, "r") as file:
            _check_small(path, file)
            layout = {key: (tuple(file[key].shape), file[key].dtype.str) for key in sorted(_list_datasets(path, file))}
            return _read_attributes(path, file), layout
    except (CacheError, OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _inspect(path: Path, fd: int, layout: Layout, size: int) -> tuple[dict[str, int], dict[str, str | int]]:
    """Offsets of the datasets, and the attributes, through HDF5 on the same descriptor; closed again."""
    if os.pread(fd, 9, 0)[:9] not in _SUPERBLOCKS:
        raise CacheError(f"{path}: not an HDF5 file with checksums in its metadata")
    with os.fdopen(os.dup(fd), "rb") as raw:
        try:
            with h5py.File(raw, "r") as file:
                _check_small(path, file)
                found = _list_datasets(path, file)
                if found != set(layout):
                    differ = make_printable(", ".join(sorted(found ^ set(layout))))
                    raise CacheError(f"{path}: the datasets are not those of the manifest: {differ}")
                offsets = {name: _find_offset(path, file, name, *layout[name], size) for name in layout}
                return offsets, _read_attributes(path, file)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CacheError(f"{path}: not a readable HDF5 file ({make_printable(error, 120)})") from None


def _check_small(path: Path, file: h5py.File) -> None:
    """Refuse a file that would be long to look through, before it is."""
    if len(file) > _MOST_LINKS or len(file.attrs) > _MOST_ATTRIBUTES:
        raise CacheError(f"{path}: {len(file)} names and {len(file.attrs)} attributes are no shard's")


def _list_datasets(path: Path, file: h5py.File) -> set[str]:
    """Datasets by full name, one group deep. Only hard links: a soft or external one can lead out of the file."""
    names = set()
    for outer in file:
        _check_hard_link(path, file, outer)
        if isinstance(file[outer], h5py.Dataset):
            names.add(outer)
            continue
        if not isinstance(file[outer], h5py.Group) or len(file[outer]) > _MOST_LINKS:
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
    """Where the dataset's bytes begin, once it is known to be contiguous, raw and inside the file."""
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise CacheError(f"{path}: {name} is no dataset")
    if dataset.external is not None or dataset.is_virtual:
        raise CacheError(f"{path}: {name} keeps its data in other files")
    if dataset.shape != shape or dataset.dtype != np.dtype(dtype):
        raise CacheError(f"{path}: {name} is {dataset.dtype} {dataset.shape} instead of {np.dtype(dtype)} {shape}")
    need = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    offset = dataset.id.get_offset()
    if dataset.chunks is not None or offset is None or dataset.id.get_storage_size() != need:
        raise CacheError(f"{path}: {name} is not stored whole in one piece")
    if offset + need > size:
        raise CacheError(f"{path}: {name} ends at byte {offset + need} of a file of {size}")
    return int(offset)


def _read_attributes(path: Path, file: h5py.File) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for key in file.attrs:
        attribute = file.attrs.get_id(key)
        kind = attribute.dtype
        if kind.kind not in "Si" or kind.itemsize > 1024 or attribute.shape != ():
            raise CacheError(f"{path}: attribute {make_printable(key)} is of type {kind}, shape {attribute.shape}")
        value = file.attrs[key]
        found[key] = value.decode("ascii", "replace") if isinstance(value, bytes) else int(value)
    return found
