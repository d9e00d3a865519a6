"""Files of logits that were made elsewhere: .npz of NumPy and .parquet, read without running code.

| file | rows are found by |
|---|---|
| .npz with arrays `train`, `val`, `test` [N, K] | their order: row i is image i of the split, as the data have it |
| .npz with `logits` [N, K] and `names`, or a .parquet with columns `logits` and `name` | the path of the image |
| the same with `index` in place of names, and `split` where there are several | the row of the split |

The only importer of pyarrow in this package.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import open_input_file
from softcache.base.packages import require_extra
from softcache.base.progress import Progress, no_progress
from softcache.data.sources.array_files import read_header

SPLITS = ("train", "val", "test")
_NAMES, _SPLIT_NAMES = ("name", "names"), ("split", "splits")
_BATCH_ROWS = 16_384  # of a parquet file that are converted at once
_MAX_COMPRESSION = 1100  # deflate reaches 1,032: what claims more would fill the memory
Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LogitFile:
    """Logits as a file has them.

    Attributes:
        path: The file.
        by_split: {split: floating [N, K]} of a file that has an array for each split; empty for another.
        logits: floating [N, K] of a file with one array or column of logits; None for another.
        names: Path of the image of each row; None where the file has none.
        index: int64 [N], the row of the split; None where the file has none.
        splits: Split of each row; None where the file has none.
        unread: Names of arrays or columns that are not read.
    """

    path: Path
    by_split: dict[str, Logits]
    logits: Logits | None = None
    names: list[str] | None = None
    index: NDArray[np.int64] | None = None
    splits: list[str] | None = None
    unread: tuple[str, ...] = ()


def check_logit_file(path: Path) -> None:
    """Check, before an image is read, that there is a file of a known kind, and the library that reads it.

    Raises:
        UsageError: There is none, it has another ending, or pyarrow is not installed.
    """
    if not path.is_file():
        raise UsageError(f"--teacher logits: there is no file '{make_printable(path)}'")
    if _is_parquet(path):
        require_extra("--teacher logits:FILE.parquet needs", "parquet", "pyarrow")
    elif path.suffix.lower() != ".npz":
        raise UsageError(
            f"--teacher logits: '{make_printable(path)}' is neither .npz nor .parquet: save the logits with"
            " numpy.savez(FILE, train=…, test=…)"
        )


def read_logit_file(path: Path, progress: Progress = no_progress) -> LogitFile:
    """Read a file of logits.

    Args:
        path: The file, see `check_logit_file`.
        progress: Shows how much of it is read.

    Raises:
        UsageError: It has no logits, or no names and no index for them, or they are no [N, K] of floating point.
        CacheError: It is damaged, holds Python objects, or rows without a value.
    """
    check_logit_file(path)
    file = _read_parquet(path, progress) if _is_parquet(path) else _read_npz(path, progress)
    if file.logits is not None:
        for name, values in (("names", file.names), ("index", file.index), ("split", file.splits)):
            if values is not None and len(values) != len(file.logits):
                raise UsageError(
                    f"'{path}': {name} has {len(values):,} rows, logits have {len(file.logits):,}: one for each"
                )
        if file.names is not None and file.index is not None:
            raise UsageError(f"'{path}' has both names and an index for its logits: leave out one of them")
    widths = {name: array.shape[1] for name, array in file.by_split.items()}
    if len(set(widths.values())) > 1:
        text = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise UsageError(f"'{path}': its splits have different numbers of classes: {text}")
    return file


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _read_npz(path: Path, progress: Progress) -> LogitFile:
    try:
        with open_input_file(path) as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            splits = [name for name in SPLITS if name in members]
            if "logits" in members and splits:
                raise UsageError(f"'{path}' has both 'logits' and '{splits[0]}': leave out one of them")
            if "logits" not in members and not splits:
                names = ", ".join(f"'{make_printable(name, 40)}'" for name in list(members)[:6])
                raise UsageError(
                    f"'{path}' has no array 'train', 'val', 'test' or 'logits' (it has {names or 'none'}): save it"
                    " with numpy.savez(FILE, train=…, test=…)"
                )
            names_key, split_key = (next((k for k in keys if k in members), "") for keys in (_NAMES, _SPLIT_NAMES))
            keys = splits or [key for key in ("logits", names_key, "index", split_key) if key in members]
            shown = progress(keys, len(keys), "reading logits")
            arrays = {key: _read_array(path, archive, members[key]) for key in shown}
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise CacheError(
            f"'{path}' is not read: it is no .npz file, or is damaged ({make_printable(error, 100)})"
        ) from None
    unread = tuple(name for name in members if name not in arrays)
    if splits:
        for name in splits:
            _require_logits(path, name, arrays[name].shape, arrays[name].dtype)
        return LogitFile(path, arrays, unread=unread)
    return _make_file(path, arrays, names_key, split_key, unread)


def _make_file(
    path: Path, arrays: dict[str, NDArray[Any]], names_key: str, split_key: str, unread: tuple[str, ...]
) -> LogitFile:
    """Make the record of a file with one array or column of logits; a key is "" where there is no such column."""
    _require_logits(path, "logits", arrays["logits"].shape, arrays["logits"].dtype)
    return LogitFile(
        path,
        {},
        arrays["logits"],
        names=_to_texts(path, names_key, arrays[names_key]) if names_key else None,
        index=_to_index(path, arrays["index"]) if "index" in arrays else None,
        splits=_to_texts(path, split_key, arrays[split_key]) if split_key else None,
        unread=unread,
    )


def _read_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one array of an .npz file, once its header claims no more bytes than there are."""
    name = make_printable(info.filename.removesuffix(".npy"), 40)
    if info.file_size > _MAX_COMPRESSION * (info.compress_size + 1024):
        raise CacheError(f"'{path}': array '{name}' claims {info.file_size:,} bytes of {info.compress_size:,}")
    with archive.open(info) as member:
        dtype, shape = read_header(member)
        if dtype.hasobject:
            raise CacheError(
                f"'{path}': array '{name}' holds Python objects, which are not read: save numbers or text"
            )
        if int(np.prod(shape, dtype=np.float64)) * dtype.itemsize > info.file_size:
            raise CacheError(f"'{path}': array '{name}' claims more values than the file has: it is damaged")
    with archive.open(info) as member:
        array: NDArray[Any] = np.lib.format.read_array(member)
    return array


