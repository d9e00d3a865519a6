"""What makes two caches the same: a nested record of plain values, and its hash.

The identity says what a row *is* (data, views, teacher, precision, codec). How much was kept of it,
the draws and the taps, is no part of it: a cache can grow without becoming another one.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy

FORMAT = 1
Identity = dict[str, Any]


def make_identity(
    transfer_set: TransferSet,
    views: ViewPolicy,
    seed: int,
    teacher: dict[str, Any],
    codec: str,
    precision: str,
) -> Identity:
    """The identity of a cache. teacher: arch, digest of the weights, and how images reach it."""
    return {
        "format": FORMAT,
        "transfer_set": transfer_set.identity(),
        "views": {"policy": views.name, **views.parameters(), "seed": seed},
        "teacher": teacher,
        "codec": codec,
        "precision": precision,
    }


def compute_fingerprint(identity: Identity) -> str:
    """SHA-256 of the identity as canonical JSON, 64 hexadecimal digits."""
    return sha256(_canonical(identity).encode()).hexdigest()


def _canonical(record: Any) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def find_differences(one: Any, other: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two nested records differ, as (dotted name, value in one, value in other).

    Compared as JSON, as fingerprint does: 1 and 1.0 differ, a tuple and a list do not. A field that is in one of
    the two alone is None in the other.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            inner = f"{field}.{key}" if field else str(key)
            if key in one and key in other:
                yield from find_differences(one[key], other[key], inner)
            else:
                yield inner, one.get(key), other.get(key)
    elif _canonical(one) != _canonical(other):
        yield field, one, other


def format_differences(one: Identity, other: Identity, names: tuple[str, str]) -> str:
    """The differing fields side by side, a line each below a line of the two names."""
    found = [(field, _shorten(a), _shorten(b)) for field, a, b in find_differences(one, other)]
    rows = [("", *names), *found] if found else []
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return "".join(f"\n  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
