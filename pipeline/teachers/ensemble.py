"""What a student learns from: one cache or several of the same views, as one teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.base.progress import Progress
from softcache.pipeline.cache.identity import format_differences
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.rows import Positions
from softcache.pipeline.cache.verification import verify_shard

from .combine import Combination
from .distribution_map import DistributionMap

MissingTargets = dict[int, NDArray[np.bool_]]  # {draw: which positions of the training split have no answer}


@dataclass(frozen=True)
class TeacherEnsemble:
    """members: caches of the same views, see check_same; the first one's layers and last linear layer are read.

    combine: None for one. maps: none, one for what comes out, or one for each member where each is heard by itself.
    gaps: rows that a member lacks; a student gets NaN for their logits, and zeros for their features.
    """

    members: tuple[Cache, ...]
    combine: Combination | None = None
    maps: tuple[DistributionMap, ...] = ()
    missing: MissingTargets = field(default_factory=dict)

    @property
    def is_single_cache(self) -> bool:
        """Whether a student learns from one cache's logits as they are."""
        return not (self.combine or self.maps)

    def row_order(self, split: str) -> Positions:
        """index [rows] of each position of a split: every member's."""
        return self.members[0].row_order(split)

    def index_at(self, split: str, positions: Positions) -> Positions:
        """index [n] of positions [n]."""
        return self.members[0].index_at(split, positions)

    def fits_in_memory(self, split: str, draw: int, taps: tuple[str, ...] = (), together: int = 1) -> bool:
        """Whether what is read of that draw is kept in memory, beside so many others."""
        first, *others = self.members
        kept = not self.missing and first.fits_in_memory(split, draw, taps, together)
        return kept and all(c.fits_in_memory(split, draw, (), together) for c in others)

    def read_targets(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...] = (), together: int = 1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """logits float32 [n, K], or [n, M, K] where each is heard by itself, and features of the first member."""
        gone = (
            self.missing[draw][positions]
            if split == "train" and draw in self.missing
            else np.zeros(len(positions), bool)
        )
        if not gone.any():
            return self._read_members(split, draw, positions, taps, together)
        logits, features = self._read_members(split, draw, positions[~gone], taps, together)
        place = torch.from_numpy(~gone)
        return _scatter_rows(logits, place, torch.nan), {
            tap: _scatter_rows(x, place, 0) for tap, x in features.items()
        }

    def _read_members(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...], together: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ask = [c.read_stored if self.missing else partial(c.read_targets, together=together) for c in self.members]
        logits, features = ask[0](split, draw, positions, taps)
        if len(ask) > 1:
            logits = torch.stack([logits, *(a(split, draw, positions)[0] for a in ask[1:])], 1)
        return self.combine_logits(logits), features

    def combine_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What the members said, [n, K] of one or [n, M, K] of several, combined and mapped."""
        if self.combine and self.combine.is_per_teacher:
            if not self.maps:
                return logits
            return torch.stack([m(z) for m, z in zip(self.maps, logits.unbind(1), strict=True)], 1)
        one = self.combine(logits) if self.combine else logits
        return self.maps[0](one) if self.maps else one

    def as_single_teacher(self, logits: torch.Tensor) -> torch.Tensor:
        """The same as one teacher [n, K], for figures: of those that are heard by themselves the mean probability."""
        heard = self.combine_logits(logits)
        return self.combine(heard) if self.combine and self.combine.is_per_teacher else heard

    def read_held_out(self, split: str) -> torch.Tensor:
        """float32 [N, K], or [N, M, K] of several members, as they are: a held-out split's logits by index."""
        order = torch.from_numpy(self.row_order(split))
        found = [cache.read_targets(split, 0, np.arange(len(order)))[0] for cache in self.members]
        logits = torch.stack(found, 1) if len(found) > 1 else found[0]
        by_index = torch.empty_like(logits)
        by_index[order] = logits
        return by_index


def _scatter_rows(rows: torch.Tensor, place: torch.Tensor, fill: float) -> torch.Tensor:
    """Rows put where place is true, fill elsewhere."""
    whole = rows.new_full((len(place), *rows.shape[1:]), fill)
    whole[place] = rows
    return whole


def check_same_views(caches: Sequence[Cache]) -> None:
    """Raise UsageError or CacheError, with the fields, when caches are not of the same transfer set and views."""
    first = caches[0]
    for one, other in combinations(caches, 2):
        if other.manifest.fingerprint == one.manifest.fingerprint:
            raise UsageError(f"'{one.folder}' and '{other.folder}' are the same cache: one --cache is enough")
    for other in caches[1:]:
        a, b = first.manifest.identity, other.manifest.identity
        mine, theirs = ({name: record[name] for name in ("transfer_set", "views")} for record in (a, b))
        if mine != theirs:
            names = (str(first.folder), str(other.folder))
            raise CacheError(
                f"'{first.folder}' and '{other.folder}' are not of the same rows and views:"
                f"{format_differences(mine, theirs, names)}"
                "\nMake the second with the first's --data, --views, --seed and cut"
            )
        if other.classes != first.classes:
            raise CacheError(
                f"'{first.folder}' has {first.classes} classes, '{other.folder}' {other.classes}: blend teachers of"
                " the same classes"
            )


def find_missing_targets(
    caches: Sequence[Cache], draws: int, taps: tuple[str, ...], progress: Progress
) -> MissingTargets:
    """Rows of the first draws that some cache lacks: of shards that are gone or damaged. Every shard is read.

    taps: those that are read of the first cache.
    """
    read = [(cache, {"logits", *(f"features/{tap}" for tap in (() if k else taps))}) for k, cache in enumerate(caches)]
    shards = [
        (cache, record)
        for cache, names in read
        for record in cache.manifest.shards
        if record.split == "train" and record.draw < draws and names & set(record.datasets)
    ]
    gaps: MissingTargets = {}
    for cache, record in progress(shards, len(shards), "looking for missing rows"):
        try:
            verify_shard(cache, record)
        except CacheError:
            gone = gaps.setdefault(record.draw, np.zeros(cache.manifest.splits["train"], bool))
            gone[record.start : record.start + record.rows] = True
    return gaps


def list_missing_runs(gaps: MissingTargets) -> dict[str, list[list[int]]]:
    """{draw: [[start, stop], …]} of the positions that are missing, as a run writes them down."""
    edges = {draw: np.flatnonzero(np.diff(gone, prepend=False, append=False)) for draw, gone in sorted(gaps.items())}
    return {str(draw): found.reshape(-1, 2).tolist() for draw, found in edges.items()}
