"""Data sets of the Hugging Face Hub through the `datasets` library: of its cache on this machine, or a saved folder.

Its Arrow files hold the encoded images as they are, so each is read by its offset. Where they hold paths of files
instead, the rows are read as those of a map-style dataset.
"""

import re
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.packages import require_extra
from softcache.base.progress import Progress, no_progress
from softcache.data.sources.dataset import load_dataset as load_map_style
from softcache.data.sources.source_data import ReadingOptions, SourceData
from softcache.data.sources.split_names import order_splits
from softcache.data.tasks import CLASSES

from .data_files import SPLIT_OF_NAME
from .encoded_rows import EncodedSource, load_encoded_files
from .file_rows import NO_IMAGE, FileRows, RowCollector
from .table_columns import TableColumns, choose_columns, parse_columns

_TEXT_OR_BOOL = ("string", "large_string", "bool")  # labels that are true or false are refused by name, row by row
_SPEC = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:@]+))?(?:@(?P<revision>[\w./-]+))?")


def load_hub_dataset(argument: str, options: ReadingOptions, progress: Progress) -> SourceData:
    """Load a data set of the Hub, or a folder that `save_to_disk` wrote.

    Args:
        argument: `NAME`, `NAME:CONFIG`, `NAME@REVISION`, `NAME:CONFIG@REVISION`, or a path.
        options: The columns, the names of the classes, the EXIF orientation, images that cannot be decoded, and the
            index.
        progress: Shows how many megabytes are read.

    Raises:
        UsageError: `datasets` is not installed, it does not find the data set, this has no column of images, or labels
            do not fit.
        CacheError: A file is damaged, or an image cannot be decoded.
    """
    require_extra(f"--data hf:{argument} needs", "hf", "datasets")
    parse_columns(options.columns)
    splits = _name_splits(_load(argument, progress is not no_progress), argument)
    place = f"'{make_printable(argument)}'"
    columns = {split: _choose_columns(dataset, place, options.columns) for split, dataset in splits.items()}
    files = {split: _list_arrow_files(dataset) for split, dataset in splits.items()}
    if any(paths is None for paths in files.values()) or not _has_bytes(splits, columns):
        return _load_rows(splits, columns, options, progress)
    readers = {
        path: partial(_read_file, columns=columns[split]) for split, paths in files.items() for path in paths or ()
    }
    source = EncodedSource("hf", (), lambda path: readers[path](path), options.columns)
    return load_encoded_files({split: paths or [] for split, paths in files.items()}, source, options, progress)


def _load(argument: str, is_shown: bool) -> dict[str, Any]:
    """Load the splits of a data set with the `datasets` library, as it names them.

    Args:
        argument: See `load_hub_dataset`.
        is_shown: Whether the library may show its own progress bars.

    Raises:
        UsageError: The library does not find or read it.
    """
    import datasets

    path = Path(argument)
    is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if path.is_dir() and not is_saved:
        raise UsageError(
            f"--data hf:{make_printable(argument)}: that folder was not written by save_to_disk: --data folder:PATH"
            " reads a folder of images, --data parquet:PATH one of parquet files"
        )
    match = _SPEC.fullmatch(argument)
    if not (is_saved or match):
        raise UsageError(
            f"--data hf:{make_printable(argument)}: expected NAME, NAME:CONFIG or NAME:CONFIG@REVISION, or a folder"
            " that save_to_disk wrote"
        )
    has_bars = datasets.is_progress_bar_enabled()
    try:
        if not is_shown:
            datasets.disable_progress_bars()
        if is_saved or match is None:
            loaded = datasets.load_from_disk(argument)
        else:
            loaded = datasets.load_dataset(match["name"], match["config"], revision=match["revision"])
    except (Exception, SystemExit) as error:  # of its many libraries
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = make_printable(lines[0], 300)
        raise UsageError(
            f"--data hf:{make_printable(argument)} cannot be loaded: {reason}. Where there is no network, load it once"
            " on a machine that has one, or save it with save_to_disk and name that folder"
        ) from None
    finally:
        if has_bars:
            datasets.enable_progress_bars()
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _name_splits(loaded: dict[str, Any], argument: str) -> dict[str, Any]:
    """Return the splits by our names: a validation split alone is the test split.

    Raises:
        UsageError: None is of training, or two have one name.
    """
    splits: dict[str, Any] = {}
    for name, dataset in loaded.items():
        split = SPLIT_OF_NAME.get(name.lower(), "")
        if split in splits:
            raise UsageError(f"hf:{make_printable(argument)} has two splits that are {split}: {', '.join(loaded)}")
        if split:
            splits[split] = dataset
    if "train" not in splits:
        if len(loaded) != 1:
            raise UsageError(
                f"hf:{make_printable(argument)} has no split train: its splits are {make_printable(', '.join(loaded))}"
            )
        splits = {"train": next(iter(loaded.values()))}
    return order_splits(splits)


