"""What a thorough vandal does: change a cache, then mend every checksum that can be mended."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from softcache.pipeline.cache.identity import compute_fingerprint
from softcache.pipeline.cache.manifest import seal
from softcache.pipeline.cache.shards import hash_arrays

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
        record["fingerprint"] = compute_fingerprint(record["identity"])
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
        file.attrs["payload"] = np.bytes_(hash_arrays(arrays))
    mend(cache, name, payload=hash_arrays(arrays))


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file, counted from its first."""
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(raw)


def mend_headers(raw: bytearray) -> None:
    """Give the superblock and every object header of a shard the checksum of what it now holds."""
    for begin, end in object_headers(bytes(raw)):
        raw[end : end + 4] = lookup3(bytes(raw[begin:end])).to_bytes(4, "little")


def object_headers(raw: bytes) -> list[tuple[int, int]]:
    """(first byte, first byte of its checksum) of the superblock and of each object header's first chunk."""
    found, begin = [(0, 44)], -1
    while (begin := raw.find(b"OHDR", begin + 1)) >= 0:
        flags, at = raw[begin + 5], begin + 6
        at += (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        end = at + width + int.from_bytes(raw[at : at + width], "little")
        if end + 4 <= len(raw):
            found.append((begin, end))
    return found


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hash (2006), which HDF5 keeps of its metadata."""
    a = b = c = 0xDEADBEEF + len(data)
    for at in range(0, len(data), 12):
        x, y, z = (int.from_bytes(data[i : i + 4], "little") for i in (at, at + 4, at + 8))
        a, b, c = a + x & _32, b + y & _32, c + z & _32
        if at + 12 >= len(data):
            break
        a = a - c & _32 ^ _turn(c, 4)
        b, c = b - a & _32 ^ _turn(a, 6), c + b & _32
        a, c = a + c & _32, c - b & _32 ^ _turn(b, 8)
        b, a = b + a & _32, a - c & _32 ^ _turn(c, 16)
        c, b = c + b & _32, b - a & _32 ^ _turn(a, 19)
        a, c = a + c & _32, c - b & _32 ^ _turn(b, 4)
        b = b + a & _32
    a, b, c = c, a, b
    for turn in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, c, a
        c = (c ^ b) - _turn(b, turn) & _32
    return c


_32 = 0xFFFFFFFF


def _turn(x: int, by: int) -> int:
    return (x << by | x >> 32 - by) & _32


def reforge(cache: Path, change: Callable[[Record], None]) -> None:
    """Change the manifest as the author of the whole cache could: shards, fingerprint and checksums agree with it."""
    record = read_manifest(cache)
    change(record)
    record["fingerprint"] = compute_fingerprint(record["identity"])
    for its in (*record["shards"], record["head"]):
        path = cache / its["path"]
        with h5py.File(path, "r+") as file:
            file.attrs["fingerprint"] = np.bytes_(record["fingerprint"])
        whole = path.read_bytes()
        its["bytes"], its["checksum"] = len(whole), xxhash.xxh3_128_hexdigest(whole)
    (cache / "manifest.json").write_bytes(sealed(record))


def sealed(record: Any) -> bytes:
    """As manifest.seal, of what it would refuse too: NaN, infinity, and anything that is no object."""
    return seal_of(json.dumps(record, indent=1).encode())


def seal_of(text: bytes) -> bytes:
    """The same, of a text that need not be JSON: its last brace and the blanks before it make room for the seal."""
    body = text.rstrip().removesuffix(b"}").rstrip()
    return body + f',\n "sha256": "{sha256(body).hexdigest()}"\n}}\n'.encode()
