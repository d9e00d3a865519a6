"""Random changes of a manifest, drawn by hypothesis."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from hypothesis import strategies as st

from softcache.pipeline.cache.identity import compute_fingerprint
from tests.helpers.damage import Record, seal_text

Draw = Callable[[st.SearchStrategy[Any]], Any]
DEEP, BIG = "\0deep\0", "\0big\0"  # placeholders for what json.dumps cannot write

ODD_TEXT = [
    "",
    ".",
    "..",
    "/",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[31mred\x1b[0m",
    "a\nError: b",
    "\r",
    "\x07",
    "\u202e",
    "\ud800",
    "é" * 50,
    "x" * 70_000,
    "%s{0}",
    "'; true",
    "train",
    "val",
    "logits",
    "label",
    "features/pool1",
    "draw-000/shard-00000.h5",
    "draw-000/shard-00000-1.h5",
    "0" * 32,
    "0" * 64,
    "float32",
    "sqrt8",
    "digits",
    "folder",
]
ODD_NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    100,
    300,
    4096,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**53 + 1,
    2**63,
    2**64,
    10**12,
    10**30,
    -(2**63),
    10**4000,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e-300,
    1e300,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    True,
    False,
    None,
]
_plain = st.sampled_from([*ODD_TEXT, *ODD_NUMBERS, DEEP, BIG]) | st.integers() | st.floats() | st.text(max_size=20)
_keys = st.sampled_from([*ODD_TEXT, "name", "seed", "pad", "path"])
values = _plain | st.recursive(
    _plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4), max_leaves=8
)


class ObjectWithDuplicateKey(dict[str, Any]):
    """A JSON object that is written with one of its keys twice."""

    def __init__(self, record: Record, key: str, value: Any):
        super().__init__(record)
        self.extra = (key, value)

    def items(self) -> Any:
        return [*super().items(), self.extra]


def _iterate_paths(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a record, outer ones first."""
    keys: Iterable[Any] = ()
    if isinstance(record, dict):
        keys = list(record)
    elif isinstance(record, list):
        keys = range(len(record))
    for key in keys:
        yield (*path, key)
        yield from _iterate_paths(record[key], (*path, key))


def _get_value(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def mutate(record: Record, draw: Draw) -> None:
    """Make one change anywhere in a record."""
    paths = list(_iterate_paths(record))
    path = draw(st.sampled_from(paths))
    parent, key = _get_value(record, path[:-1]), path[-1]
    change = draw(st.sampled_from(["replace", "replace", "nudge", "delete", "add", "exchange", "copy", "double"]))
    if change == "replace":
        parent[key] = draw(values)
    elif change == "nudge":
        parent[key] = _nudge(parent[key], draw)
    elif change == "delete":
        del parent[key]
    elif change == "add" and isinstance(parent, dict):
        parent[draw(_keys | st.text(max_size=8))] = draw(values)
    elif change == "add":
        parent.insert(draw(st.integers(0, len(parent))), draw(values))
    elif change == "double" and isinstance(parent, dict) and len(path) > 1:
        _get_value(record, path[:-2])[path[-2]] = ObjectWithDuplicateKey(parent, key, draw(values))
    elif change in ("exchange", "copy"):
        other_path = draw(st.sampled_from(paths))
        value, other_value = json.loads(json.dumps([parent[key], _get_value(record, other_path)]))
        parent[key] = other_value
        with contextlib.suppress(KeyError, IndexError, TypeError):  # one is inside the other
            if change == "exchange":
                _get_value(record, other_path[:-1])[other_path[-1]] = value


def _nudge(value: Any, draw: Draw) -> Any:
    """Return another value of the same type."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = draw(st.sampled_from([1, -1, 2, -2]))
        return value + number if draw(st.booleans()) else value * number
    if isinstance(value, str):
        cut = draw(st.integers(0, len(value)))
        return value[:cut] + draw(st.sampled_from(ODD_TEXT[:12])) + value[cut + draw(st.integers(0, 1)) :]
    return value * draw(st.integers(0, 3)) if isinstance(value, list) else value


def mutate_bytes(text: bytes, draw: Draw) -> bytes:
    """Return other bytes: some changed, removed, inserted, repeated or reversed."""
    begin = draw(st.integers(0, len(text) - 1))
    end = draw(st.integers(begin, min(len(text), begin + 200)))
    new = draw(
        st.binary(max_size=8) | st.sampled_from([b"", b"\xff", b"\0", b'"', b"{", b"[" * 5000, b"NaN", b"1e999"])
    )
    part: bytes = draw(st.sampled_from([new, text[begin:end] * 2, text[begin:end][::-1]]))
    mutated = text[:begin] + part + text[end:]
    return mutated if mutated != text else text[:-1]


def encode_record(record: Record) -> bytes:
    """Return a sealed JSON text, in which placeholders are replaced by what json.dumps cannot write."""
    text = json.dumps(record, indent=1)
    for placeholder, real in ((DEEP, "[" * 100_000 + "]" * 100_000), (BIG, "9" * 5000)):
        text = text.replace(json.dumps(placeholder), real)
    return seal_text(text.encode())


def update_fingerprint(record: Record) -> None:
    """Compute the fingerprint of the identity, of whatever type that is."""
    with contextlib.suppress(KeyError, TypeError, RecursionError):
        record["fingerprint"] = compute_fingerprint(record["identity"])


def make_shards_agree(cache: Path, record: Record) -> None:
    """Write the fingerprint into every shard and the shards' checksums into the record, as far as it has any."""
    update_fingerprint(record)
    paths = {str(path.relative_to(cache)): path for path in cache.rglob("*.h5")}
    fingerprint = str(record.get("fingerprint")).encode(errors="replace")[:1000]
    for path in paths.values():
        with h5py.File(path, "r+") as file:
            file.attrs["fingerprint"] = np.bytes_(fingerprint)
    shards = record.get("shards")
    for file_record in [*(shards if isinstance(shards, list) else []), record.get("head")]:
        if isinstance(file_record, dict) and isinstance(file_record.get("path"), str) and file_record["path"] in paths:
            content = paths[file_record["path"]].read_bytes()
            file_record.update(bytes=len(content), checksum=xxhash.xxh3_128_hexdigest(content))
