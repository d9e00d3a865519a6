"""What a cache claims to be. Written last: where there is a manifest, there is a whole cache."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.errors import Refused

from .identity import FORMAT, Identity, fingerprint
from .publish import publish_json
from .shards import Layout

NAME, UNFINISHED = "manifest.json", "unfinished.json"
_MAX_BYTES = 64 << 20  # of a manifest; 100,000 shards need 40 MB


Datasets = dict[str, list[Any]]  # {name: [row shape, dtype]}


def row_bytes(datasets: Datasets) -> int:
    """Of one row, without what HDF5 adds."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in datasets.values())


def layout_of(rows: int, datasets: Datasets) -> Layout:
    """{dataset: (whole shape, dtype)} of so many rows."""
    return {name: ((rows, *shape), dtype) for name, (shape, dtype) in datasets.items()}


@dataclass(frozen=True)
class ShardRecord:
    """One shard. start, rows: its range in the row order of its split; correct: rows whose label the logits hit."""

    path: str
    split: str
    draw: int
    start: int
    rows: int
    bytes: int
    checksum: str
    payload: str
    correct: int
    datasets: dict[str, list[Any]]  # name: [row shape, dtype]

    @property
    def row_bytes(self) -> int:
        """Of one row, without what HDF5 adds."""
        return row_bytes(self.datasets)

    def layout(self) -> Layout:
        """{dataset: (whole shape, dtype)}."""
        return layout_of(self.rows, self.datasets)


@dataclass(frozen=True)
class HeadRecord:
    """The teacher's last linear layer: logits = weight [K, D] @ pooled [D] + bias [K], float32."""

    path: str
    bytes: int
    checksum: str
    datasets: dict[str, list[Any]]

    def layout(self) -> Layout:
        """{dataset: (shape, dtype)}."""
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in self.datasets.items()}


@dataclass(frozen=True)
class Manifest:
    """identity, what was kept (draws, taps, splits), and what was measured while it was written.

    splits: {name: rows}; taps: {name: row shape}; teacher: {split: {"accuracy": share or None}};
    fidelity: KL in nats and share of flips that the codec cost; seconds of stage one; versions of what wrote it.
    """

    identity: Identity
    draws: int
    splits: dict[str, int]
    taps: dict[str, list[int]]
    shards: tuple[ShardRecord, ...]
    head: HeadRecord | None
    teacher: dict[str, Any]
    fidelity: dict[str, float]
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of the identity; every shard carries it too."""
        return fingerprint(self.identity)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Publish the manifest into the cache's folder."""
        record = {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        publish_json(folder / NAME, record)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache, checked in itself. Raises Refused with the reason and the way out."""
    path = folder / NAME
    if folder.is_file():
        raise Refused(f"'{folder}' is a file: a cache is a folder")
    if not folder.is_dir():
        raise Refused(f"there is no cache at '{folder}': make one with  python -m stages teacher-cache --out {folder}")
    if not path.is_file():
        if (folder / UNFINISHED).is_file():
            raise Refused(f"'{folder}' holds no finished cache: run the same teacher-cache command again to finish it")
        raise Refused(f"'{folder}' is no cache: it has no {NAME}")
    if path.stat().st_size > _MAX_BYTES:
        raise Refused(f"{path}: {path.stat().st_size} bytes, more than a manifest ever has")
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise Refused(f"{path}: format {record['format']}, this program reads {FORMAT}")
        manifest = _from_json(record)
        if record["fingerprint"] != manifest.fingerprint:
            raise Refused(
                f"{path}: its identity was edited: its fingerprint is {manifest.fingerprint[:12]},"
                f" written down is {str(record['fingerprint'])[:12]}"
            )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(f"{path}: not a manifest ({type(error).__name__}: {str(error)[:80]})") from None
    _check(path, manifest)
    return manifest


def _from_json(record: dict[str, Any]) -> Manifest:
    head = record["head"]
    return Manifest(
        identity=dict(record["identity"]),
        draws=int(record["draws"]),
        splits={str(k): int(v) for k, v in record["splits"].items()},
        taps={str(k): [int(n) for n in v] for k, v in record["taps"].items()},
        shards=tuple(ShardRecord(**shard) for shard in record["shards"]),
        head=HeadRecord(**head) if head else None,
        teacher=dict(record["teacher"]),
        fidelity=dict(record["fidelity"]),
        seconds=float(record["seconds"]),
        versions=dict(record["versions"]),
    )


def _check(path: Path, manifest: Manifest) -> None:
    """The shards tile every split and draw, without gap or overlap, and stay inside the folder."""
    wanted = {(split, draw) for split in manifest.splits for draw in range(manifest.draws if split == "train" else 1)}
    filled = dict.fromkeys(wanted, 0)
    for shard in sorted(manifest.shards, key=lambda s: (s.split, s.draw, s.start)):
        inside(path, shard.path)
        key = (shard.split, shard.draw)
        if key not in filled or shard.start != filled[key] or shard.rows < 1:
            raise Refused(
                f"{path}: {shard.path} begins at row {shard.start} of {key[0]}, draw {key[1]}: it does not follow on"
            )
        filled[key] += shard.rows
    for (split, draw), rows in filled.items():
        if rows != manifest.splits[split]:
            raise Refused(f"{path}: {split}, draw {draw} has {rows} of {manifest.splits[split]} rows")
    if manifest.head:
        inside(path, manifest.head.path)


def inside(path: Path, name: str) -> None:
    """Refuse a file name from a manifest that could lead out of the cache's folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or len(parts) > 2:
        raise Refused(f"{path}: '{name}' is not a file of this cache")
