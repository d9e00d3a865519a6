"""In which order rows are stored, and what those of a shard must be before one of them is used."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import CacheError, make_printable
from softcache.data.transfer_set import Labels

from .codecs import Codec
from .manifest import SPLITS, ShardRecord
from .shards import Shard

Positions = NDArray[np.int64]


def make_row_order(seed: int, split: str, rows: int) -> Positions:
    """index [rows] of each position: the order in which rows are stored.

    Random, because blocks of rows of a set that is sorted by class make poor batches: chi-squared of
    class counts 168 instead of 9 at 16 blocks of 256 rows.
    """
    return rng.permutation((seed, 30 + SPLITS.index(split)), rows)


def find_runs(records: list[ShardRecord], wanted: Positions) -> list[tuple[ShardRecord, int, int, int]]:
    """(shard, its first row, a, b) for the neighbours wanted[a:b] in it. wanted [n]: sorted."""
    if not len(wanted):
        return []
    home = np.searchsorted([r.start for r in records], wanted, side="right") - 1
    breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(home) != 0)) + 1
    cuts = [0, *breaks.tolist()]
    places = zip(home[cuts].tolist(), wanted[cuts].tolist(), pairwise([*cuts, len(wanted)]), strict=True)
    return [(records[h], first - records[h].start, a, b) for h, first, (a, b) in places]


def check_rows(
    shard: Shard, record: ShardRecord, fingerprint: str, expected: NDArray[np.int64], labels: Labels | None
) -> None:
    """Refuse a shard of another place, or whose rows are not at expected [n], or have not those labels [N]."""
    claims = {"fingerprint": fingerprint, "split": record.split, "draw": record.draw, "start": record.start}
    for key, claim in claims.items():
        if (found := shard.attributes.get(key)) != claim:
            said = f"its {key} is {make_printable(found)} instead of {claim}"
            raise CacheError(f"{shard.path}: {said}: a shard of another place")
    if not np.array_equal(shard.read("index"), expected):
        raise CacheError(
            f"{shard.path}: its rows are not in the order of this cache: targets would go to other images"
        )
    if labels is None:
        return
    wrong = np.flatnonzero(shard.read("label") != labels[expected])
    if len(wrong):
        first = expected[wrong[0]]
        raise CacheError(f"{shard.path}: {len(wrong)} labels are not those of the data, the first at index {first}")


def check_logits(shard: Shard, record: ShardRecord, codec: Codec, classes: int) -> None:
    """Refuse logits that are not finite, or hit another number of labels than when they were written."""
    logits = codec.decode({name: shard.read(name) for name in codec.datasets(classes)})
    if not np.isfinite(logits).all():
        raise CacheError(f"{shard.path}: logits that are not finite")
    hits = int((logits.argmax(1) == shard.read("label")).sum())
    if hits != record.correct:
        raise CacheError(
            f"{shard.path}: its logits hit {hits} labels instead of {record.correct}:"
            " rows and logits do not belong together"
        )
