"""Files of NumPy arrays: .npz archives, folders of .npy files and single .npy files, without pickle, NumPy's default.

The header of each array is read first. Its shape and dtype are compared with the size of the file before anything of
that size is allocated.
"""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import open_input_file, refuse_special_file

_NPZ, _NPY = ".npz", ".npy"
# Deflate packs zeros 1,000 times smaller. Up to a gigabyte any ratio is accepted, above it one that real data reach.
_ANY_RATIO_BYTES, _MAX_RATIO = 1 << 30, 100
_MAX_MEMBERS, _MAX_DIMENSIONS = 10_000, 32
_DAMAGED = (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zipfile.LargeZipFile)


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, of which the header has been read.

    Attributes:
        name: Without the ending, such as `x_train`.
        dtype: Without Python objects and fields.
        shape: As in the header.
        path: The .npy or .npz file.
        member: Its name in a .npz file; empty for a .npy file.
    """

    name: str
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    path: Path
    member: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> NDArray[Any]:
        """Read the array into memory.

        Raises:
            CacheError: The file is damaged.
        """
        with _name_damage(self.path, self.name):
            if not self.member:
                with open_input_file(self.path) as file:
                    return np.lib.format.read_array(file)
            with _open_zip(self.path) as archive, archive.open(self.member) as file:
                return np.lib.format.read_array(file)

    def open(self) -> NDArray[Any]:
        """Memory-map a .npy file, whose rows are read when they are needed; read an array of a .npz file.

        Changes of the array in memory are not written.

        Raises:
            CacheError: The file is damaged.
        """
        if self.member:
            return self.read()
        with _name_damage(self.path, self.name):
            mapped: NDArray[Any] = np.load(self.path, mmap_mode="c")
            return mapped


def open_arrays(path: Path) -> tuple[dict[str, StoredArray], list[str]]:
    """Read the headers of all arrays at a path.

    Args:
        path: A .npz file, a folder of .npy files, or one .npy file, which is called `x`.

    Returns:
        The arrays by name, and the names of files of a folder that are no arrays.

    Raises:
        UsageError: There is no such file or folder, it has another ending, or an array holds Python objects.
        CacheError: A file is damaged, or its size does not fit its header.
    """
    place = make_printable(path, None)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        arrays = [_read_file_header(file, file.stem) for file in files if file.suffix == _NPY]
        if not arrays:
            raise UsageError(f"the folder '{place}' has no .npy files: expected x.npy, or x_train.npy and x_test.npy")
        return {array.name: array for array in arrays}, [file.name for file in files if file.suffix != _NPY]
    if not path.exists():
        raise UsageError(f"there is no file or folder '{place}'")
    refuse_special_file(path)
    if path.suffix == _NPY:
        return {"x": _read_file_header(path, "x")}, []
    if path.suffix != _NPZ:
        raise UsageError(f"'{place}' is no .npz or .npy file and no folder of .npy files: save it by numpy.savez")
    return {array.name: array for array in _read_members(path)}, []


def check_unpacked_size(arrays: list[StoredArray]) -> None:
    """Check that the arrays of a .npz file that are to be read are no decompression bomb and fit in memory.

    Raises:
        CacheError: They take more than 1 GiB and 100 times the size of the file, or more than the machine's memory.
    """
    members = [array for array in arrays if array.member]
    if not members:
        return
    path, unpacked = members[0].path, sum(array.bytes for array in members)
    packed = path.stat().st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(max(_ANY_RATIO_BYTES, _MAX_RATIO * packed), memory)
    if unpacked > limit:
        raise CacheError(
            f"'{make_printable(path, None)}' unpacks to {unpacked / 1e9:,.1f} GB from {packed / 1e9:,.3f} GB, more"
            f" than the {limit / 1e9:,.1f} GB that are accepted: save each array by numpy.save as a .npy file of a"
            " folder, which is read row by row"
        )


def _read_file_header(path: Path, name: str) -> StoredArray:
    with _name_damage(path, name), open_input_file(path) as file:
        dtype, shape = _check_header(file, path, name)
        available = os.fstat(file.fileno()).st_size - file.tell()
    array = StoredArray(name, dtype, shape, path)
    _check_size(array, available)
    return array


def _read_members(path: Path) -> Iterator[StoredArray]:
    with _name_damage(path, ""), _open_zip(path) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise CacheError(
                f"'{make_printable(path, None)}' has {len(members):,} members: up to {_MAX_MEMBERS:,} are read"
            )
        for member in members:
            name = member.filename.removesuffix(_NPY)
            with _name_damage(path, name), archive.open(member) as file:
                dtype, shape = _check_header(file, path, name)
                available = member.file_size - file.tell()
            array = StoredArray(name, dtype, shape, path, member.filename)
            _check_size(array, available)
            yield array


def read_header(file: IO[bytes]) -> tuple["np.dtype[Any]", tuple[int, ...]]:
    """Read dtype and shape of an array in the .npy format; none of its values.

    Raises:
        ValueError: It has another format.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the .npy format, which is for arrays with named fields")
    return dtype, shape


def _check_header(file: IO[bytes], path: Path, name: str) -> tuple["np.dtype[Any]", tuple[int, ...]]:
    """Read dtype and shape, and refuse those that are no plain numbers or text."""
    dtype, shape = read_header(file)
    if dtype.hasobject:
        raise UsageError(
            f"the array '{make_printable(name)}' of '{make_printable(path, None)}' holds Python objects, which only"
            " pickle can read and no file may: convert it first, such as array.astype(numpy.float32), or"
            " array.astype(str) for labels"
        )
    if dtype.fields is not None or dtype.subdtype is not None:
        raise UsageError(
            f"the array '{make_printable(name)}' of '{make_printable(path, None)}' has named fields: save its columns"
            " as one array of numbers"
        )
    if len(shape) > _MAX_DIMENSIONS or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"its header has the shape {shape}")
    return dtype, shape


def _check_size(array: StoredArray, available: int) -> None:
    if array.bytes != available:
        raise CacheError(
            f"'{make_printable(array.path, None)}' is damaged: '{make_printable(array.name)}' has the shape"
            f" {list(array.shape)} of {array.dtype}, {array.bytes:,} bytes, and the file holds {available:,}"
        )


def _open_zip(path: Path) -> zipfile.ZipFile:
    refuse_special_file(path)
    return zipfile.ZipFile(path)


@contextmanager
def _name_damage(path: Path, name: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into one line."""
    try:
        yield
    except _DAMAGED as error:
        _refuse(path, name, error)


def _refuse(path: Path, name: str, error: BaseException) -> NoReturn:
    array = f"the array '{make_printable(name)}' of " if name else ""
    raise CacheError(f"{array}'{make_printable(path, None)}' is damaged or cut off: {make_printable(error)}") from None
