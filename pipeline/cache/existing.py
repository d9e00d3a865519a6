"""What is in a folder already, whole or not: a cache goes on in the arithmetic that it was begun with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError

from .identity import Identity, fingerprint
from .manifest import NAME, UNFINISHED
from .manifest_reader import read_claim, read_manifest
from .precision_record import Arithmetic, arithmetic_of
from .recovery import extent_of, lost_pieces
from .shards import said_by

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Begun:
    """precision: of its identity; arithmetic: None where the teacher is asked as it is; taps: those that are there."""

    precision: str
    arithmetic: Arithmetic | None
    taps: tuple[str, ...] = ()


def begun(folder: Path, identity: Identity) -> Begun | None:
    """What a cache in a folder was begun with, if there is one; identity: with any precision.

    The manifest says it, or the claim of an unfinished cache, or, where both are lost, its shards. Nothing is
    compared but fingerprints of shards: whether it is the cache that is asked for is for others to find.
    """
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
        return Begun(manifest.identity["precision"], manifest.arithmetic, tuple(manifest.taps))
    if (folder / UNFINISHED).is_file():
        return _claimed(read_claim(folder))
    for precision in PRECISIONS:
        try:
            lost = lost_pieces(folder, fingerprint({**identity, "precision": precision}), {})
        except CacheError:  # of the other precision, or of another cache, which the writer will refuse
            continue
        if lost:
            there = next(piece.path for piece in lost if (folder / piece.path).exists())
            return Begun(precision, _said(folder, there), tuple(extent_of(lost)[1]))
    return None


def _claimed(claim: dict[str, Any]) -> Begun | None:
    identity = claim.get("identity")
    precision = identity.get("precision") if isinstance(identity, dict) else None
    return Begun(precision, arithmetic_of(claim.get("arithmetic"))) if precision in PRECISIONS else None


def _said(folder: Path, name: str) -> Arithmetic | None:
    """By the facts in a shard."""
    said = said_by(folder, name)
    try:
        return arithmetic_of(json.loads(str(said[0]["facts"]))["arithmetic"]) if said else None
    except (KeyError, ValueError, TypeError):
        return None
