"""Rows of numbers: tables, embeddings, spectrograms and other arrays that are no images, in memory or in files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.base.progress import Progress
from softcache.data.tasks import HardTargets, to_hashed_bytes

from .decoding import Box

_HASHED_BYTES = 16 << 20  # read, checked and hashed at once


@dataclass(frozen=True, eq=False)
class RowArrays:
    """Rows of numbers. An ImageSource, see views.py, whose views are float32 and which no image policy can crop.

    Attributes:
        values: [M, *shape] of any integer or floating-point dtype, of which some rows may be used. A memory-mapped
            array is read row by row.
        rows: int64 [N], which rows of `values` these are.
        name: Of the array in messages, such as `x_train`.
    """

    values: NDArray[Any]
    rows: NDArray[np.int64]
    name: str = "x"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle for worker processes: a memory-mapped file is opened there, other arrays are copied."""
        if isinstance(self.values, np.memmap) and self.values.filename is not None:
            return _open_again, (str(self.values.filename), self.values.dtype.str, self.rows, self.name)
        return RowArrays, (self.values[self.rows], np.arange(len(self.rows)), self.name)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self.values.shape[1:]

    @property
    def channels(self) -> int:
        """Length of the first axis of a row."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """0: a row has no side in pixels."""
        return 0

    @cached_property
    def view_bytes(self) -> int:
        """Bytes of a view."""
        return 4 * math.prod(self.shape)

    def take(self, index: NDArray[np.int64]) -> "RowArrays":
        """Return the rows at `index`, int64 [M], in that order; the values are shared."""
        return RowArrays(self.values, self.rows[index], self.name)

    def describe(self, i: int) -> str:
        """Implement ImageSource.describe: the row of the array."""
        return f"row {self.rows[i]} of '{self.name}'"

    def hash_content(self, labels: HardTargets, progress: Progress) -> str:
        """Return the SHA-256 of dtype, shape, values and labels, in hexadecimal, and check that each value is finite.

        The bytes are those of little-endian numbers, whatever the order in which they are stored.

        Raises:
            CacheError: A value is NaN or infinite, also as float32.
        """
        kind = self.values.dtype.newbyteorder("<")
        digest = sha256(f"{kind.str} {(len(self), *self.shape)}".encode())
        wrong, first = 0, 0
        step = max(1, _HASHED_BYTES // max(1, self.values.itemsize * math.prod(self.shape)))
        starts = range(0, len(self), step)
        for start in progress(starts, len(starts), f"reading {self.name}") if len(starts) > 1 else starts:
            values = np.ascontiguousarray(self.values[self.rows[start : start + step]], kind)
            digest.update(values.data)
            is_finite = np.isfinite(_to_float32(values).reshape(len(values), -1)).all(1)
            if not is_finite.all():
                first = first if wrong else start + int(np.flatnonzero(~is_finite)[0])
                wrong += int((~is_finite).sum())
        if wrong:
            self._refuse_values(wrong, first)
        digest.update(to_hashed_bytes(labels))
        return digest.hexdigest()

    def load_plain(
        self, index: NDArray[np.int64], size: int, resize: int, interpolation: str = "bilinear"
    ) -> torch.Tensor:
        """Implement ImageSource.load_plain: float32 [B, *shape]; `size` and `resize` are 0."""
        return torch.from_numpy(_to_float32(self.values[self.rows[index]]))

    def load_padded(
        self, index: NDArray[np.int64], size: int, resize: int, pad: int, interpolation: str = "bilinear"
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Rows have no border."""
        self._refuse_crop()

    def load_boxes(
        self,
        index: NDArray[np.int64],
        size: int,
        box: Callable[[int, int, int], Box],
        interpolation: str = "bilinear",
    ) -> torch.Tensor:
        """Rows have no boxes."""
        self._refuse_crop()

    def _refuse_crop(self) -> NoReturn:
        raise UsageError(f"rows of numbers {list(self.shape)} cannot be cropped: they have the views none and noise")

    def _refuse_values(self, wrong: int, first: int) -> NoReturn:
        values = np.asarray(self.values[self.rows[first]])
        place = np.argwhere(~np.isfinite(_to_float32(values)))[0].tolist()
        raise CacheError(
            f"{wrong:,} of {len(self):,} rows of '{self.name}' have values that are no finite float32, the first is"
            f" {values[tuple(place)]} in row {self.rows[first]}, place {place}: fill in or remove such rows first"
        )


def make_rows(values: NDArray[Any], name: str = "x") -> RowArrays:
    """Make rows of numbers of all rows of an array [N, *shape]; of numbers alone, [N], each row has shape [1]."""
    return RowArrays(values[:, None] if values.ndim == 1 else values, np.arange(len(values)), name)


def _to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # infinite values are refused by hash_content
        converted: NDArray[np.float32] = values.astype(np.float32)  # a copy
    return converted


def _open_again(path: str, dtype: str, rows: NDArray[np.int64], name: str) -> RowArrays:
    """Memory-map a .npy file in a worker process."""
    values = np.load(path, mmap_mode="c")
    if values.dtype.str != dtype:
        raise CacheError(f"the file '{path}' has changed while it is read")
    return RowArrays(values[:, None] if values.ndim == 1 else values, rows, name)