def _choose_columns(dataset: Any, place: str, option: str) -> TableColumns:
    """Choose the columns of the images and labels by their features."""
    import datasets

    images, labels = [], []
    features: dict[str, Any] = {}
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            images.append(name)
            features[name] = {"_type": "Image"}
        elif isinstance(feature, datasets.ClassLabel):
            labels.append(name)
            features[name] = {"_type": "ClassLabel", "names": list(feature.names or ())}
        elif isinstance(feature, datasets.Value):
            if feature.dtype in ("binary", "large_binary"):
                images.append(name)
            elif feature.dtype in _TEXT_OR_BOOL or feature.dtype.startswith(("int", "uint", "float")):
                labels.append(name)
    return choose_columns(place, images, labels, list(dataset.features), features, option)


def _list_arrow_files(dataset: Any) -> list[Path] | None:
    """Return the files whose rows, one after the other, are those of a dataset; None where there are none."""
    import pyarrow as pa

    paths = [Path(file["filename"]) for file in dataset.cache_files]
    rows = 0
    try:
        for path in paths:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                if not set(dataset.column_names) <= set(stream.schema.names):
                    return None  # of indices: the rows are in another order
                rows += sum(batch.num_rows for batch in stream)
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"'{make_printable(paths[0].parent)}' is damaged: {make_printable(error)}") from None
    return paths if rows == len(dataset) and paths else None


def _has_bytes(splits: dict[str, Any], columns: dict[str, TableColumns]) -> bool:
    """Return whether the images of every split are in the files, by the first row of each."""
    import datasets

    for split, dataset in splits.items():
        column = columns[split].image
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        first = dataset[0][column] if len(dataset) else None
        if isinstance(first, dict) and first.get("bytes") is None:
            return False
    return True


def _read_file(path: Path, columns: TableColumns) -> Generator[int, None, FileRows]:
    """List the rows of an Arrow file; see RowReader."""
    import pyarrow as pa

    place = f"'{make_printable(path, None)}'"
    rows = RowCollector(place, columns.classes)
    try:
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
            for batch in pa.ipc.open_stream(content):
                if not len(batch):
                    continue
                images = batch.column(columns.image)
                if pa.types.is_struct(images.type):
                    images = images.flatten()[images.type.get_field_index("bytes")]
                labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(images)
                first, ends = _locate_values(images, content)
                read = 0
                for begin, end, is_valid, label in zip(ends[:-1], ends[1:], images.is_valid(), labels, strict=True):
                    if not is_valid.as_py() or begin == end:
                        rows.leave_out(NO_IMAGE)
                        continue
                    offset = first + begin
                    if not 0 <= offset <= content.size - (end - begin):
                        raise CacheError(f"{place} is compressed: save the data set again with save_to_disk")
                    rows.add(offset, memoryview(content)[offset : offset + end - begin], label)
                    read += end - begin
                yield read
    except pa.ArrowException as error:
        raise CacheError(f"{place} is damaged: {make_printable(error)}") from None
    return rows.finish()


def _locate_values(values: Any, content: Any) -> tuple[int, list[int]]:
    """Locate the values of a binary array in the buffer from which it was read without a copy.

    Returns:
        The offset of the data in the buffer, and where each value begins there, with the end of the last.
    """
    import pyarrow as pa

    _, offsets, data = values.buffers()
    dtype = np.dtype(np.int64 if pa.types.is_large_binary(values.type) else np.int32)
    ends = np.frombuffer(offsets, dtype, len(values) + 1, values.offset * dtype.itemsize)
    return (data.address if data is not None else content.address) - content.address, ends.tolist()


class _Rows:
    """The rows of a data set as a map-style dataset of (image, label)."""

    def __init__(self, dataset: Any, columns: TableColumns):
        self.dataset, self.columns = dataset, columns
        self.classes = columns.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int, /) -> tuple[Any, Any]:
        values = self.dataset[row]
        return values[self.columns.image], values[self.columns.label] if self.columns.label else None


def _load_rows(
    splits: dict[str, Any], columns: dict[str, TableColumns], options: ReadingOptions, progress: Progress
) -> SourceData:
    """Load data sets whose images are not in their files: every row is read once.

    Raises:
        UsageError: An option is for images that are read by their offset.
    """
    for name in ("exif", "unreadable"):
        value = getattr(options, name)
        if value not in ("stored", "error"):
            raise UsageError(
                f"--{name} {value}: this data set has paths in the place of images: save it with save_to_disk"
            )
    names: Sequence[str] = () if isinstance(options.classes, str) else options.classes
    has_names = any(part.classes for part in columns.values())
    return load_map_style(
        {split: _Rows(dataset, columns[split]) for split, dataset in splits.items()},
        () if has_names else names,
        CLASSES,
        progress,
    )
