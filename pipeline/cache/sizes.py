"""How large a cache will be, and what its writer and its reader keep in memory, before anything of it is written.

The bytes of a row follow from the codec and the taps; those of a file beside its rows are measured of a file of zeros,
and those of the manifest of one that lists two shards.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .codecs import FIDELITY
from .manifest import MAX_SHARD_BYTES, MAX_SHARDS, Datasets, ShardRecord, count_row_bytes, make_layout
from .plan import choose_shard_rows
from .reader import RESIDENT_BYTES
from .shards import Layout, measure_overhead

_MEASURED_ROWS = 256  # of the file of zeros
_README_BYTES = 1_400
_MANIFEST_BYTES = 2_100  # without classes and shards
_CLASS_BYTES, _NAME_BYTES = 8, 8  # of a class in the manifest beside its name, and of a name that is not known
_CODEC_BYTES = 12  # of a logit, most that encoding or decoding a shard takes beside float32 logits and the result
BLOCK_NUMBERS = 1 << 26  # logits that stage one keeps in float32: 256 MB
_RECORD_MEMORY = 1_500  # bytes of an open manifest for each shard
_WINDOW_ROWS = 4096  # of rows on disk that are read at once


@dataclass(frozen=True)
class CacheSize:
    """The size of a cache.

    Attributes:
        row_bytes: Bytes of a row.
        rows: Rows of all draws and splits.
        shards: Number of shards.
        shard_rows: Rows of the largest shard.
        shard_bytes: Bytes of the largest shard.
        manifest_bytes: Bytes of the manifest.
        files: Number of all files.
        bytes: Bytes of all files.
    """

    row_bytes: int
    rows: int
    shards: int
    shard_rows: int
    shard_bytes: int
    manifest_bytes: int
    files: int
    bytes: int

    @property
    def fits_manifest(self) -> bool:
        """Whether a manifest can list as many shards."""
        return self.shards <= MAX_SHARDS


def measure_size(
    datasets: Datasets,
    splits: dict[str, int],
    draws: int,
    *,
    task: str,
    shard_rows: int = 0,
    head: Layout | None = None,
    class_names: Sequence[str] = (),
    classes: int = 0,
) -> CacheSize:
    """Compute the size of a cache.

    Args:
        datasets: {name: (row shape, dtype)} of a row, see `list_datasets`.
        splits: {split: rows}, at least one of each.
        draws: Views of each training image.
        task: See data/tasks.py.
        shard_rows: Most rows of a shard; 0 for the default.
        head: {name: (shape, dtype)} of the file of the last layer; None where there is none.
        class_names: Names of the classes, as far as they are known.
        classes: Number of the classes, where their names are not known.
    """
    row_bytes = count_row_bytes(datasets)
    most_rows = choose_shard_rows(row_bytes, shard_rows)
    name_bytes = sum(len(json.dumps(name)) - 2 for name in class_names) or _NAME_BYTES * classes
    manifest_bytes = _MANIFEST_BYTES + name_bytes + _CLASS_BYTES * (len(class_names) or classes)
    size = rows_of_all = shards = largest = largest_bytes = 0
    for split, rows in splits.items():
        copies, count = draws if split == "train" else 1, -(-rows // most_rows)
        rows_of_shard = -(-rows // count)
        overhead = measure_overhead(make_layout(min(_MEASURED_ROWS, rows_of_shard), datasets), _make_attributes(task))
        manifest_bytes += copies * count * _measure_record(split, copies, rows_of_shard, datasets)
        size += copies * (rows * row_bytes + count * overhead)
        rows_of_all, shards = rows_of_all + copies * rows, shards + copies * count
        largest = max(largest, rows_of_shard)
        largest_bytes = max(largest_bytes, rows_of_shard * row_bytes + overhead)
    size += _README_BYTES + manifest_bytes
    if head:
        arrays: Datasets = dict(head.items())
        size += count_row_bytes(arrays) + measure_overhead(head, {"fingerprint": "0" * 64})
    return CacheSize(
        row_bytes=row_bytes,
        rows=rows_of_all,
        shards=shards,
        shard_rows=largest,
        shard_bytes=largest_bytes,
        manifest_bytes=manifest_bytes,
        files=shards + (3 if head else 2),
        bytes=size,
    )


def _make_attributes(task: str) -> dict[str, str | int]:
    """Make attributes of a shard that are about as long as those that are written."""
    facts = {"correct": 10_000, "rows": 10_000, "seconds": 10.1234, **dict.fromkeys(FIDELITY[task], 0.1**7)}
    return {"fingerprint": "0" * 64, "split": "train", "draw": 0, "start": 0, "facts": json.dumps(facts)}


def _measure_record(split: str, draws: int, rows: int, datasets: Datasets) -> int:
    """Measure the bytes that a shard of a split takes in the manifest."""
    path = f"draw-{draws - 1:03d}/shard-00000.h5" if split == "train" else f"{split}/shard-00000.h5"
    place = (path, split, draws // 2, rows, rows, rows * count_row_bytes(datasets))
    record = asdict(ShardRecord(*place, "0" * 32, "0" * 32, rows // 2, list(datasets)))
    one, two = (len(json.dumps({"shards": [record] * n}, indent=1)) for n in (1, 2))
    return two - one


def find_shard_rows(datasets: Datasets, splits: dict[str, int], draws: int) -> int:
    """Find the fewest rows of a shard, in thousands, with which a manifest can list all shards; 0 where none are."""

    def is_listed(rows: int) -> bool:
        counts = (-(-n // rows) * (draws if split == "train" else 1) for split, n in splits.items())
        return sum(counts) <= MAX_SHARDS

    low, high = 1, (MAX_SHARD_BYTES - (1 << 20)) // count_row_bytes(datasets) // 1000
    if high < 1 or not is_listed(1000 * high):
        return 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_listed(1000 * middle) else (middle + 1, high)
    return 1000 * low


def estimate_writer_memory(size: CacheSize, classes: int) -> int:
    """Compute the most bytes that stage one holds beside PyTorch, data and teacher.

    Of the shard that is computed, logits in float32 of up to 256 MB, what the codec makes of them and its working
    memory; of the one before, its rows, the file that HDF5 builds in memory and the copy of it that is written.

    Args:
        size: Of the cache.
        classes: K.
    """
    computed_rows = min(size.shard_rows, max(1, BLOCK_NUMBERS // classes))
    return computed_rows * (4 + _CODEC_BYTES) * classes + 4 * size.shard_rows * size.row_bytes


def estimate_reader_memory(size: CacheSize, datasets: Datasets, rows: int, classes: int) -> int:
    """Compute the bytes that a student's process holds of a cache.

    The list of its shards; the order of the training rows, 4 bytes each, and the positions that a student uses, 8
    bytes; two draws where these are kept in memory, else twice the rows that are read at once.

    Args:
        size: Of the cache.
        datasets: {name: (row shape, dtype)} of a row.
        rows: Training rows.
        classes: K.
    """
    target_bytes = count_read_bytes(datasets)
    is_resident = size.row_bytes * rows <= RESIDENT_BYTES
    kept = 2 * rows * target_bytes if is_resident else 2 * _WINDOW_ROWS * (target_bytes + 4 * classes)
    return _RECORD_MEMORY * size.shards + 12 * rows + kept


def count_read_bytes(datasets: Datasets) -> int:
    """Count the bytes of a row that a student reads: its targets and the checksum of the view."""
    return count_row_bytes({name: kind for name, kind in datasets.items() if name not in ("index", "label")})
