"""Reading a manifest: seal, schema, bounds, and that the shards tile the rows that it claims.

Nothing in the file is trusted. Sizes are checked before anything of that size is allocated.
"""

import json
import math
import re
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any

from softcache.base.errors import CacheError, make_printable
from softcache.base.files import read_regular_file
from softcache.base.schema import OptionalKey, validate
from softcache.data.tasks import CLASSES, EMBEDDING, TASKS

from .codec_choice import CODEC_PATTERN, find_codec
from .codecs import FIDELITY, SAMPLE_FIDELITY, list_measures
from .folder import HEAD_FILE, IN_PROGRESS_FILE, MANIFEST_FILE, make_shard_path, parse_shard_path
from .identity import FORMAT, PRECISIONS
from .manifest import (
    MAX_DRAWS,
    MAX_MANIFEST_BYTES,
    MAX_ROWS,
    MAX_SHARD_BYTES,
    ROW_KEYS,
    SPLITS,
    HeadRecord,
    Manifest,
    PrecisionRecord,
    ShardRecord,
    count_row_bytes,
)

_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\n')
_SEAL_BYTES = len(b',\n "sha256": ""\n}\n') + 64
_WAY_OUT = (
    ". Put it back from a copy; or delete it and run the same teacher-cache command: each shard carries its own"
    " digest, and the teacher runs again only for shards that are missing"
)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a cache.

    Raises:
        CacheError: There is no complete cache, or the manifest is damaged, edited or inconsistent.
    """
    path = folder / MANIFEST_FILE
    if folder.is_file():
        raise CacheError(f"'{folder}' is a file: a cache is a folder")
    if not folder.is_dir():
        command = f"softcache teacher-cache --out {quote(make_printable(folder, None))}"
        raise CacheError(f"there is no cache at '{make_printable(folder)}': make one with  {command}")
    if not path.is_file():
        if (folder / IN_PROGRESS_FILE).is_file():
            raise CacheError(
                f"'{folder}' holds no finished cache: run the same teacher-cache command again to finish it"
            )
        raise CacheError(f"'{folder}' is no cache: it has no {MANIFEST_FILE}")
    return parse_manifest(read_regular_file(folder, MANIFEST_FILE, MAX_MANIFEST_BYTES), path)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Parse and validate the bytes of a manifest.

    Args:
        text: Content of the file.
        path: Where it comes from, for messages.

    Raises:
        CacheError: The manifest is damaged, edited or inconsistent.
    """
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or "format" not in record:
            raise CacheError(f"{path}: not a manifest: it has no format")
        if record["format"] != FORMAT:
            raise CacheError(f"{path}: format {ascii(record['format'])[:40]}, this program reads {FORMAT}")
        digest = _check_seal(text, path)
        del record["sha256"]
        validate(record, _SCHEMA, str(path))
        manifest = _build_manifest(record, digest)
        if record["fingerprint"] != manifest.fingerprint:
            raise CacheError(
                f"{path}: its identity was edited: its fingerprint is {manifest.fingerprint[:12]},"
                f" the recorded one is {record['fingerprint'][:12]}"
            )
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: not a manifest ({type(error).__name__}: {str(error)[:80]}){_WAY_OUT}") from None
    _check_bounds(path, manifest)
    for shard in manifest.shards:
        _check_shard(path, manifest, shard)
    _check_tiles(path, manifest)
    return manifest


def parse_precision_record(record: Any) -> PrecisionRecord | None:
    """Make a PrecisionRecord of plain JSON values; None where they are none of one."""
    try:
        validate(record, _PRECISION_SCHEMA, "arithmetic")
    except CacheError:
        return None
    return PrecisionRecord(**record)


def _check_seal(text: bytes, path: Path) -> str:
    """Return the SHA-256 of all before the seal, which must be the one that the seal contains."""
    seal = _SEAL.fullmatch(text[-_SEAL_BYTES:])
    digest = sha256(text[:-_SEAL_BYTES]).hexdigest()
    if seal is None or seal[1].decode() != digest:
        recorded = seal[1].decode()[:12] if seal else "not there"
        raise CacheError(
            f"{path}: damaged or edited: its SHA-256 is {digest[:12]}, the one written in it {recorded}{_WAY_OUT}"
        )
    return digest


