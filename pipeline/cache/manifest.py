"""The manifest of a cache: what the cache holds, file by file, and how it was made.

The manifest is written last, by `CacheWriter.publish_manifest`: where there is one, the cache is complete.
`manifest_reader.py` reads and validates it.
"""

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
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, get_task

from .codec_choice import find_codec
from .folder import MANIFEST_FILE
from .identity import FORMAT, Identity, compute_fingerprint
from .shards import Layout

SPLITS = ("train", "val", "test")
ROW_KEYS = ("index", "label", "view_crc32")  # datasets of every shard
MAX_DRAWS = 100_000
MAX_SHARD_BYTES = 4 << 30  # bytes of a shard; at 12 GB/s its checksum takes a third of a second
MAX_MANIFEST_BYTES = 16 << 20  # bytes of a manifest: some 40,000 shards; JSON takes up to 20 times as much memory
MAX_SHARDS = MAX_MANIFEST_BYTES // 400  # that a writer lists: a record has some 340 bytes
MAX_ROWS = 2**32 - 1  # index is uint32

Datasets = dict[str, tuple[tuple[int, ...], str]]  # {name: (row shape, dtype)}


def list_datasets(classes: int, codec: str, taps: dict[str, list[int]], task: str = CLASSES) -> Datasets:
    """List all datasets that a cache stores of a row: logits, features, and the keys of the row.

    Features are float16, whatever the codec of the logits. The label is the number of a class, except for the tasks of
    several labels and of numbers.

    Args:
        classes: K, the width of the logits.
        codec: Name of the codec of the logits.
        taps: {tap: row shape}.
        task: See data/tasks.py.
    """
    features = {f"features/{tap}": (tuple(shape), "<f2") for tap, shape in taps.items()}
    labels: dict[str, tuple[tuple[int, ...], str]] = {LABELS: ((classes,), "|i1"), NUMBERS: ((classes,), "<f4")}
    keys: Datasets = {"index": ((), "<u4"), "label": labels.get(task, ((), "<i4")), "view_crc32": ((), "<u4")}
    return {**find_codec(codec).datasets(classes), **features, **keys}


