"""Writing a cache: shard after shard, each of them whole or absent, and the manifest last.

An interrupted cache goes on where it was stopped, and a complete one grows: by the same calls.

    writer = CacheWriter.examine(folder, plan)      # under the folder's lock
    writer.start()
    for spec in writer.missing:
        if not writer.adopt(spec):                  # it is there already, of an interrupted run
            writer.write_shard(spec, *compute(spec))
    writer.publish_manifest(writer.build_manifest(head, labelled_rows, versions))
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, CacheMismatchError
from softcache.base.files import make_folder, publish_json, sync
from softcache.base.lock import LOCK, hold_lock
from softcache.base.schema import validate
from softcache.data.tasks import CLASSES, get_task

from .codec_choice import find_codec
from .codecs import list_measures
from .existing import (
    NOTES,
    Complete,
    ExistingCache,
    NoCache,
    Orphaned,
    Unfinished,
    read_existing,
    read_in_progress_file,
)
from .folder import HEAD_FILE, IN_PROGRESS_FILE, list_foreign_files, remove_stale_shard_files
from .identity import Identity, compute_fingerprint, format_differences
from .manifest import (
    MAX_SHARDS,
    HeadRecord,
    Manifest,
    ShardRecord,
    ShardSpec,
    count_row_bytes,
    list_datasets,
    make_layout,
)
from .manifest_reader import IDENTITY_SCHEMA, SETTINGS_SCHEMA, read_manifest
from .output_statistics import measure_outputs
from .plan import CachePlan
from .recovery import measure_extent, recover_specs
from .shards import Arrays, Shard, ShardDigest, read_header, write_shard

Measurements = dict[str, Any]  # what was measured while a shard was written, see `CacheWriter.write_shard`


@dataclass
class CacheWriter:
    """A cache that is being written. `examine` makes one.

    Attributes:
        folder: Of the cache.
        plan: What the cache is to hold, with all that it holds already.
        missing: Shards that no manifest lists, in the order in which they are written.
        existing: State of the folder when it was examined.
        records: Shards that were written or adopted.
        measurements: {path of such a shard: its measurements}.
    """

    folder: Path
    plan: CachePlan
    missing: list[ShardSpec]
    existing: ExistingCache = field(default_factory=NoCache)
    records: list[ShardRecord] = field(default_factory=list)
    measurements: dict[str, Measurements] = field(default_factory=dict)

    @staticmethod
    def examine(folder: Path, plan: CachePlan) -> "CacheWriter":
        """Find out what there is to write. Nothing is written.

        Raises:
            CacheMismatchError: The folder holds a complete cache of another identity.
            CacheError: It holds shards of another cache, or the plan could not be read back from a manifest.
        """
        validate(plan.identity, IDENTITY_SCHEMA, "identity")
        validate(plan.settings, SETTINGS_SCHEMA, "settings")
        existing = read_existing(folder)
        match existing:
            case NoCache() | Unfinished():
                missing = plan.list_missing_shards()
            case Complete(manifest):
                check_same_identity(folder, plan.identity, plan.taps, manifest)
                plan = plan.extend(manifest.draws, manifest.taps)
                missing = plan.list_missing_shards(manifest.shards)
            case Orphaned(shards):
                specs = recover_specs(folder, shards, compute_fingerprint(plan.identity), plan.splits)
                plan = plan.extend(*measure_extent(specs))
                missing = [*specs, *plan.list_missing_shards(specs)]
        return CacheWriter(folder, plan, missing, existing)

    @property
    def previous(self) -> Manifest | None:
        """The manifest that was there when the folder was examined; None where there was no complete cache."""
        return self.existing.manifest if isinstance(self.existing, Complete) else None

    @property
    def is_complete(self) -> bool:
        """Whether the cache holds all that is planned, and no file is left of its writing."""
        return not self.missing and isinstance(self.existing, Complete) and not self.existing.is_growing

    def start(self, notes: dict[str, Any] | None = None) -> dict[str, Any]:
        """Mark the folder as being written, and remove temporary files of a killed writer.

        Args:
            notes: Values of NOTES for unfinished.json, which are not compared with those of an interrupted writing.

        Returns:
            The content of the unfinished.json of an interrupted writing that this one continues; empty where there is
            none.

        Raises:
            CacheMismatchError: An unfinished cache, or an unfinished addition, of another plan is there.
            CacheError: The folder holds foreign files or a link, there is too little space, or there are too many
                shards.
        """
        folders = [(self.folder / spec.path).parent for spec in self.missing]
        if link := next((path for path in folders if path.is_symlink()), None):
            raise CacheError(f"'{link}' is a link that may lead out of the cache: remove it")
        records = len(self.missing) + (len(self.previous.shards) if self.previous else 0)
        if records > MAX_SHARDS:
            raise CacheError(f"{records} shards are more than a manifest can list: make them larger with --shard-rows")
        remove_stale_shard_files(self.folder, [spec.path for spec in self.missing])
        interrupted = self._mark_in_progress(notes or {})
        absent = [spec for spec in self.missing if not (self.folder / spec.path).exists()]
        needed = sum(spec.rows * count_row_bytes(spec.datasets) for spec in absent)
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise CacheError(
                f"the cache needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at '{self.folder}'"
            )
        return interrupted

    def _mark_in_progress(self, notes: dict[str, Any]) -> dict[str, Any]:
        """Publish unfinished.json; where there is one, compare it with the plan and return it."""
        path, in_progress = self.folder / IN_PROGRESS_FILE, self._describe_plan()
        match self.existing:
            case NoCache() | Orphaned():
                if foreign := list_foreign_files(self.folder):
                    raise CacheError(f"'{self.folder}' holds {foreign[0]} and no cache: choose another --out")
                publish_json(path, {**in_progress, **notes})
            case Unfinished(interrupted):
                self._check_same_plan(in_progress, interrupted)
                return interrupted
            case Complete(is_growing=False):
                if self.missing:
                    publish_json(path, {**in_progress, **notes})
            case Complete(is_growing=True):
                interrupted = read_in_progress_file(self.folder)
                if self.missing:
                    self._check_same_plan(in_progress, interrupted)
                    return interrupted
                if {**in_progress, "shard_rows": 0} == {**_without_notes(interrupted), "shard_rows": 0}:
                    sync(self.folder)  # stopped after the manifest was published and before this file was removed
                    path.unlink()
        return {}

    def _describe_plan(self) -> dict[str, Any]:
        """Make the content of unfinished.json."""
        plan = self.plan
        content = {"identity": plan.identity, "draws": plan.draws, "taps": plan.taps, "shard_rows": plan.shard_rows}
        if plan.precision_record:
            content["arithmetic"] = plan.precision_record.to_json()
        return content

    def _check_same_plan(self, in_progress: dict[str, Any], interrupted: dict[str, Any]) -> None:
        interrupted = _without_notes(interrupted)
        if in_progress != interrupted:
            raise CacheMismatchError(
                f"'{self.folder}' holds an unfinished cache or addition with other settings: finish it first by its"
                f" own command:{format_differences(in_progress, interrupted, ('requested', 'unfinished'))}"
            )

    def adopt(self, spec: ShardSpec) -> bool:
        """Take over the file of a shard that an interrupted run wrote, if it is there and intact.

        Returns:
            Whether it was taken over. If not, the shard is missing or damaged, and is to be written.

        Raises:
            CacheError: The file is a shard of another cache, which would be lost.
        """
        header = read_header(self.folder, spec.path)
        if header is None:
            return False
        attributes, expected = header[0], self._make_attributes(spec)
        if attributes.get("fingerprint") != expected["fingerprint"]:
            raise CacheError(f"{self.folder / spec.path} is of another cache: choose another --out, or move it away")
        if any(attributes.get(key) != value for key, value in expected.items()):
            return False
        try:
            shard = Shard(self.folder, spec.path, make_layout(spec.rows, spec.datasets))
            digest = shard.compute_digest()
            measurements = json.loads(str(shard.attributes["facts"]))
        except (CacheError, KeyError, ValueError):
            return False
        self._add_record(spec, digest, measurements)
        return True

    def write_shard(self, spec: ShardSpec, arrays: Arrays, measurements: Measurements) -> None:
        """Publish one shard.

        Args:
            spec: Of the shard.
            arrays: {dataset: rows}.
            measurements: `seconds`; where the shard holds logits, also the sums of `measure_fidelity`, and of the task
                "classes" `correct`, the rows whose label is the top-1 class. The file stores them too: it may lose its
                manifest.
        """
        path = self.folder / spec.path
        if self.plan.precision_record:
            measurements = {**measurements, "arithmetic": self.plan.precision_record.to_json()}
        make_folder(path.parent)
        attributes = {**self._make_attributes(spec), "facts": json.dumps(measurements)}
        self._add_record(spec, write_shard(path, arrays, attributes), measurements)

    def _make_attributes(self, spec: ShardSpec) -> dict[str, str | int]:
        """Make the attributes of a shard's file that say which rows of which cache it holds."""
        fingerprint = compute_fingerprint(self.plan.identity)
        return {"fingerprint": fingerprint, "split": spec.split, "draw": spec.draw, "start": spec.start}

    def _add_record(self, spec: ShardSpec, digest: ShardDigest, measurements: Measurements) -> None:
        record = ShardRecord(
            path=spec.path,
            split=spec.split,
            draw=spec.draw,
            start=spec.start,
            rows=spec.rows,
            bytes=digest.bytes,
            checksum=digest.checksum,
            payload=digest.payload,
            correct=int(measurements["correct"]) if "correct" in measurements else None,
            datasets=list(spec.datasets),
        )
        self.records.append(record)
        self.measurements[record.path] = measurements

    def sort_records(self) -> None:
        """Bring what was written or adopted into the order of `missing`, in whatever order it came."""
        places = {spec.path: place for place, spec in enumerate(self.missing)}
        self.records.sort(key=lambda record: places[record.path])

    def add_head(self, weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> HeadRecord:
        """Publish the teacher's last linear layer.

        Args:
            weight: [K, D].
            bias: [K].
        """
        return self._write_head({"weight": weight.astype("<f4"), "bias": bias.astype("<f4")}, weight.shape[1])

    def add_output_statistics(self, shards: Sequence[ShardRecord], with_axes: bool) -> HeadRecord:
        """Measure an embedding in the shards of the cache, and publish its statistics.

        Args:
            shards: All shards of the cache.
            with_axes: Whether principal axes are among them.
        """
        plan = self.plan
        codec, task = plan.identity["codec"], get_task(plan.identity)
        datasets = list_datasets(plan.classes, codec, plan.taps, task)
        arrays = measure_outputs(self.folder, shards, datasets, find_codec(codec), with_axes)
        return self._write_head(arrays, plan.classes if with_axes else 0)

    def _write_head(self, arrays: Arrays, inputs: int) -> HeadRecord:
        attributes: dict[str, str | int] = {"fingerprint": compute_fingerprint(self.plan.identity)}
        digest = write_shard(self.folder / HEAD_FILE, arrays, attributes)
        return HeadRecord(HEAD_FILE, digest.bytes, digest.checksum, inputs)

    def build_manifest(
        self, head: HeadRecord | None, labelled_rows: dict[str, int], versions: dict[str, str]
    ) -> Manifest:
        """Build the manifest of all that the cache now holds.

        Args:
            head: The teacher's last linear layer, or the statistics of its embedding, where there is one. A cache that
                grows keeps its own.
            labelled_rows: {split: rows with a label}.
            versions: Of the libraries, for a new cache.
        """
        plan, previous = self.plan, self.previous
        shards = (*(previous.shards if previous else ()), *self.records)
        seconds = sum(self.measurements[record.path]["seconds"] for record in self.records)
        return Manifest(
            identity=plan.identity,
            classes=plan.classes,
            draws=plan.draws,
            splits=plan.splits,
            taps=plan.taps,
            shards=shards,
            head=previous.head if previous else head,
            teacher=compute_label_accuracy(shards, plan.splits, plan.draws, labelled_rows, get_task(plan.identity)),
            fidelity=self._compute_fidelity(),
            seconds=seconds + (previous.seconds if previous else 0.0),
            settings=previous.settings if previous else plan.settings,
            versions=previous.versions if previous else versions,
            arithmetic=plan.precision_record,
        )

    def _compute_fidelity(self) -> dict[str, float]:
        """Compute means over all rows of the cache, those that were there before included."""
        names = list_measures(get_task(self.plan.identity), find_codec(self.plan.identity["codec"]))
        sums = [part for record in self.records if "rows" in (part := self.measurements[record.path])]
        if self.previous:
            means = self.previous.fidelity
            sums.append({"rows": means["rows"], **{name: means[name] * means["rows"] for name in names}})
        rows = sum(part["rows"] for part in sums)
        return {"rows": rows, **{name: sum(part[name] for part in sums) / rows for name in names}}

    def publish_manifest(self, manifest: Manifest) -> None:
        """Publish the manifest: from now on the cache is complete.

        Before that, all names that it relies on are made durable: a process that was killed may have given them to its
        files without a sync of their folder.
        """
        for inner in sorted({(self.folder / record.path).parent for record in self.records}):
            sync(inner)
        sync(self.folder)
        sync(self.folder.absolute().parent)
        manifest.write(self.folder)
        (self.folder / IN_PROGRESS_FILE).unlink(missing_ok=True)


def _without_notes(in_progress: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in in_progress.items() if key not in NOTES}


def compute_label_accuracy(
    shards: Sequence[ShardRecord],
    splits: Iterable[str],
    draws: int,
    labelled_rows: dict[str, int],
    task: str = CLASSES,
) -> dict[str, Any]:
    """Compute {split: {"accuracy": share of the labelled rows whose label is the logits' top-1 class, or None}}.

    Of another task than "classes" there is no accuracy, and "labelled" is the number of rows with a hard target.
    """
    if task != CLASSES:
        return {split: {"accuracy": None, "labelled": labelled_rows[split]} for split in splits}
    teacher: dict[str, Any] = {}
    for split in splits:
        correct = sum(shard.correct for shard in shards if shard.split == split and shard.correct is not None)
        rows = labelled_rows[split] * (draws if split == "train" else 1)
        teacher[split] = {"accuracy": correct / rows if rows else None}
    return teacher


def check_same_identity(folder: Path, identity: Identity, taps: dict[str, list[int]], manifest: Manifest) -> None:
    """Check that a complete cache is of this identity, and that the taps that both have are of the same shapes.

    Raises:
        CacheMismatchError: It is not. The message lists the fields that differ.
    """
    common = [tap for tap in taps if tap in manifest.taps]
    requested = {**identity, "taps": {tap: taps[tap] for tap in common}}
    existing = {**manifest.identity, "taps": {tap: manifest.taps[tap] for tap in common}}
    if requested != existing:
        raise CacheMismatchError(
            f"'{folder}' holds another cache:{format_differences(requested, existing, ('requested', 'in the cache'))}"
        )


def clean_up(folder: Path) -> None:
    """Remove what a killed process left in a complete cache: temporary files, and a lock file that nobody holds.

    Nothing depends on it: where it is not possible, on a read-only mount or beside another writer, they stay.
    """
    with suppress(CacheError, OSError):
        if any(path.name == LOCK or path.suffix == ".tmp" for path in folder.rglob(".*")):
            with hold_lock(folder):
                remove_stale_shard_files(folder, [record.path for record in read_manifest(folder).shards])