_ANY = re.compile(r"[\s\S]{0,65536}")  # checked elsewhere, but not of any length
# An option that is at its default is not recorded, so that caches of before there was that option keep their identity.
_CUT = {
    "val_fraction": float,
    "seed": int,
    "train_size": int,
    OptionalKey("exif"): re.compile("transpose"),
    OptionalKey("columns"): re.compile(r"[^\x00-\x1f]{1,1000}"),
    OptionalKey("unreadable"): [_ANY],
    OptionalKey("layout"): re.compile("any|unlabelled"),
    OptionalKey("test_fraction"): float,
}
_LONG_TAIL = {"imbalance": re.compile("[0-9.]{1,16}:(exponential|step)"), "head_size": int}
# Of the logits that a head computes from an embedding; `labelled` rows were drawn with `seed` to fit it.
_HEAD = {
    "kind": re.compile("probe|centroids|file"),
    "weights": re.compile("[0-9a-f]{64}"),
    OptionalKey("labelled"): int,
    OptionalKey("seed"): int,
}
_TEACHER = {
    "arch": str,
    "weights": re.compile("[0-9a-f]{64}"),
    "channels": int,
    "size": int,
    "mean": [float],
    "std": [float],
    OptionalKey("interpolation"): re.compile("bicubic"),
    OptionalKey("shape"): [int],  # of rows of numbers
    OptionalKey("output"): re.compile(r"[^\x00-\x1f]{1,200}"),
    OptionalKey("outputs"): re.compile("probabilities"),
    OptionalKey("view_size"): int,  # of the teacher's views, where not those of its students
    OptionalKey("class_map"): [[int]],
    OptionalKey("features"): re.compile(r"[^\x00-\x1f]{1,200}"),  # the layer whose input is the output
    OptionalKey("head"): _HEAD,
    OptionalKey("output_mean"): [float],  # of a network that predicts standardised numbers
    OptionalKey("output_std"): [float],
}
IDENTITY_SCHEMA: dict[str, Any] = {
    "format": int,
    "transfer_set": {
        "name": re.compile("[a-z0-9-]{1,64}"),
        "classes": [str],
        "content": {str: str},
        "cut": (_CUT | _LONG_TAIL, _CUT),
        OptionalKey("task"): re.compile("|".join(TASKS)),
    },
    "views": {str: (float, re.compile("[a-z0-9-]{1,64}"))},
    "teacher": _TEACHER,
    "codec": CODEC_PATTERN,
    "precision": re.compile("|".join(PRECISIONS)),
}
SETTINGS_SCHEMA = {str: (None, bool, float, str)}
_COSTS = (("kl_1", "kl_4", "flips"), ("kl_1", "flips"), ("cosine",), ("relative_error",))  # of each task
_PRECISION_SCHEMA = tuple(
    {"folded": bool, "compiled": bool, "rows": int, **dict.fromkeys(names, float)} for names in _COSTS
)
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
    "teacher": {str: {"accuracy": (None, float), OptionalKey("labelled"): int}},
    "fidelity": tuple(dict.fromkeys(("rows", *names), float) for names in (*FIDELITY.values(), SAMPLE_FIDELITY)),
    "seconds": float,
    "settings": SETTINGS_SCHEMA,
    "versions": {str: str},
    OptionalKey("arithmetic"): _PRECISION_SCHEMA,
}


def _build_manifest(record: dict[str, Any], digest: str) -> Manifest:
    """Build a manifest from a record that fits the schema."""
    converted = ("format", "fingerprint", "shards", "head", "arithmetic")
    names: dict[tuple[str, ...], list[str]] = {}  # all shards share few lists, which are half of a record's memory
    for shard in record["shards"]:
        shard["datasets"] = names.setdefault(tuple(shard["datasets"]), shard["datasets"])
    return Manifest(
        **{name: value for name, value in record.items() if name not in converted},
        shards=tuple(ShardRecord(**shard) for shard in record["shards"]),
        head=HeadRecord(**record["head"]) if record["head"] else None,
        arithmetic=parse_precision_record(record.get("arithmetic")),
        digest=digest,
    )


