"""Changes anywhere in a manifest, drawn by hypothesis, and what becomes of their text."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from hypothesis import strategies as st

from softcache.pipeline.cache.identity import compute_fingerprint
from tests.helpers.damage import Record, seal_of

Draw = Callable[[st.SearchStrategy[Any]], Any]
DEEP, BIG = "\0deep\0", "\0big\0"  # stand for what json.dumps cannot write

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


class Doubled(dict[str, Any]):
    """An object that is written with one of its keys twice."""

    def __init__(self, whole: Record, key: str, value: Any):
        super().__init__(whole)
        self.extra = (key, value)

    def items(self) -> Any:
        return [*super().items(), self.extra]


def _places(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a record, from the outside in."""
    for key in list(record) if isinstance(record, dict) else range(len(record)) if isinstance(record, list) else ():
        yield (*path, key)
        yield from _places(record[key], (*path, key))


def _at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def mutate(record: Record, draw: Draw) -> None:
    """One change, anywhere."""
    found = list(_places(record))
    path = draw(st.sampled_from(found))
    where, key = _at(record, path[:-1]), path[-1]
    how = draw(st.sampled_from(["replace", "replace", "nudge", "delete", "add", "exchange", "copy", "double"]))
    if how == "replace":
        where[key] = draw(values)
    elif how == "nudge":
        where[key] = _nudged(where[key], draw)
    elif how == "delete":
        del where[key]
    elif how == "add" and isinstance(where, dict):
        where[draw(_keys | st.text(max_size=8))] = draw(values)
    elif how == "add":
        where.insert(draw(st.integers(0, len(where))), draw(values))
    elif how == "double" and isinstance(where, dict) and len(path) > 1:
        _at(record, path[:-2])[path[-2]] = Doubled(where, key, draw(values))
    elif how in ("exchange", "copy"):
        other = draw(st.sampled_from(found))
        mine, its = json.loads(json.dumps([where[key], _at(record, other)]))
        where[key] = its
        with contextlib.suppress(KeyError, IndexError, TypeError):  # one lay inside the other
            if how == "exchange":
                _at(record, other[:-1])[other[-1]] = mine


def _nudged(value: Any, draw: Draw) -> Any:
    """Another value of the same kind."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        by = draw(st.sampled_from([1, -1, 2, -2]))
        return value + by if draw(st.booleans()) else value * by
    if isinstance(value, str):
        cut = draw(st.integers(0, len(value)))
        return value[:cut] + draw(st.sampled_from(ODD_TEXT[:12])) + value[cut + draw(st.integers(0, 1)) :]
    return value * draw(st.integers(0, 3)) if isinstance(value, list) else value


def mutated_bytes(text: bytes, draw: Draw) -> bytes:
    """Other bytes than these: some changed, cut out, put in, or put in twice."""
    begin = draw(st.integers(0, len(text) - 1))
    end = draw(st.integers(begin, min(len(text), begin + 200)))
    new = draw(
        st.binary(max_size=8) | st.sampled_from([b"", b"\xff", b"\0", b'"', b"{", b"[" * 5000, b"NaN", b"1e999"])
    )
    part: bytes = draw(st.sampled_from([new, text[begin:end] * 2, text[begin:end][::-1]]))
    found = text[:begin] + part + text[end:]
    return found if found != text else text[:-1]


def written(record: Record) -> bytes:
    """As JSON under a seal, with what json.dumps cannot write put in."""
    text = json.dumps(record, indent=1)
    for stand_in, real in ((DEEP, "[" * 100_000 + "]" * 100_000), (BIG, "9" * 5000)):
        text = text.replace(json.dumps(stand_in), real)
    return seal_of(text.encode())


def with_its_fingerprint(record: Record) -> None:
    """Mend the fingerprint, of whatever is there in the identity's place."""
    with contextlib.suppress(KeyError, TypeError, RecursionError):
        record["fingerprint"] = compute_fingerprint(record["identity"])


def agree(cache: Path, record: Record) -> None:
    """Every shard says that it is of this identity, and the manifest knows its bytes, as far as it is still one."""
    with_its_fingerprint(record)
    known = {str(path.relative_to(cache)): path for path in cache.rglob("*.h5")}
    said = str(record.get("fingerprint")).encode(errors="replace")[:1000]
    for path in known.values():
        with h5py.File(path, "r+") as file:
            file.attrs["fingerprint"] = np.bytes_(said)
    shards = record.get("shards")
    for its in [*(shards if isinstance(shards, list) else []), record.get("head")]:
        if isinstance(its, dict) and isinstance(its.get("path"), str) and its["path"] in known:
            whole = known[its["path"]].read_bytes()
            its.update(bytes=len(whole), checksum=xxhash.xxh3_128_hexdigest(whole))
