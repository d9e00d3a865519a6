"""Parquet files of the Hugging Face Hub's convention: a column of encoded images, and one of labels.

The bytes of an image are addressed in the file itself where they are stored as they are. Where the file's pages are
compressed they are not there in one piece: they are copied once, beside the index.
"""

import mmap
import os
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from softcache.base.errors import CacheError, LockedError, UsageError, make_printable
from softcache.base.files import make_folder, open_input_file, publish, remove_stale_files
from softcache.base.lock import hold_lock
from softcache.base.packages import require_extra
from softcache.base.progress import Progress
from softcache.data.content_index import ContentIndex
from softcache.data.sources.source_data import ReadingOptions, SourceData

from .data_files import get_copy_path
from .encoded_rows import EncodedSource, load_encoded_rows
from .file_rows import NO_IMAGE, FileRows, RowCollector
from .table_columns import TableColumns, choose_columns, parse_columns, read_features

_BATCH_ROWS = 64  # rows that are decoded at once
_LOCK_SECONDS = 0.2  # between two looks at a lock
_SPARE_BYTES = 256 << 20  # of the disk that a copy must leave free


def load_parquet(argument: str, options: ReadingOptions, progress: Progress) -> SourceData:
    """Load parquet files.

    Args:
        argument: A path, pattern, braces or folder, see `data_files.list_data_files`.
        options: The columns, the names of the classes, the EXIF orientation, images that cannot be decoded, and the
            index.
        progress: Shows how many megabytes are read.

    Raises:
        UsageError: pyarrow is not installed, there is no such file, it has no column of images, or labels do not fit.
        CacheError: A file is damaged, an image cannot be decoded, or there is no room for a copy.
    """
    require_extra(f"--data parquet:{argument} needs", "parquet", "pyarrow")
    parse_columns(options.columns)
    copied: list[int] = []
    reader = partial(_read_file, option=options.columns, index=options.index, copied=copied)
    source = EncodedSource("parquet", (".parquet",), reader, options.columns)
    loaded = load_encoded_rows(argument, source, options, progress)
    if not copied:
        return loaded
    note = (
        f"{len(copied):,} parquet files are compressed: their images were copied once, to be read one by one, to"
        f" '{make_printable(options.index.folder)}' ({sum(copied) / 1e6:,.1f} MB)"
    )
    return loaded._replace(notes=(*loaded.notes, note))


def _read_file(path: Path, option: str, index: ContentIndex, copied: list[int]) -> Generator[int, None, FileRows]:
    """List the rows of a file; see RowReader.

    Args:
        path: The file.
        option: The option --columns.
        index: Beside which images are copied.
        copied: The bytes of a copy are appended to it.
    """
    import pyarrow as pa
    from pyarrow import parquet

    place = f"'{make_printable(path, None)}'"
    with open_input_file(path) as raw:  # no pipe or device is opened by the library
        try:
            with parquet.ParquetFile(raw) as table:
                columns = _choose_columns(table, place, option)
                if _is_stored(table, columns):
                    rows = yield from _list_rows(table, columns, place, _StoredBytes(raw))
                    if rows is not None:
                        return rows
                rows = yield from _copy_rows(table, columns, path, index)
                copied.append(int(rows.sizes.sum()))
                return rows
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CacheError(f"{place} is no parquet file, or is damaged: {make_printable(reason)}") from None


def _choose_columns(table: Any, place: str, option: str) -> TableColumns:
    import pyarrow as pa

    schema = table.schema_arrow
    images, labels = [], []
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            images.append(field.name)
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if is_text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            labels.append(field.name)
    return choose_columns(place, images, labels, schema.names, read_features(schema.metadata), option)


def _is_stored(table: Any, columns: TableColumns) -> bool:
    """Return whether no page of the column of images is compressed."""
    metadata = table.metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            if chunk.path_in_schema.partition(".")[0] == columns.image and chunk.compression != "UNCOMPRESSED":
                return False
    return True