def _check_bounds(path: Path, manifest: Manifest) -> None:
    """Check that sizes are within their limits, and that the splits are those of a transfer set."""
    for tap, shape in manifest.taps.items():
        if len(shape) > 8 or not tap or "/" in tap:
            raise CacheError(f"{path}: taps: {ascii(tap)[:40]} cannot have {len(shape)} dimensions")
    limits = [("draws", manifest.draws, MAX_DRAWS), ("classes", manifest.classes, 1 << 24)]
    limits += [(f"splits.{split}", rows, MAX_ROWS) for split, rows in manifest.splits.items()]
    limits += [(f"taps.{tap}", math.prod(shape), 1 << 31) for tap, shape in manifest.taps.items()]
    for name, value, largest in limits:
        if not 1 <= value <= largest:
            raise CacheError(f"{path}: {name}: {value} is not between 1 and {largest}")
    if "train" not in manifest.splits or not set(manifest.splits) <= set(SPLITS):
        raise CacheError(f"{path}: its splits are {ascii(list(manifest.splits))[:80]}, not train and val or test")
    if set(manifest.teacher) != set(manifest.splits):
        raise CacheError(f"{path}: the teacher's accuracy is given for other splits than those of the cache")
    if set(manifest.fidelity) != {"rows", *list_measures(manifest.task, find_codec(manifest.identity["codec"]))}:
        raise CacheError(f"{path}: what its codec costs is not measured for the task {manifest.task}")
    if manifest.task == EMBEDDING and (manifest.head is None or manifest.head.inputs not in (0, manifest.classes)):
        raise CacheError(f"{path}: the mean and standard deviation of the embedding are missing")
    if manifest.head and manifest.head.inputs > 1 << 24:
        raise CacheError(f"{path}: head.inputs: {manifest.head.inputs} is more than {1 << 24}")
    if len({shard.path for shard in manifest.shards}) != len(manifest.shards):
        raise CacheError(f"{path}: two shards have one path")


def _check_shard(path: Path, manifest: Manifest, shard: ShardRecord) -> None:
    """Check that a shard has the path of its rows, datasets that belong together, and bytes enough for them."""
    numbers = parse_shard_path(shard.path)
    if numbers is None or shard.path != make_shard_path(shard.split, shard.draw, *numbers):
        raise CacheError(f"{path}: {ascii(shard.path)[:80]} is not the file of a shard of {shard.split}, {shard.draw}")
    names = set(shard.datasets)
    if len(names) != len(shard.datasets) or not set(ROW_KEYS) < names or not names <= set(manifest.datasets):
        raise CacheError(f"{path}: {shard.path} cannot hold {ascii(shard.datasets)[:80]}")
    has_correct = shard.has_logits and manifest.task == CLASSES
    if has_correct != (shard.correct is not None):
        logits = "with" if shard.has_logits else "without"
        raise CacheError(f"{path}: {shard.path}: correct is {shard.correct} in a shard {logits} logits")
    needed = shard.rows * count_row_bytes({name: manifest.datasets[name] for name in names})
    if not needed <= shard.bytes <= MAX_SHARD_BYTES:
        raise CacheError(f"{path}: {shard.path} with {shard.rows} rows has {shard.bytes} bytes: they need {needed}")


def _check_tiles(path: Path, manifest: Manifest) -> None:
    """Check that shards tile the rows of every dataset in every split and draw, without a gap or an overlap."""
    names = [name for name in manifest.datasets if name not in ROW_KEYS]
    views = sum(manifest.draws if split == "train" else 1 for split in manifest.splits)
    if views * len(names) > sum(len(shard.datasets) for shard in manifest.shards):  # before so many are listed
        raise CacheError(
            f"{path}: {len(manifest.shards)} shards are too few for {views} draws of {len(names)} datasets"
        )
    ends = {(split, draw, name): 0 for split, draw in manifest.iter_views() for name in names}
    for shard in sorted(manifest.shards, key=lambda s: s.start):
        for name in set(shard.datasets) - set(ROW_KEYS):
            key = (shard.split, shard.draw, name)
            if ends.get(key) != shard.start or shard.rows < 1:
                raise CacheError(
                    f"{path}: {shard.path} begins at row {shard.start} of {shard.split}, draw {shard.draw}:"
                    " it does not follow on"
                )
            ends[key] += shard.rows
    for (split, draw, name), rows in ends.items():
        if rows != manifest.splits[split]:
            raise CacheError(f"{path}: {split}, draw {draw} has {rows} of {manifest.splits[split]} rows of {name}")
