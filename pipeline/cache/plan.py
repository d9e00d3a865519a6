"""What a cache is to hold, and the shards that it is cut into."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from softcache.data.tasks import get_task

from .folder import make_shard_path
from .identity import Identity
from .manifest import (
    MAX_SHARD_BYTES,
    ROW_KEYS,
    PrecisionRecord,
    ShardRecord,
    ShardSpec,
    count_row_bytes,
    list_datasets,
)

_SHARD_BYTES, _SHARD_ROWS = 128 << 20, 65_536  # of a shard, where the user sets no number of rows


@dataclass(frozen=True)
class CachePlan:
    """What a cache is to hold.

    Attributes:
        identity: What makes the cache this one.
        classes: K.
        draws: Views of each training image.
        splits: {split: rows}.
        taps: {tap: row shape}.
        shard_rows: Most rows of a shard; 0 for as many as fill 128 MiB, 65,536 at most.
        settings: Settings of the command, for the manifest.
        precision_record: How the teacher runs, where that is not simply in the precision of the identity.
    """

    identity: Identity
    classes: int
    draws: int
    splits: dict[str, int]
    taps: dict[str, list[int]]
    shard_rows: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    precision_record: PrecisionRecord | None = None

    def list_missing_shards(self, present: Iterable[ShardRecord | ShardSpec] = ()) -> list[ShardSpec]:
        """List the shards to write, in the order in which they are written.

        Taps that are added to a draw make a further part of it: shards that hold the new datasets of the same rows.

        Args:
            present: Shards that are written already, or will be.
        """
        datasets = list_datasets(self.classes, self.identity["codec"], self.taps, get_task(self.identity))
        parts: dict[tuple[str, int], list[set[str]]] = {}  # {(split, draw): the datasets of each part}
        for shard in present:
            if shard.start == 0:  # one shard of each part
                parts.setdefault((shard.split, shard.draw), []).append(set(shard.datasets))
        specs = []
        for split, rows in self.splits.items():
            for draw in range(self.draws if split == "train" else 1):
                present_parts = parts.get((split, draw), [])
                present_names = set().union(*present_parts) - set(ROW_KEYS)
                missing = {name: kind for name, kind in datasets.items() if name not in present_names}
                if set(missing) == set(ROW_KEYS):
                    continue
                shards = -(-rows // choose_shard_rows(count_row_bytes(missing), self.shard_rows))
                bounds = np.linspace(0, rows, shards + 1).astype(int).tolist()
                for number, (start, stop) in enumerate(pairwise(bounds)):
                    path = make_shard_path(split, draw, number, len(present_parts))
                    specs.append(ShardSpec(path, split, draw, start, stop - start, missing))
        return specs

    def extend(self, draws: int, taps: dict[str, list[int]]) -> "CachePlan":
        """Return the plan of this and of the draws and taps that the cache has already: it grows, it never shrinks."""
        return replace(self, draws=max(self.draws, draws), taps={**taps, **self.taps})


def choose_shard_rows(row_bytes: int, shard_rows: int = 0) -> int:
    """Choose the most rows of a shard, so that it is no larger than a manifest may list.

    Args:
        row_bytes: Bytes of a row.
        shard_rows: What the user asks for; 0 for as many as fill 128 MiB, 65,536 at most.
    """
    rows = shard_rows or min(_SHARD_ROWS, _SHARD_BYTES // row_bytes)
    return max(1, min(rows, (MAX_SHARD_BYTES - (1 << 20)) // row_bytes))
