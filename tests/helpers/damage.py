"""Damage a cache, and update every checksum that can be updated, so that only the structure reveals the damage."""

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
    """Return the manifest as plain JSON, without its seal."""
    record: Record = json.loads((cache / "manifest.json").read_text())
    del record["sha256"]
    return record


def edit_manifest(cache: Path, change: Callable[[Record], None], update_fingerprint: bool = False) -> None:
    """Change the manifest and seal it again."""
    record = read_manifest(cache)
    change(record)
    if update_fingerprint:
        record["fingerprint"] = compute_fingerprint(record["identity"])
    (cache / "manifest.json").write_text(seal(record))


def find_shard(record: Record, name: str = SHARD) -> Record:
    """Return a shard's record in the manifest."""
    return next(shard for shard in record["shards"] if shard["path"] == name)


def update_shard_record(cache: Path, name: str = SHARD, **more: object) -> None:
    """Write the size and checksum of a changed shard, and other fields, into the manifest."""
    content = (cache / name).read_bytes()
    fields = {"bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(content), **more}
    edit_manifest(cache, lambda record: find_shard(record, name).update(fields))


def edit_shard(cache: Path, change: Callable[[dict[str, np.ndarray]], None], name: str = SHARD) -> None:
    """Change a shard's arrays, and update payload digest, checksum and size in shard and manifest."""
    with h5py.File(cache / name, "r+") as file:
        arrays = {key: file[key][:] for key in file if key != "features"}
        arrays |= {f"features/{key}": file[f"features/{key}"][:] for key in file.get("features", ())}
        change(arrays)
        for key, rows in arrays.items():
            file[key][:] = rows
        file.attrs["payload"] = np.bytes_(hash_arrays(arrays))
    update_shard_record(cache, name, payload=hash_arrays(arrays))


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file; bits are counted from the start of the file."""
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(raw)


def update_header_checksums(raw: bytearray) -> None:
    """Update the checksums of the superblock and of every object header of a shard."""
    for begin, end in find_object_headers(bytes(raw)):
        raw[end : end + 4] = lookup3(bytes(raw[begin:end])).to_bytes(4, "little")


def find_object_headers(raw: bytes) -> list[tuple[int, int]]:
    """Return (start, start of its checksum) in bytes of the superblock and of each object header's first chunk."""
    headers, begin = [(0, 44)], -1
    while (begin := raw.find(b"OHDR", begin + 1)) >= 0:
        flags, offset = raw[begin + 5], begin + 6
        offset += (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        end = offset + width + int.from_bytes(raw[offset : offset + width], "little")
        if end + 4 <= len(raw):
            headers.append((begin, end))
    return headers


def lookup3(data: bytes) -> int:
    """Compute Bob Jenkins' hash (2006), which HDF5 stores with its metadata."""
    a = b = c = 0xDEADBEEF + len(data)
    for start in range(0, len(data), 12):
        x, y, z = (int.from_bytes(data[i : i + 4], "little") for i in (start, start + 4, start + 8))
        a, b, c = a + x & _32, b + y & _32, c + z & _32
        if start + 12 >= len(data):
            break
        a = a - c & _32 ^ _rotate(c, 4)
        b, c = b - a & _32 ^ _rotate(a, 6), c + b & _32
        a, c = a + c & _32, c - b & _32 ^ _rotate(b, 8)
        b, a = b + a & _32, a - c & _32 ^ _rotate(c, 16)
        c, b = c + b & _32, b - a & _32 ^ _rotate(a, 19)
        a, c = a + c & _32, c - b & _32 ^ _rotate(b, 4)
        b = b + a & _32
    a, b, c = c, a, b
    for bits in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, c, a
        c = (c ^ b) - _rotate(b, bits) & _32
    return c


_32 = 0xFFFFFFFF


def _rotate(x: int, bits: int) -> int:
    return (x << bits | x >> 32 - bits) & _32


def edit_whole_cache(cache: Path, change: Callable[[Record], None]) -> None:
    """Change the manifest as the author of a cache could: shards, fingerprint and checksums agree with it."""
    record = read_manifest(cache)
    change(record)
    record["fingerprint"] = compute_fingerprint(record["identity"])
    for file_record in (*record["shards"], record["head"]):
        path = cache / file_record["path"]
        with h5py.File(path, "r+") as file:
            file.attrs["fingerprint"] = np.bytes_(record["fingerprint"])
        content = path.read_bytes()
        file_record["bytes"], file_record["checksum"] = len(content), xxhash.xxh3_128_hexdigest(content)
    (cache / "manifest.json").write_bytes(seal_record(record))


def seal_record(record: Any) -> bytes:
    """Seal a record as manifest.seal does, also one that it rejects: NaN, infinity, and what is not an object."""
    return seal_text(json.dumps(record, indent=1).encode())


def seal_text(text: bytes) -> bytes:
    """Seal a text that need not be JSON. The seal replaces its last brace and the white space before that."""
    body = text.rstrip().removesuffix(b"}").rstrip()
    return body + f',\n "sha256": "{sha256(body).hexdigest()}"\n}}\n'.encode()
