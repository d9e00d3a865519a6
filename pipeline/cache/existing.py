"""What is in a folder before a cache is written there: the four states that its files can be in.

    NoCache     nothing that belongs to a cache
    Unfinished  a cache whose first writing was interrupted: unfinished.json and no manifest
    Complete    a manifest, and so every shard that it lists; while the cache grows, unfinished.json beside it
    Orphaned    shards, and neither manifest nor unfinished.json: they were lost

`read_existing` finds the state; the writer and the commands `match` it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError
from softcache.base.files import read_regular_file

from .folder import IN_PROGRESS_FILE, MANIFEST_FILE
from .identity import PRECISIONS, Identity, compute_fingerprint
from .manifest import MAX_MANIFEST_BYTES, Manifest, PrecisionRecord
from .manifest_reader import parse_precision_record, read_manifest
from .recovery import OrphanedShard, find_orphaned_shards, measure_extent, recover_specs


@dataclass(frozen=True)
class NoCache:
    """There is no cache in the folder, and perhaps no folder."""


@dataclass(frozen=True)
class Unfinished:
    """A cache whose first writing was interrupted.

    Attributes:
        in_progress: Content of unfinished.json: identity, draws, taps, shard_rows and, where there is one, arithmetic.
    """

    in_progress: dict[str, Any]


@dataclass(frozen=True)
class Complete:
    """A cache with a manifest.

    Attributes:
        manifest: What it holds.
        is_growing: Whether unfinished.json is there: draws or taps are being added, or the process was killed after it
            published the manifest and before it removed that file.
    """

    manifest: Manifest
    is_growing: bool


@dataclass(frozen=True)
class Orphaned:
    """Shards without a manifest.

    Attributes:
        shards: Every readable shard, of this cache or of another one.
    """

    shards: tuple[OrphanedShard, ...]


ExistingCache = NoCache | Unfinished | Complete | Orphaned
# Keys of unfinished.json that are no part of the plan: the options of the command, and the teacher's outputs for a few
# views. Files of earlier versions lack them.
NOTES = ("options", "reference_outputs")


def read_existing(folder: Path) -> ExistingCache:
    """Find out in which state the folder of a cache is. Nothing is written.

    Raises:
        CacheError: The manifest is invalid; or there is none and unfinished.json is damaged.
    """
    is_in_progress = (folder / IN_PROGRESS_FILE).is_file()
    if (folder / MANIFEST_FILE).is_file():
        return Complete(read_manifest(folder), is_growing=is_in_progress)
    if is_in_progress:
        return Unfinished(read_in_progress_file(folder))
    shards = find_orphaned_shards(folder)
    return Orphaned(shards) if shards else NoCache()


def read_in_progress_file(folder: Path) -> dict[str, Any]:
    """Read unfinished.json. Its fields are not validated: they are only compared with those of a plan.

    Raises:
        CacheError: It is no JSON object.
    """
    try:
        in_progress = json.loads(read_regular_file(folder, IN_PROGRESS_FILE, MAX_MANIFEST_BYTES))
        if isinstance(in_progress, dict):
            return in_progress
    except ValueError:
        pass
    raise CacheError(
        f"'{folder / IN_PROGRESS_FILE}' is damaged: choose another --out, or delete it when its shards are yours"
    )


@dataclass(frozen=True)
class InferenceSettings:
    """How the rows of an existing cache were computed, so that further rows are computed in the same way.

    Attributes:
        precision: Precision of its identity.
        record: How the teacher was run, where that was not simply in this precision.
        taps: Taps whose features it holds. Empty for an unfinished cache, whose command names them again.
    """

    precision: str
    record: PrecisionRecord | None
    taps: tuple[str, ...] = ()


def read_inference_settings(folder: Path, existing: ExistingCache, identity: Identity) -> InferenceSettings | None:
    """Read how the rows of an existing cache were computed; None where there is no cache or no record of it.

    Whether it is the cache of this identity is not checked; the writer does that.

    Args:
        folder: The cache's folder.
        existing: Its state.
        identity: Of the cache to write, with any precision.
    """
    match existing:
        case Complete(manifest):
            return InferenceSettings(manifest.identity["precision"], manifest.arithmetic, tuple(manifest.taps))
        case Unfinished(in_progress):
            recorded = in_progress.get("identity")
            precision = recorded.get("precision") if isinstance(recorded, dict) else None
            if precision not in PRECISIONS:
                return None
            return InferenceSettings(precision, parse_precision_record(in_progress.get("arithmetic")))
        case Orphaned(shards):
            return _read_settings_of_shards(folder, shards, identity)
        case NoCache():
            return None


def _read_settings_of_shards(
    folder: Path, shards: tuple[OrphanedShard, ...], identity: Identity
) -> InferenceSettings | None:
    """Find the precision with which the identity has the fingerprint that all shards carry."""
    precisions = {compute_fingerprint({**identity, "precision": precision}): precision for precision in PRECISIONS}
    fingerprint, *others = {str(shard.attributes.get("fingerprint")) for shard in shards}
    first = next((shard for shard in shards if shard.spec), None)
    if others or fingerprint not in precisions or first is None:  # the writer refuses shards of another cache
        return None
    taps = measure_extent(recover_specs(folder, shards, fingerprint, splits={}))[1]
    try:
        record = parse_precision_record(json.loads(str(first.attributes["facts"]))["arithmetic"])
    except (KeyError, ValueError, TypeError):
        record = None
    return InferenceSettings(precisions[fingerprint], record, tuple(taps))
