"""A manifest from its bytes: its seal, its form, its bounds, and that its shards tile what it claims to keep."""

import json
import math
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError
from softcache.base.files import read_regular_file
from softcache.base.schema import validate

from .codecs import CODECS, TEMPERATURES
from .folder import HEAD_FILE, IN_PROGRESS_FILE, MANIFEST_FILE, make_shard_path, parse_shard_path
from .identity import FORMAT
from .manifest import (
    MAX_DRAWS,
    MAX_MANIFEST_BYTES,
    MAX_ROWS,
    MAX_SHARD_BYTES,
    ROW_KEYS,
    SPLITS,
    HeadRecord,
    Manifest,
    ShardRecord,
    count_row_bytes,
)
from .precision_record import SCHEMA as ARITHMETIC_FORM
from .precision_record import parse_precision_record

_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\n')
_SEAL_BYTES = len(b',\n "sha256": ""\n}\n') + 64


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache, checked in itself. Raises CacheError with the reason and the way out."""
    path = folder / MANIFEST_FILE
    if folder.is_file():
        raise CacheError(f"'{folder}' is a file: a cache is a folder")
    if not folder.is_dir():
        raise CacheError(f"there is no cache at '{folder}': make one with teacher-cache --out {folder}")
    if not path.is_file():
        if (folder / IN_PROGRESS_FILE).is_file():
            raise CacheError(
                f"'{folder}' holds no finished cache: run the same teacher-cache command again to finish it"
            )
        raise CacheError(f"'{folder}' is no cache: it has no {MANIFEST_FILE}")
    return parse_manifest(read_regular_file(folder, MANIFEST_FILE, MAX_MANIFEST_BYTES), path)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """A manifest from its bytes; path is where they are from, for messages. Raises CacheError."""
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or "format" not in record:
            raise CacheError(f"{path}: not a manifest: it has no format")
        if record["format"] != FORMAT:
            raise CacheError(f"{path}: format {ascii(record['format'])[:40]}, this program reads {FORMAT}")
        digest = _check_seal(text, path)
        del record["sha256"]
        more = {"arithmetic": ARITHMETIC_FORM} if "arithmetic" in record else {}
        validate(record, {**_SCHEMA, **more}, str(path))
        manifest = _build_manifest(record, digest)
        if record["fingerprint"] != manifest.fingerprint:
            raise CacheError(
                f"{path}: its identity was edited: its fingerprint is {manifest.fingerprint[:12]},"
                f" written down is {record['fingerprint'][:12]}"
            )
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: not a manifest ({type(error).__name__}: {str(error)[:80]}){_WAY_OUT}") from None
    _check_bounds(path, manifest)
    return manifest


_WAY_OUT = (
    ". Put it back from a copy; or delete it and run the same teacher-cache command: the shards vouch for"
    " themselves, and only what is missing is asked again"
)


def _check_seal(text: bytes, path: Path) -> str:
    found = _SEAL.fullmatch(text[-_SEAL_BYTES:])
    digest = sha256(text[:-_SEAL_BYTES]).hexdigest()
    if found is None or found[1].decode() != digest:
        claim = found[1].decode()[:12] if found else "not there"
        raise CacheError(
            f"{path}: damaged or edited: its SHA-256 is {digest[:12]}, the one written in it {claim}{_WAY_OUT}"
        )
    return digest


_CUT = {"val_fraction": float, "seed": int, "train_size": int}
IDENTITY_SCHEMA: dict[str, Any] = {
    "format": int,
    "transfer_set": {
        "name": re.compile("[a-z0-9-]{1,64}"),
        "classes": [str],
        "content": {str: str},
        "cut": ({**_CUT, "imbalance": re.compile("[0-9.]{1,16}:(exponential|step)"), "head_size": int}, _CUT),
    },
    "views": {str: (float, re.compile("[a-z-]{1,64}"))},
    "teacher": {
        "arch": str,
        "weights": re.compile("[0-9a-f]{64}"),
        "channels": int,
        "size": int,
        "mean": [float],
        "std": [float],
    },
    "codec": re.compile("|".join(CODECS)),
    "precision": re.compile("float32|bfloat16"),
}
SETTINGS_SCHEMA = {str: (None, bool, float, str)}
_ANY = re.compile(r"[\s\S]{0,65536}")  # a path is compared with the only one that it may be
_HEX = re.compile("[0-9a-f]{32}")
_SCHEMA: dict[str, Any] = {
    "format": int,
    "fingerprint": re.compile("[0-9a-f]{64}"),
    "identity": IDENTITY_SCHEMA,
    "classes": int,
    "draws": int,
    "splits": {str: int},
    "taps": {str: [int]},
    "shards": [
        {
            "path": _ANY,
            "split": re.compile("|".join(SPLITS)),
            "draw": int,
            "start": int,
            "rows": int,
            "bytes": int,
            "checksum": _HEX,
            "payload": _HEX,
            "correct": (None, int),
            "datasets": [str],
        }
    ],
    "head": (None, {"path": re.compile(re.escape(HEAD_FILE)), "bytes": int, "checksum": _HEX, "inputs": int}),
    "teacher": {str: {"accuracy": (None, float)}},
    "fidelity": dict.fromkeys(("rows", "flips", *(f"kl_{T:g}" for T in TEMPERATURES)), float),
    "seconds": float,
    "settings": SETTINGS_SCHEMA,
    "versions": {str: str},
}


def _build_manifest(record: dict[str, Any], digest: str) -> Manifest:
    apart = ("format", "fingerprint", "shards", "head", "arithmetic")
    more = {k: v for k, v in record.items() if k not in apart}
    head = HeadRecord(**record["head"]) if record["head"] else None
    shards = tuple(ShardRecord(**shard) for shard in record["shards"])
    arithmetic = parse_precision_record(record.get("arithmetic"))
    return Manifest(**more, shards=shards, head=head, arithmetic=arithmetic, digest=digest)


def _check_bounds(path: Path, manifest: Manifest) -> None:
    """Sizes are in bounds; every dataset of every split and draw is tiled by shards, without gap or overlap."""
    for tap, shape in manifest.taps.items():
        if len(shape) > 8 or not tap or "/" in tap:
            raise CacheError(f"{path}: taps: {ascii(tap)[:40]} cannot have {len(shape)} dimensions")
    bounds = [("draws", manifest.draws, MAX_DRAWS), ("classes", manifest.classes, 1 << 24)]
    bounds += [(f"splits.{split}", rows, MAX_ROWS) for split, rows in manifest.splits.items()]
    bounds += [(f"taps.{tap}", math.prod(shape), 1 << 31) for tap, shape in manifest.taps.items()]
    for name, value, most in bounds:
        if not 1 <= value <= most:
            raise CacheError(f"{path}: {name}: {value} is not between 1 and {most}")
    if "train" not in manifest.splits or not set(manifest.splits) <= set(SPLITS):
        raise CacheError(f"{path}: its splits are {ascii(list(manifest.splits))[:80]}, not train and val or test")
    if set(manifest.teacher) != set(manifest.splits):
        raise CacheError(f"{path}: the teacher's accuracy is not of its splits")
    if manifest.head and manifest.head.inputs > 1 << 24:
        raise CacheError(f"{path}: head.inputs: {manifest.head.inputs} is more than {1 << 24}")
    if len({shard.path for shard in manifest.shards}) != len(manifest.shards):
        raise CacheError(f"{path}: two shards have one path")
    for shard in manifest.shards:
        _check_record(path, manifest, shard)
    _check_tiles(path, manifest)


def _check_record(path: Path, manifest: Manifest, shard: ShardRecord) -> None:
    """One shard lies where its rows say, holds what a shard can hold, and is of a size that fits."""
    numbers = parse_shard_path(shard.path)
    if numbers is None or shard.path != make_shard_path(shard.split, shard.draw, *numbers):
        raise CacheError(f"{path}: {ascii(shard.path)[:80]} is not the file of a shard of {shard.split}, {shard.draw}")
    names = set(shard.datasets)
    if len(names) != len(shard.datasets) or not set(ROW_KEYS) < names or not names <= set(manifest.datasets):
        raise CacheError(f"{path}: {shard.path} cannot hold {ascii(shard.datasets)[:80]}")
    if ("logits" in names) != (shard.correct is not None):
        raise CacheError(f"{path}: {shard.path}: correct is {shard.correct}")
    need = shard.rows * count_row_bytes({name: manifest.datasets[name] for name in names})
    if not need <= shard.bytes <= MAX_SHARD_BYTES:
        raise CacheError(f"{path}: {shard.path} with {shard.rows} rows has {shard.bytes} bytes: they need {need}")


def _check_tiles(path: Path, manifest: Manifest) -> None:
    names = [name for name in manifest.datasets if name not in ROW_KEYS]
    kept = sum(manifest.draws if split == "train" else 1 for split in manifest.splits)
    if kept * len(names) > sum(len(shard.datasets) for shard in manifest.shards):  # before so many are listed
        raise CacheError(
            f"{path}: {len(manifest.shards)} shards are too few for {kept} draws of {len(names)} datasets"
        )
    filled = {(split, draw, name): 0 for split, draw in manifest.views() for name in names}
    for shard in sorted(manifest.shards, key=lambda s: s.start):
        for name in set(shard.datasets) - set(ROW_KEYS):
            key = (shard.split, shard.draw, name)
            if filled.get(key) != shard.start or shard.rows < 1:
                raise CacheError(
                    f"{path}: {shard.path} begins at row {shard.start} of {shard.split}, draw {shard.draw}:"
                    " it does not follow on"
                )
            filled[key] += shard.rows
    for (split, draw, name), rows in filled.items():
        if rows != manifest.splits[split]:
            raise CacheError(f"{path}: {split}, draw {draw} has {rows} of {manifest.splits[split]} rows of {name}")


def read_in_progress_file(folder: Path) -> Any:
    try:
        begun = json.loads(read_regular_file(folder, IN_PROGRESS_FILE, MAX_MANIFEST_BYTES))
        if isinstance(begun, dict):
            return begun
    except ValueError:
        pass
    raise CacheError(
        f"'{folder / IN_PROGRESS_FILE}' is damaged: choose another --out, or delete it when its shards are yours"
    )
