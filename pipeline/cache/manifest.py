"""What a cache claims to be. Written last: where there is a manifest, there is a whole cache."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.files import publish_text

from .codecs import CODECS
from .folder import MANIFEST_FILE
from .identity import FORMAT, Identity, compute_fingerprint
from .precision_record import PrecisionRecord
from .shards import Layout

SPLITS = ("train", "val", "test")
ROW_KEYS = {"index": ((), "<u4"), "label": ((), "<i4"), "view_crc32": ((), "<u4")}  # of every shard
MAX_DRAWS = 100_000
MAX_SHARD_BYTES = 4 << 30  # bytes of a shard; at 12 GB/s its checksum takes a third of a second
MAX_MANIFEST_BYTES = 16 << 20  # bytes of a manifest: some 40,000 shards; JSON takes up to 20 times as much memory
MAX_ROWS = 2**32 - 1  # index is uint32

Datasets = dict[str, tuple[tuple[int, ...], str]]  # {name: (row shape, dtype)}


def list_datasets(classes: int, codec: str, taps: dict[str, list[int]]) -> Datasets:
    """Everything that is kept of a row. Features are float16, whatever the codec of the logits."""
    features = {f"features/{tap}": (tuple(shape), "<f2") for tap, shape in taps.items()}
    return {**CODECS[codec].datasets(classes), **features, **ROW_KEYS}


def count_row_bytes(datasets: Datasets) -> int:
    """Of one row, without what HDF5 adds."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in datasets.values())


def make_layout(rows: int, datasets: Datasets) -> Layout:
    """{dataset: (whole shape, dtype)} of so many rows."""
    return {name: ((rows, *shape), dtype) for name, (shape, dtype) in datasets.items()}


@dataclass(frozen=True)
class ShardSpec:
    """A shard to be: rows start to start + rows of a split, in the row order, in one draw; the datasets it holds."""

    path: str
    split: str
    draw: int
    start: int
    rows: int
    datasets: Datasets


@dataclass(frozen=True)
class ShardRecord:
    """One shard: rows start to start + rows of the row order of a split, in one draw; and the datasets it holds.

    bytes, checksum: size and xxh3-128 of the file; payload: xxh3-128 of its datasets alone; correct: rows whose
    label the logits hit, None where it holds no logits.
    """

    path: str
    split: str
    draw: int
    start: int
    rows: int
    bytes: int
    checksum: str
    payload: str
    correct: int | None
    datasets: list[str]


@dataclass(frozen=True)
class HeadRecord:
    """The teacher's last linear layer: logits = weight [K, D] @ pooled [D] + bias [K], float32."""

    path: str
    bytes: int
    checksum: str
    inputs: int


@dataclass(frozen=True)
class Manifest:
    """identity, what was kept (draws, splits, taps), and what was measured while it was written.

    classes: K; splits: {name: rows}; taps: {name: row shape}; teacher: {split: {"accuracy": share or None}};
    fidelity: KL in nats and share of flips that the codec cost; seconds of stage one; settings: those of the
    command that began it, without what is of its machine alone; versions of what wrote it; arithmetic: None, and no
    field of the file, where the teacher was asked as it is; digest: SHA-256 of the file.
    """

    identity: Identity
    classes: int
    draws: int
    splits: dict[str, int]
    taps: dict[str, list[int]]
    shards: tuple[ShardRecord, ...]
    head: HeadRecord | None
    teacher: dict[str, Any]
    fidelity: dict[str, float]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    arithmetic: PrecisionRecord | None = None
    digest: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the identity; every shard carries it too."""
        return compute_fingerprint(self.identity)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def datasets(self) -> Datasets:
        """Everything that is kept of a row."""
        return list_datasets(self.classes, self.identity["codec"], self.taps)

    def layout(self, record: ShardRecord) -> Layout:
        """What a shard must hold: {dataset: (whole shape, dtype)}."""
        return make_layout(record.rows, {name: self.datasets[name] for name in record.datasets})

    def head_layout(self) -> Layout:
        """What the head's file must hold."""
        inputs = self.head.inputs if self.head else 0
        return {"weight": ((self.classes, inputs), "<f4"), "bias": ((self.classes,), "<f4")}

    def views(self) -> Iterable[tuple[str, int]]:
        """Every (split, draw) that is kept."""
        return ((s, d) for s in self.splits for d in range(self.draws if s == "train" else 1))

    def write(self, folder: Path) -> None:
        """Publish the manifest into the cache's folder, sealed by its own SHA-256."""
        record = {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        del record["digest"]
        if self.arithmetic is None:  # so that such a cache is still read by programs that know no other
            del record["arithmetic"]
        publish_text(folder / MANIFEST_FILE, seal(record))


def seal(record: dict[str, Any]) -> str:
    """The text of a manifest: the record as JSON, and as its last field the SHA-256 of every byte before."""
    body = json.dumps(record, indent=1, allow_nan=False)[: -len("\n}")]
    return f'{body},\n "sha256": "{sha256(body.encode()).hexdigest()}"\n}}\n'