def _require_logits(path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    if len(shape) != 2 or dtype not in (np.float16, np.float32, np.float64) or not min(shape):
        raise UsageError(
            f"'{path}': '{name}' is {dtype} {list(shape)}, not logits [N, K] of float16, float32 or float64"
        )


def _to_texts(path: Path, name: str, values: NDArray[Any]) -> list[str]:
    if values.ndim != 1 or values.dtype.kind not in "US":
        raise UsageError(f"'{path}': '{name}' is {values.dtype} {list(values.shape)}, not text [N]")
    return [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in values.tolist()]


def _to_index(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise UsageError(f"'{path}': 'index' is {values.dtype} {list(values.shape)}, not whole numbers [N]")
    return values.astype(np.int64)


def _read_parquet(path: Path, progress: Progress) -> LogitFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_input_file(path) as source, pq.ParquetFile(source) as file:
            columns = file.schema_arrow.names
            names_key, split_key = (next((k for k in keys if k in columns), "") for keys in (_NAMES, _SPLIT_NAMES))
            if "logits" not in columns or not (names_key or "index" in columns):
                found = ", ".join(f"'{make_printable(name, 40)}'" for name in columns[:6])
                raise UsageError(f"'{path}' needs columns 'logits' and 'name' or 'index', it has {found or 'none'}")
            kind = file.schema_arrow.field("logits").type
            is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
            if not is_list or not pa.types.is_floating(kind.value_type):
                raise UsageError(f"'{path}': column 'logits' is {kind}, not a list of floating-point numbers")
            keys = [key for key in ("logits", names_key, "index", split_key) if key in columns]
            rows = file.metadata.num_rows
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=keys)
            parts: dict[str, list[NDArray[Any]]] = {key: [] for key in keys}
            for batch in progress(batches, -(-rows // _BATCH_ROWS), "reading logits"):
                for key in keys:
                    column = batch.column(key)
                    if column.null_count:
                        raise CacheError(f"'{path}': column '{key}' has {column.null_count} rows without a value")
                    parts[key].append(_to_matrix(path, column) if key == "logits" else _to_array(column))
    except pa.ArrowException as error:
        text = make_printable(str(error).partition("\n")[0], 100)
        raise CacheError(f"'{path}' is not read: it is no Parquet file, or is damaged ({text})") from None
    if not rows:
        raise UsageError(f"'{path}' has no rows")
    if len({part.shape[1] for part in parts["logits"]}) > 1:
        raise UsageError(f"'{path}': the lists in 'logits' have different lengths")
    arrays = {key: np.concatenate(values) for key, values in parts.items()}
    return _make_file(path, arrays, names_key, split_key, tuple(name for name in columns if name not in keys))


def _to_array(column: Any) -> NDArray[Any]:
    """Return a column of numbers or text as an array; text as NumPy's own, not as objects."""
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    is_text = values.dtype == object and all(isinstance(value, str) for value in values)
    return values.astype(str) if is_text else values


def _to_matrix(path: Path, column: Any) -> NDArray[Any]:
    """Return a column of lists of one length as [N, K]."""
    import pyarrow.compute as pc

    lengths = np.unique(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    values = column.flatten()
    if len(lengths) > 1:
        raise UsageError(f"'{path}': the lists in 'logits' have different lengths")
    if values.null_count:
        raise CacheError(f"'{path}': column 'logits' has {values.null_count} numbers without a value")
    matrix: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return matrix
