"""Writing a cache: shard by shard, each whole or absent, the manifest last; going on, and growing."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, CacheMismatchError
from softcache.base.files import make_folder, publish_json, sync
from softcache.base.lock import LOCK, hold_lock
from softcache.base.schema import validate

from .codecs import TEMPERATURES
from .folder import (
    HEAD_FILE,
    IN_PROGRESS_FILE,
    MANIFEST_FILE,
    list_foreign_files,
    make_shard_path,
    remove_stale_shard_files,
)
from .identity import Identity, compute_fingerprint, format_differences
from .manifest import (
    MAX_MANIFEST_BYTES,
    MAX_SHARD_BYTES,
    ROW_KEYS,
    HeadRecord,
    Manifest,
    ShardRecord,
    ShardSpec,
    count_row_bytes,
    list_datasets,
    make_layout,
)
from .manifest_reader import IDENTITY_SCHEMA, SETTINGS_SCHEMA, read_in_progress_file, read_manifest
from .precision_record import PrecisionRecord
from .recovery import find_lost_shards, measure_extent
from .shards import Arrays, Shard, ShardDigest, read_claims, write_shard

_SHARD_BYTES, _SHARD_ROWS = 128 << 20, 65_536
_RECORD_BYTES = 400  # of a shard in the manifest, about
Facts = dict[str, Any]  # what was measured while a shard was written


def clean_up(folder: Path) -> None:
    """Remove what a killed process left in a complete cache: temporary files, and a lock file that nobody holds.

    Nothing depends on it: where it cannot be done, on a read-only mount or beside another writer, it is left.
    """
    with suppress(CacheError, OSError):
        if any(path.name == LOCK or path.suffix == ".tmp" for path in folder.rglob(".*")):
            with hold_lock(folder):
                remove_stale_shard_files(folder, [record.path for record in read_manifest(folder).shards])


@dataclass(frozen=True)
class CachePlan:
    """What a cache is to hold. classes: K; splits: {name: rows}; taps: {name: row shape}; settings, arithmetic: see
    Manifest."""

    identity: Identity
    classes: int
    draws: int
    splits: dict[str, int]
    taps: dict[str, list[int]]
    shard_rows: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    arithmetic: PrecisionRecord | None = None

    def missing_shards(self, there: Iterable[ShardRecord | ShardSpec] = ()) -> Iterator[ShardSpec]:
        """Every shard that is not there, in the order in which they are written."""
        everything = list_datasets(self.classes, self.identity["codec"], self.taps)
        parts: dict[tuple[str, int], list[set[str]]] = {}
        for record in there:
            if record.start == 0:
                parts.setdefault((record.split, record.draw), []).append(set(record.datasets) - set(ROW_KEYS))
        for split, n in self.splits.items():
            for draw in range(self.draws if split == "train" else 1):
                have = parts.get((split, draw), [])
                missing = {name: kind for name, kind in everything.items() if name not in set().union(*have)}
                if set(missing) == set(ROW_KEYS):
                    continue
                most = self.shard_rows or min(_SHARD_ROWS, _SHARD_BYTES // count_row_bytes(missing))
                most = max(1, min(most, (MAX_SHARD_BYTES - (1 << 20)) // count_row_bytes(missing)))
                cuts = np.linspace(0, n, -(-n // most) + 1).astype(int)
                for i, (a, b) in enumerate(pairwise(cuts)):
                    path = make_shard_path(split, draw, i, len(have))
                    yield ShardSpec(path, split, draw, int(a), int(b - a), missing)

    def extended_to(self, draws: int, taps: dict[str, list[int]]) -> "CachePlan":
        """The same, and what is there already: a cache grows, it never shrinks."""
        return replace(self, draws=max(self.draws, draws), taps={**taps, **self.taps})


@dataclass
class CacheWriter:
    """A cache that is being written. todo: the shards that are not in the manifest; grown: what there was before."""

    folder: Path
    plan: CachePlan
    missing: list[ShardSpec]
    previous: Manifest | None = None
    records: list[ShardRecord] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)

    @staticmethod
    def examine(folder: Path, plan: CachePlan) -> "CacheWriter":
        """What there is to do in a folder whose lock is held; nothing is written. Raises CacheMismatchError or
        CacheError."""
        validate(plan.identity, IDENTITY_SCHEMA, "identity")  # what is written must be readable
        validate(plan.settings, SETTINGS_SCHEMA, "settings")
        if (folder / MANIFEST_FILE).is_file():
            there = read_manifest(folder)
            check_same_identity(folder, plan.identity, plan.taps, there)
            plan = plan.extended_to(there.draws, there.taps)
            return CacheWriter(folder, plan, list(plan.missing_shards(there.shards)), there)
        lost = find_lost_shards(folder, compute_fingerprint(plan.identity), plan.splits)
        plan = plan.extended_to(*measure_extent(lost))
        return CacheWriter(folder, plan, [*lost, *plan.missing_shards(lost)])

    @property
    def is_complete(self) -> bool:
        """Whether the cache is whole, holds all that is planned, and nothing was left behind."""
        return self.previous is not None and not self.missing and not (self.folder / IN_PROGRESS_FILE).exists()

    def start(self) -> None:
        """Claim the folder. Raises CacheMismatchError when another cache was begun there, CacheError for too little
        space."""
        folder, there = self.folder, self.previous
        if links := [p for p in self.missing if (folder / p.path).parent.is_symlink()]:
            raise CacheError(
                f"'{(folder / links[0].path).parent}' is a link that may lead out of the cache: remove it"
            )
        records = len(self.missing) + (len(there.shards) if there else 0)
        if records * _RECORD_BYTES > MAX_MANIFEST_BYTES:
            raise CacheError(f"{records} shards are more than a manifest can list: make them larger with --shard-rows")
        remove_stale_shard_files(folder, [piece.path for piece in self.missing])
        self._mark_in_progress()
        missing = sum(p.rows * count_row_bytes(p.datasets) for p in self.missing if not (folder / p.path).exists())
        if missing > (free := shutil.disk_usage(folder).free):
            raise CacheError(f"the cache needs {missing / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at '{folder}'")

    def _mark_in_progress(self) -> None:
        """Write down what is begun, or see that it was this that was begun."""
        plan, path = self.plan, self.folder / IN_PROGRESS_FILE
        claim = {"identity": plan.identity, "draws": plan.draws, "taps": plan.taps, "shard_rows": plan.shard_rows}
        if plan.arithmetic:
            claim["arithmetic"] = plan.arithmetic.to_json()
        if path.is_file():
            begun = read_in_progress_file(self.folder)
            if not self.missing and {**claim, "shard_rows": 0} == {**begun, "shard_rows": 0}:
                sync(self.folder)  # stopped between the manifest and this
                path.unlink()
            elif begun != claim and (self.missing or self.previous is None):
                fields = format_differences(claim, begun, ("asked", "begun"))
                begun_with = f"'{self.folder}' holds an unfinished cache of another kind"
                raise CacheMismatchError(f"{begun_with}, to be finished first by its own command:{fields}")
        elif self.missing:
            if self.previous is None and (strange := list_foreign_files(self.folder)):
                raise CacheError(f"'{self.folder}' holds {strange[0]} and no cache: choose another --out")
            publish_json(path, claim)

    def adopt(self, piece: ShardSpec) -> bool:
        """Whether that shard is there, whole and of this cache; then it is taken over. A damaged one is not.

        Raises CacheError for a whole shard of another cache, which would be lost.
        """
        if not (self.folder / piece.path).exists():
            return False
        wanted = self._attributes(piece)
        try:
            shard = Shard(self.folder, piece.path, make_layout(piece.rows, piece.datasets))
            written = shard.digest()
            facts = json.loads(str(shard.attributes["facts"]))
        except (CacheError, KeyError, ValueError):
            said = read_claims(self.folder, piece.path)
            if said is None or said[0].get("fingerprint") == wanted["fingerprint"]:
                return False
            raise CacheError(
                f"{self.folder / piece.path} is of another cache: choose another --out, or move it away"
            ) from None
        if shard.attributes.get("fingerprint") != wanted["fingerprint"]:
            raise CacheError(f"{shard.path} is of another cache: choose another --out, or move it away")
        if any(shard.attributes.get(key) != value for key, value in wanted.items()):
            return False
        self._record(piece, written, facts)
        return True

    def write_shard(self, piece: ShardSpec, arrays: Arrays, facts: Facts) -> None:
        """Publish one shard. facts: rows whose label was hit, and the sums of codec.fidelity, where it has logits."""
        path = self.folder / piece.path
        if self.plan.arithmetic:
            facts = {**facts, "arithmetic": self.plan.arithmetic.to_json()}  # it may lose its manifest
        make_folder(path.parent)
        attributes = {**self._attributes(piece), "facts": json.dumps(facts)}
        self._record(piece, write_shard(path, arrays, attributes), facts)

    def _attributes(self, piece: ShardSpec) -> dict[str, str | int]:
        name = compute_fingerprint(self.plan.identity)
        return {"fingerprint": name, "split": piece.split, "draw": piece.draw, "start": piece.start}

    def _record(self, piece: ShardSpec, written: ShardDigest, facts: Facts) -> None:
        correct = int(facts["correct"]) if "correct" in facts else None
        self.records.append(
            ShardRecord(
                piece.path,
                piece.split,
                piece.draw,
                piece.start,
                piece.rows,
                written.bytes,
                written.checksum,
                written.payload,
                correct,
                list(piece.datasets),
            )
        )
        self.facts.append(facts)

    def sort_records(self) -> None:
        """What was written or taken over, in the order of todo, in whatever order it came."""
        place = {piece.path: i for i, piece in enumerate(self.missing)}
        order = sorted(range(len(self.records)), key=lambda i: place[self.records[i].path])
        self.records, self.facts = [self.records[i] for i in order], [self.facts[i] for i in order]

    def add_head(self, weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> HeadRecord:
        """Publish the teacher's last linear layer."""
        arrays: Arrays = {"weight": weight.astype("<f4"), "bias": bias.astype("<f4")}
        attributes: dict[str, str | int] = {"fingerprint": compute_fingerprint(self.plan.identity)}
        written = write_shard(self.folder / HEAD_FILE, arrays, attributes)
        return HeadRecord(HEAD_FILE, written.bytes, written.checksum, weight.shape[1])

    def build_manifest(self, head: HeadRecord | None, labelled: dict[str, int], versions: dict[str, str]) -> Manifest:
        """What the cache now is. labelled: rows with a label, per split; versions: of what wrote the first part."""
        plan, old = self.plan, self.previous
        shards = (*(old.shards if old else ()), *self.records)
        return Manifest(
            plan.identity,
            plan.classes,
            plan.draws,
            plan.splits,
            plan.taps,
            shards,
            old.head if old else head,
            label_accuracy(shards, plan.splits, plan.draws, labelled),
            self._fidelity(),
            sum(c["seconds"] for c in self.facts) + (old.seconds if old else 0.0),
            old.settings if old else plan.settings,
            old.versions if old else versions,
            plan.arithmetic,
        )

    def publish_manifest(self, manifest: Manifest) -> None:
        """Publish the manifest: from now on there is a whole cache.

        First every name that it relies on is made durable: a killed process may have given it, and not synced.
        """
        for inner in sorted({(self.folder / record.path).parent for record in self.records}):
            sync(inner)
        sync(self.folder)
        sync(self.folder.absolute().parent)
        manifest.write(self.folder)
        (self.folder / IN_PROGRESS_FILE).unlink(missing_ok=True)

    def _fidelity(self) -> dict[str, float]:
        """Means over all rows, those that were there before included."""
        names = ["flips", *(f"kl_{T:g}" for T in TEMPERATURES)]
        sums = [c for c in self.facts if "rows" in c]
        if self.previous:
            before = self.previous.fidelity
            sums.append({"rows": before["rows"], **{name: before[name] * before["rows"] for name in names}})
        rows = sum(c["rows"] for c in sums)
        return {"rows": rows, **{name: sum(c[name] for c in sums) / rows for name in names}}


def label_accuracy(
    shards: Iterable[ShardRecord], splits: Iterable[str], draws: int, labelled: dict[str, int]
) -> dict[str, Any]:
    """{split: {"accuracy": share of the rows with a label that the logits hit, or None}}."""
    found: dict[str, Any] = {}
    for split in splits:
        hits = sum(r.correct for r in shards if r.split == split and r.correct is not None)
        rows = labelled[split] * (draws if split == "train" else 1)
        found[split] = {"accuracy": hits / rows if rows else None}
    return found


def check_same_identity(folder: Path, identity: Identity, taps: dict[str, list[int]], there: Manifest) -> None:
    """Raise CacheMismatchError when the cache that is there is not of this identity, or its taps have other shapes."""
    common = [tap for tap in taps if tap in there.taps]
    asked = {**identity, "taps": {tap: taps[tap] for tap in common}}
    found = {**there.identity, "taps": {tap: there.taps[tap] for tap in common}}
    if asked != found:
        raise CacheMismatchError(
            f"'{folder}' holds another cache:{format_differences(asked, found, ('asked', 'there'))}"
        )
