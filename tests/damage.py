"""What a thorough vandal does: change a cache, then mend every checksum that can be mended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from pipeline.identity import fingerprint
from pipeline.manifest import seal
from pipeline.shards import payload_digest

SHARD = "draw-001/shard-00001.h5"
Record = dict[str, Any]


def read_manifest(cache: Path) -> Record:
    """The manifest as plain JSON, without its seal."""
    record: Record = json.loads((cache / "manifest.json").read_text())
    del record["sha256"]
    return record


def edit_manifest(cache: Path, change: Callable[[Record], None], mend_fingerprint: bool = False) -> None:
    """Change the manifest and seal it again."""
    record = read_manifest(cache)
    change(record)
    if mend_fingerprint:
        record["fingerprint"] = fingerprint(record["identity"])
    (cache / "manifest.json").write_text(seal(record))


def shard_of(record: Record, name: str = SHARD) -> Record:
    """A shard's record in the manifest."""
    return next(shard for shard in record["shards"] if shard["path"] == name)


def mend(cache: Path, name: str = SHARD, **more: object) -> None:
    """Give a changed shard its size and checksum in the manifest, and whatever else is said."""
    whole = (cache / name).read_bytes()
    now = {"bytes": len(whole), "checksum": xxhash.xxh3_128_hexdigest(whole), **more}
    edit_manifest(cache, lambda record: shard_of(record, name).update(now))


def rewrite(cache: Path, change: Callable[[dict[str, np.ndarray]], None], name: str = SHARD) -> None:
    """Change a shard's arrays, and mend payload, checksum and size in shard and manifest."""
    with h5py.File(cache / name, "r+") as file:
        arrays = {key: file[key][:] for key in file if key != "features"}
        arrays |= {f"features/{key}": file[f"features/{key}"][:] for key in file.get("features", ())}
        change(arrays)
        for key, rows in arrays.items():
            file[key][:] = rows
        file.attrs["payload"] = np.bytes_(payload_digest(arrays))
    mend(cache, name, payload=payload_digest(arrays))


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file, counted from its first."""
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(raw)