class _StoredBytes:
    """Finds values in the file, where they stand in one piece."""

    def __init__(self, file: BinaryIO):
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0

    def place(self, value: memoryview) -> int | None:
        """Return the offset of a value; None where it does not stand in the file in one piece."""
        length = len(value).to_bytes(4, "little")  # stands before each value
        found = self._map.find(length + bytes(value), self._position)
        if found < 0:  # of a dictionary, whose values may be used in any order
            found = self._map.find(length + bytes(value))
        if found < 0:
            return None
        self._position = found + len(value)
        return found + 4

    def close(self) -> None:
        self._map.close()


class _Copy:
    """Writes values one behind the other."""

    def __init__(self, file: BinaryIO):
        self._file, self._position = file, 0

    def place(self, value: memoryview) -> int | None:
        """Append a value and return its offset."""
        self._file.write(value)
        self._position += len(value)
        return self._position - len(value)

    def close(self) -> None:
        pass


def _list_rows(
    table: Any, columns: TableColumns, place: str, target: _StoredBytes | _Copy
) -> Generator[int, None, FileRows | None]:
    """List the rows of a table.

    Args:
        table: The parquet file.
        columns: The columns that are read.
        place: The file, for messages.
        target: Places the bytes of each image.

    Returns:
        The rows; None where the bytes of an image have no place.
    """
    import pyarrow as pa

    rows = RowCollector(place, columns.classes)
    is_struct = pa.types.is_struct(table.schema_arrow.field(columns.image).type)
    names = [f"{columns.image}.bytes" if is_struct else columns.image, *([columns.label] if columns.label else [])]
    images_read = 0
    with closing(target):
        for batch in table.iter_batches(_BATCH_ROWS, columns=names):
            images = batch.column(0)
            images = images.flatten()[0] if is_struct else images
            labels = batch.column(1).to_pylist() if columns.label else [None] * len(images)
            read = 0
            for image, label in zip(images, labels, strict=True):
                if not image.is_valid or not image.as_buffer().size:
                    rows.leave_out(NO_IMAGE)
                    continue
                value = memoryview(image.as_buffer())
                if (offset := target.place(value)) is None:
                    return None
                rows.add(offset, value, label)
                read += len(value)
                images_read += 1
            yield read
    if not images_read and table.metadata.num_rows:
        raise UsageError(
            f"{place}: the column '{make_printable(columns.image)}' has no bytes, at most paths of files elsewhere,"
            " which are not read: write the table with the images in it, or use --data folder:PATH"
        )
    return rows.finish()


@contextmanager
def _wait_for_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock; where another process copies the same file, wait until it has done so."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(folder, name))
                break
            except LockedError:
                time.sleep(_LOCK_SECONDS)
        yield


def _copy_rows(table: Any, columns: TableColumns, path: Path, index: ContentIndex) -> Generator[int, None, FileRows]:
    """Copy the encoded images of a file beside the index, and list its rows.

    Raises:
        UsageError: There is no index.
        CacheError: The disk has too little room.
    """
    place = f"'{make_printable(path, None)}'"
    if index.folder is None:
        raise UsageError(
            f"{place} is compressed: its images are copied once, to be read one by one, and --index none leaves no"
            " place for them. Name a folder with --index"
        )
    copy = get_copy_path(index, "parquet", path)
    metadata = table.metadata
    needed = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    try:
        make_folder(copy.parent)
        free = shutil.disk_usage(copy.parent).free
        if needed + _SPARE_BYTES > free:
            raise CacheError(
                f"{place} is compressed, and the copy of its images takes up to {needed / 1e9:.1f} GB beside the"
                f" index: '{make_printable(copy.parent)}' has {free / 1e9:.1f} GB left. Name another with --index"
            )
        with _wait_for_lock(copy.parent, f".{copy.name}.lock"):
            remove_stale_files(copy.parent, (copy.name,))
            temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
            try:
                with open(temporary, "wb") as file:
                    rows = yield from _list_rows(table, columns, place, _Copy(file))
                publish(copy, lambda _: None)  # of the temporary file of the same name
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # of pyarrow: the file is damaged
            raise
        index.refuse_folder(error)
        raise CacheError(
            f"{place} is compressed, and its images cannot be copied to '{make_printable(copy.parent)}'"
            f" ({error.strerror}): name another folder with --index"
        ) from None
    assert rows is not None
    rows.in_copy = True
    return rows
