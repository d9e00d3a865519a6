"""Writing a cache: shard by shard, each whole or absent, the manifest last, and going on where it was left."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import Refused

from .codec import CODECS, TEMPERATURES
from .identity import Identity, describe, fingerprint
from .manifest import NAME, UNFINISHED, HeadRecord, Manifest, ShardRecord, layout_of, read_manifest, row_bytes
from .publish import publish_json
from .shards import Arrays, Shard, Written, write_shard

_SHARD_BYTES, _SHARD_ROWS = 128 << 20, 65_536


@dataclass(frozen=True)
class Piece:
    """A shard to be: rows start to start + rows of a split, in the row order, in one draw."""

    split: str
    draw: int
    start: int
    rows: int
    number: int

    @property
    def path(self) -> str:
        """Its name in the cache's folder."""
        folder = f"draw-{self.draw:03d}" if self.split == "train" else self.split
        return f"{folder}/shard-{self.number:05d}.h5"


@dataclass(frozen=True)
class Plan:
    """What a cache is to hold. datasets: {name: [row shape, dtype]}; splits: {name: rows}; taps: {name: row shape}."""

    identity: Identity
    draws: int
    splits: dict[str, int]
    taps: dict[str, list[int]]
    datasets: dict[str, list[Any]]
    shard_rows: int = 0

    @property
    def row_bytes(self) -> int:
        """Of one row, without what HDF5 adds."""
        return row_bytes(self.datasets)

    def pieces(self) -> Iterator[Piece]:
        """Every shard, in the order in which they are written."""
        most = self.shard_rows or min(_SHARD_ROWS, max(1, _SHARD_BYTES // self.row_bytes))
        for split, n in self.splits.items():
            cuts = np.linspace(0, n, -(-n // most) + 1).astype(int)
            for draw in range(self.draws if split == "train" else 1):
                for i, (a, b) in enumerate(pairwise(cuts)):
                    yield Piece(split, draw, int(a), int(b - a), i)

    @property
    def bytes(self) -> int:
        """Of the whole cache, about."""
        rows = sum(n * (self.draws if split == "train" else 1) for split, n in self.splits.items())
        return rows * self.row_bytes


def datasets_of(classes: int, codec: str, taps: dict[str, list[int]]) -> dict[str, list[Any]]:
    """{name: [row shape, dtype]} of a shard. Features are float16, whatever the codec of the logits."""
    logits = {name: [list(shape), dtype] for name, (shape, dtype) in CODECS[codec].datasets(classes).items()}
    features = {f"features/{tap}": [shape, "<f2"] for tap, shape in taps.items()}
    keys = {"index": [[], "<u4"], "label": [[], "<i4"], "view_crc32": [[], "<u4"]}
    return {**logits, **features, **keys}


@dataclass
class Writer:
    """A cache that is being written. finished: whether it was whole already."""

    folder: Path
    plan: Plan
    records: list[ShardRecord] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)
    finished: Manifest | None = None

    @staticmethod
    def begin(folder: Path, plan: Plan) -> "Writer":
        """Claim a folder. Raises Refused when it holds another cache, or too little space is left."""
        writer = Writer(folder, plan)
        if (folder / NAME).is_file():
            writer.finished = _same(folder, plan)
            return writer
        if folder.is_dir() and any(folder.iterdir()) and not (folder / UNFINISHED).is_file():
            raise Refused(f"'{folder}' is not empty and no cache: choose another --out")
        claim = {"identity": plan.identity, "draws": plan.draws, "taps": plan.taps, "shard_rows": plan.shard_rows}
        if (folder / UNFINISHED).is_file():
            begun = _claim(folder)
            if begun != claim:
                fields = describe(claim, begun, ("asked", "in the folder"))
                raise Refused(f"'{folder}' holds an unfinished cache of another kind: {fields}. Choose another --out")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            publish_json(folder / UNFINISHED, claim)
        free = shutil.disk_usage(folder).free
        if plan.bytes > free:
            raise Refused(f"the cache needs {plan.bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at '{folder}'")
        return writer

    def have(self, piece: Piece) -> bool:
        """Whether that shard is there, whole and of this cache; then it is taken over. A damaged one is not."""
        path = self.folder / piece.path
        if not path.exists():
            return False
        try:
            shard = Shard(path, layout_of(piece.rows, self.plan.datasets))
            wanted = self._attributes(piece)
            if any(shard.attributes.get(key) != value for key, value in wanted.items()):
                return False
            written = shard.verified()
            facts = json.loads(str(shard.attributes["facts"]))
        except (Refused, KeyError, ValueError):
            return False
        self._note(piece, written, facts)
        return True

    def add(self, piece: Piece, arrays: Arrays, facts: dict[str, float]) -> None:
        """Publish one shard. facts: rows whose label was hit, and the sums of codec.fidelity."""
        path = self.folder / piece.path
        path.parent.mkdir(exist_ok=True)
        attributes = {**self._attributes(piece), "facts": json.dumps(facts)}
        self._note(piece, write_shard(path, arrays, attributes), facts)

    def _attributes(self, piece: Piece) -> dict[str, str | int]:
        name = fingerprint(self.plan.identity)
        return {"fingerprint": name, "split": piece.split, "draw": piece.draw, "start": piece.start}

    def _note(self, piece: Piece, written: Written, facts: dict[str, float]) -> None:
        self.records.append(
            ShardRecord(
                piece.path, piece.split, piece.draw, piece.start, piece.rows, written.bytes, written.checksum,
                written.payload, int(facts["correct"]), self.plan.datasets,
            )
        )  # fmt: skip
        self.costs.append(facts)

    def add_head(self, weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> HeadRecord:
        """Publish the teacher's last linear layer."""
        arrays: Arrays = {"weight": weight.astype("<f4"), "bias": bias.astype("<f4")}
        attributes: dict[str, str | int] = {"fingerprint": fingerprint(self.plan.identity)}
        written = write_shard(self.folder / "head.h5", arrays, attributes)
        datasets = {name: [list(rows.shape), "<f4"] for name, rows in arrays.items()}
        return HeadRecord("head.h5", written.bytes, written.checksum, datasets)

    def finish(self, head: HeadRecord | None, labelled: dict[str, int], versions: dict[str, str]) -> Manifest:
        """Publish the manifest. labelled: rows with a label, per split."""
        manifest = Manifest(
            self.plan.identity, self.plan.draws, self.plan.splits, self.plan.taps, tuple(self.records), head,
            self._accuracy(labelled), self._fidelity(), sum(c["seconds"] for c in self.costs), versions,
        )  # fmt: skip
        manifest.write(self.folder)
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return manifest

    def _accuracy(self, labelled: dict[str, int]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for split in self.plan.splits:
            hits = sum(r.correct for r in self.records if r.split == split)
            rows = labelled[split] * (self.plan.draws if split == "train" else 1)
            found[split] = {"accuracy": hits / rows if rows else None}
        return found

    def _fidelity(self) -> dict[str, float]:
        rows = sum(c["rows"] for c in self.costs)
        names = ["flips", *(f"kl_{T:g}" for T in TEMPERATURES)]
        return {"rows": rows, **{name: sum(c[name] for c in self.costs) / rows for name in names}}


def _claim(folder: Path) -> Any:
    try:
        return json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
    except ValueError:
        raise Refused(f"'{folder / UNFINISHED}' is damaged: choose another --out") from None


def _same(folder: Path, plan: Plan) -> Manifest:
    """The manifest of a whole cache that is the planned one; Refused where it is another."""
    manifest = read_manifest(folder)
    asked = {**plan.identity, "draws": plan.draws, "taps": plan.taps}
    there = {**manifest.identity, "draws": manifest.draws, "taps": manifest.taps}
    if asked != there:
        raise Refused(
            f"'{folder}' holds another cache: {describe(asked, there, ('asked', 'there'))}. Choose another --out"
        )
    return manifest
