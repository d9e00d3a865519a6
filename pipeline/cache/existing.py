"""What is in a folder already, whole or not: a cache goes on in the arithmetic that it was begun with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError

from .folder import IN_PROGRESS_FILE, MANIFEST_FILE
from .identity import Identity, compute_fingerprint
from .manifest_reader import read_in_progress_file, read_manifest
from .precision_record import PrecisionRecord, parse_precision_record
from .recovery import find_lost_shards, measure_extent
from .shards import read_claims

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class ExistingCache:
    """precision: of its identity; arithmetic: None where the teacher is asked as it is; taps: those that are there."""

    precision: str
    arithmetic: PrecisionRecord | None
    taps: tuple[str, ...] = ()


def read_existing(folder: Path, identity: Identity) -> ExistingCache | None:
    """What a cache in a folder was begun with, if there is one; identity: with any precision.

    The manifest says it, or the claim of an unfinished cache, or, where both are lost, its shards. Nothing is
    compared but fingerprints of shards: whether it is the cache that is asked for is for others to find.
    """
    if (folder / MANIFEST_FILE).is_file():
        manifest = read_manifest(folder)
        return ExistingCache(manifest.identity["precision"], manifest.arithmetic, tuple(manifest.taps))
    if (folder / IN_PROGRESS_FILE).is_file():
        return _claimed(read_in_progress_file(folder))
    for precision in PRECISIONS:
        try:
            lost = find_lost_shards(folder, compute_fingerprint({**identity, "precision": precision}), {})
        except CacheError:  # of the other precision, or of another cache, which the writer will refuse
            continue
        if lost:
            there = next(piece.path for piece in lost if (folder / piece.path).exists())
            return ExistingCache(precision, _said(folder, there), tuple(measure_extent(lost)[1]))
    return None


def _claimed(claim: dict[str, Any]) -> ExistingCache | None:
    identity = claim.get("identity")
    precision = identity.get("precision") if isinstance(identity, dict) else None
    return (
        ExistingCache(precision, parse_precision_record(claim.get("arithmetic"))) if precision in PRECISIONS else None
    )


def _said(folder: Path, name: str) -> PrecisionRecord | None:
    """By the facts in a shard."""
    said = read_claims(folder, name)
    try:
        return parse_precision_record(json.loads(str(said[0]["facts"]))["arithmetic"]) if said else None
    except (KeyError, ValueError, TypeError):
        return None