def count_row_bytes(datasets: Datasets) -> int:
    """Count the bytes of one row of these datasets, without what HDF5 adds."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in datasets.values())


def make_layout(rows: int, datasets: Datasets) -> Layout:
    """Make {dataset: (shape, dtype)} of so many rows."""
    return {name: ((rows, *shape), dtype) for name, (shape, dtype) in datasets.items()}


@dataclass(frozen=True)
class ShardSpec:
    """A shard before it is written: which rows and datasets it is to hold.

    Attributes:
        path: Path in the cache's folder.
        split: `train`, `val` or `test`.
        draw: Draw of the views; 0 for a held-out split.
        start: Position of its first row in the row order of the split.
        rows: Number of its rows.
        datasets: {name: (row shape, dtype)}.
    """

    path: str
    split: str
    draw: int
    start: int
    rows: int
    datasets: Datasets


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard as the manifest lists it. The attributes are fields of the JSON.

    Attributes:
        path: Path in the cache's folder.
        split: `train`, `val` or `test`.
        draw: Draw of the views; 0 for a held-out split.
        start: Position of its first row in the row order of the split.
        rows: Number of its rows.
        bytes: Size of the file.
        checksum: xxh3-128 of the file.
        payload: xxh3-128 of the datasets alone, equal for equal rows.
        correct: Rows whose label is the top-1 class of the logits; None where the shard holds no logits, and where the
            task is not "classes".
        datasets: Names of its datasets.
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

    @property
    def has_logits(self) -> bool:
        """Whether it holds logits, and not only features that were added later."""
        return "logits" in self.datasets


@dataclass(frozen=True)
class HeadRecord:
    """The file of the teacher's last linear layer: logits = weight [K, D] @ pooled [D] + bias [K], float32.

    Of an embedding it holds mean and standard deviation of each dimension, and perhaps its principal axes.

    Attributes:
        path: Path in the cache's folder.
        bytes: Size of the file.
        checksum: xxh3-128 of the file.
        inputs: D. Of an embedding the number of its principal axes: all, or 0.
    """

    path: str
    bytes: int
    checksum: str
    inputs: int


@dataclass(frozen=True)
class PrecisionRecord:
    """A faster way in which the teacher was run, and how far its logits are from plain float32.

    What is not measured for a task is None, see `codecs.measure_fidelity`.

    Attributes:
        folded: Whether batch norm was folded into the convolutions before it.
        compiled: Whether `torch.compile` compiled the teacher when the cache was started.
        rows: Training views that were run both ways.
        kl_1: Mean KL(plain float32 || this) of these views at temperature 1, in nats.
        kl_4: The same at temperature 4.
        flips: Share of these views whose top-1 class changed; of several labels, share of the labels.
        cosine: Of embeddings, the mean cosine of both.
        relative_error: Of numbers, the mean over the views of the largest difference, in standard deviations.
    """

    folded: bool
    compiled: bool
    rows: int
    kl_1: float | None = None
    kl_4: float | None = None
    flips: float | None = None
    cosine: float | None = None
    relative_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, without those that are not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def cost(self) -> float:
        """What --tolerance limits: the largest KL, 1 - cosine, or the difference of numbers in standard deviations."""
        lost = None if self.cosine is None else 1 - self.cosine
        return max(value for value in (self.kl_1, self.kl_4, lost, self.relative_error) if value is not None)

    def format_cost(self) -> str:
        """Format the number that --tolerance limits, with what it is."""
        kinds = (("KL", self.kl_1), ("1 - cosine", self.cosine), ("standard deviations", self.relative_error))
        return f"{next(kind for kind, value in kinds if value is not None)} {self.cost:.1e}"

    def describe(self) -> str:
        """Describe in one line what was done and what it costs."""
        steps = [name for name, done in (("batch norm folded", self.folded), ("compiled", self.compiled)) if done]
        return f"{', '.join(steps) or 'as the network is'}: {self.describe_cost()}"

    def describe_cost(self) -> str:
        """Describe how far the logits are from those of plain float32."""
        views = f"of {self.rows} views"
        if self.cosine is not None:
            return f"1 - cosine {1 - self.cosine:.1e} to plain float32, mean {views}"
        if self.relative_error is not None:
            return f"{self.relative_error:.1e} standard deviations from plain float32, mean {views}"
        if self.kl_4 is None:
            return f"KL {self.kl_1:.1e} of a label to plain float32, {self.flips:.2%} of the labels {views} change"
        return (
            f"KL {self.kl_1:.1e} to plain float32 at T=1, {self.kl_4:.1e} at T=4, {self.flips:.2%} {views} change"
            " their top-1 class"
        )


@dataclass(frozen=True)
class Manifest:
    """What a cache is, what it holds, and what was measured while it was written.

    The attributes are fields of the JSON, but for `digest`.

    Attributes:
        identity: What makes the cache this one, see `identity.py`.
        classes: K.
        draws: Views of each training image.
        splits: {split: rows}.
        taps: {tap: row shape}.
        shards: Every shard.
        head: The teacher's last linear layer; None where it has none. Of an embedding its statistics.
        teacher: {split: {"accuracy": share of the labelled rows that the teacher classifies correctly, or None}}; of
            other tasks than "classes" also "labelled", the rows with a hard target.
        fidelity: What the codec cost, as means over the rows, see `codecs.measure_fidelity`.
        seconds: Time that running the teacher and writing took.
        settings: Settings of the command that started the cache, without those that concern its machine alone.
        versions: {library: version} of the program that started the cache.
        arithmetic: How the teacher was run, where that was not simply in the precision of the identity. None
            otherwise, and then no field of the JSON.
        digest: SHA-256 of the file, empty before it is written.
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
        """Hash of the identity; every shard has it as an attribute."""
        return compute_fingerprint(self.identity)

    @property
    def task(self) -> str:
        """What the hard targets are, and what the logits are, see data/tasks.py."""
        return get_task(self.identity)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def datasets(self) -> Datasets:
        """All datasets of a row."""
        return list_datasets(self.classes, self.identity["codec"], self.taps, self.task)

    def get_layout(self, record: ShardRecord) -> Layout:
        """Return {dataset: (shape, dtype)} that a shard must have."""
        return make_layout(record.rows, {name: self.datasets[name] for name in record.datasets})

    def get_head_layout(self) -> Layout:
        """Return {dataset: (shape, dtype)} that the file of the head must have."""
        inputs = self.head.inputs if self.head else 0
        if self.task == EMBEDDING:
            names = ("mean", "std", "axis_std") if inputs else ("mean", "std")
            axes: Layout = {"axes": ((self.classes, inputs), "<f4")} if inputs else {}
            return {**dict.fromkeys(names, ((self.classes,), "<f4")), **axes}
        return {"weight": ((self.classes, inputs), "<f4"), "bias": ((self.classes,), "<f4")}

    def iter_views(self) -> Iterable[tuple[str, int]]:
        """Iterate over every (split, draw) that the cache holds."""
        return ((s, d) for s in self.splits for d in range(self.draws if s == "train" else 1))

    def count_views(self) -> int:
        """Count the views whose targets the cache holds: those of every draw of training, one of a held-out image."""
        return sum(rows * (self.draws if split == "train" else 1) for split, rows in self.splits.items())

    def write(self, folder: Path) -> None:
        """Publish the manifest in the cache's folder, sealed with its SHA-256."""
        record = {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        del record["digest"]
        del record["arithmetic"]
        if self.arithmetic is not None:  # programs that do not know the field can still read a cache without it
            record["arithmetic"] = self.arithmetic.to_json()
        publish_text(folder / MANIFEST_FILE, seal(record))


def seal(record: dict[str, Any]) -> str:
    """Make the text of a manifest: the record as JSON, its last field the SHA-256 of all bytes before that field."""
    body = json.dumps(record, indent=1, allow_nan=False)[: -len("\n}")]
    return f'{body},\n "sha256": "{sha256(body.encode()).hexdigest()}"\n}}\n'
