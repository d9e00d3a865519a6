"""The identity of a cache: what makes two caches the same, as a nested record of plain values, and its hash.

The identity says what a row *is*: data, views, teacher, precision, codec. How many draws and which taps are stored is
no part of it, so that a cache can grow without becoming another one.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy

FORMAT = 1
PRECISIONS = ("float32", "bfloat16")
Identity = dict[str, Any]


def make_identity(
    transfer_set: TransferSet,
    views: ViewPolicy,
    seed: int,
    teacher: dict[str, Any],
    codec: str,
    precision: str,
) -> Identity:
    """Make the identity of a cache.

    Args:
        transfer_set: Its images, labels and splits.
        views: How training images become views.
        seed: Seed of the views and of the row order.
        teacher: Arch, digest of the weights, and the fields of its InputSpec.
        codec: Name of the codec of the logits.
        precision: One of PRECISIONS.
    """
    return {
        "format": FORMAT,
        "transfer_set": transfer_set.identity(),
        "views": {"policy": views.name, **views.parameters(), "seed": seed},
        "teacher": teacher,
        "codec": codec,
        "precision": precision,
    }


def compute_fingerprint(identity: Identity) -> str:
    """Compute the SHA-256 of the identity as canonical JSON, 64 hexadecimal digits."""
    return sha256(_to_canonical_json(identity).encode()).hexdigest()


def _to_canonical_json(record: Any) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def find_differences(first: Any, second: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Find the fields in which two nested records differ.

    They are compared as JSON, as in the fingerprint: 1 and 1.0 differ, a tuple and a list do not.

    Args:
        first: A record, or a value inside one.
        second: The other record.
        field: Dotted name of the place of both, for recursion.

    Yields:
        (dotted name, value in first, value in second); None for a field that only the other one has.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(k for k in second if k not in first)]:
            inner = f"{field}.{key}" if field else str(key)
            if key in first and key in second:
                yield from find_differences(first[key], second[key], inner)
            else:
                yield inner, first.get(key), second.get(key)
    elif _to_canonical_json(first) != _to_canonical_json(second):
        yield field, first, second


def format_differences(first: Identity, second: Identity, names: tuple[str, str]) -> str:
    """Format the fields that differ side by side, one per line, below a line with the names of the two records.

    The text begins with a line break; it is empty where nothing differs.
    """
    differences = [(field, _shorten(a), _shorten(b)) for field, a, b in find_differences(first, second)]
    if not differences:
        return ""
    rows = [("", *names), *differences]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "".join(f"\n  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
