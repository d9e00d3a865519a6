"""The teacher that a student learns from: one cache, or several of the same views combined."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.base.progress import Progress
from softcache.data.tasks import EMBEDDING
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.cache.codecs import DENSE
from softcache.pipeline.cache.identity import format_differences
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.rows import Positions
from softcache.pipeline.cache.verification import verify_shard

from .combine import Combination
from .distribution_map import DistributionMap

MissingTargets = dict[int, NDArray[np.bool_]]  # {draw: bool [N], which positions of the training split have none}


@dataclass(frozen=True)
class TeacherEnsemble:
    """Several caches as one teacher. It is a TargetSource.

    Attributes:
        members: M caches of the same views, see check_same_views. Features and the last linear layer are those of the
            first one.
        combine: How their logits are combined; None for one cache.
        maps: Maps of the teacher's distribution: none, one for the combined logits, or one per member where these are
            not combined (PER_TEACHER).
        missing: Rows that some member lacks. A batch gets NaN as their logits and zeros as their features.
    """

    members: tuple[CacheReader, ...]
    combine: Combination | None = None
    maps: tuple[DistributionMap, ...] = ()
    missing: MissingTargets = field(default_factory=dict)

    @property
    def is_single_cache(self) -> bool:
        """Whether the targets are the logits of one cache, without a map."""
        return not (self.combine or self.maps)

    def row_order(self, split: str) -> Positions:
        """int64 [N]: the index of each position of a split, the same for all members."""
        return self.members[0].row_order(split)

    def index_at(self, split: str, positions: Positions) -> Positions:
        """int64 [n]: the index of each of the positions [n]."""
        return self.members[0].index_at(split, positions)

    def fits_in_memory(self, split: str, draw: int, taps: tuple[str, ...] = (), together: int = 1) -> bool:
        """Whether every member keeps the targets of so many draws in memory.

        Args:
            split, draw: Whose targets.
            taps: Taps whose features are read, of the first member.
            together: Number of draws that are read in turn.
        """
        first, *others = self.members
        if self.missing or not first.fits_in_memory(split, draw, taps, together):
            return False
        return all(cache.fits_in_memory(split, draw, (), together) for cache in others)

    def read_targets(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...] = (), together: int = 1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Read the targets at some positions.

        Args:
            split, draw: Whose targets.
            positions: int64 [n].
            taps: Taps whose features are read, of the first member.
            together: Number of draws that are read in turn.

        Returns:
            Logits float32 [n, K], or [n, M, K] where members are not combined, K the largest of the widths of
            embeddings, with zeros behind narrower ones; features {tap: float16 [n, …]}.

        Raises:
            CacheError: A shard is damaged.
        """
        is_missing = np.zeros(len(positions), bool)
        if split == "train" and draw in self.missing:
            is_missing = self.missing[draw][positions]
        if not is_missing.any():
            return self._read_members(split, draw, positions, taps, together)
        logits, features = self._read_members(split, draw, positions[~is_missing], taps, together)
        is_present = torch.from_numpy(~is_missing)
        return (
            _scatter_rows(logits, is_present, torch.nan),
            {tap: _scatter_rows(x, is_present, 0) for tap, x in features.items()},
        )

    def _read_members(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...], together: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The targets of rows that no member lacks."""

        def read(cache: CacheReader, taps: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if self.missing:  # only from the shards that hold these rows: others may be damaged
                return cache.read_stored(split, draw, positions, taps)
            return cache.read_targets(split, draw, positions, taps, together)

        first, *others = self.members
        logits, features = read(first, taps)
        if others:
            logits = _stack_teachers([logits, *(read(cache, ())[0] for cache in others)])
        return self.combine_logits(logits), features

    def combine_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Combine and map the members' logits.

        Args:
            logits: [n, K] of one member, [n, M, K] of several.

        Returns:
            [n, K], or [n, M, K] where members are not combined.
        """
        if self.combine and self.combine.is_per_teacher:
            if not self.maps:
                return logits
            mapped = [mapping(z) for mapping, z in zip(self.maps, logits.unbind(1), strict=True)]
            return torch.stack(mapped, 1)
        combined = self.combine(logits) if self.combine else logits
        return self.maps[0](combined) if self.maps else combined

    def as_single_teacher(self, logits: torch.Tensor) -> torch.Tensor:
        """As combine_logits, but always [n, K], for metrics: see merge_members."""
        return self.merge_members(self.combine_logits(logits))

    def merge_members(self, outputs: torch.Tensor) -> torch.Tensor:
        """Make one output of those of members that are not combined, for metrics.

        Args:
            outputs: What `combine_logits` returns.

        Returns:
            [n, K]: with PER_TEACHER the mean probability of the members; of embeddings [n, sum of the widths], side
            by side, each row of each member divided by its norm. Else the outputs as they are.
        """
        if self.combine is None or not self.combine.is_per_teacher:
            return outputs
        if self.members[0].task != EMBEDDING:
            return self.combine(outputs)
        parts = zip(self.members, outputs.unbind(1), strict=True)
        return torch.cat([F.normalize(z[:, : cache.classes], dim=1) for cache, z in parts], 1)

    def map_head(self, head: LinearHead | None) -> LinearHead | None:
        """The teacher's last linear layer followed by the map of its distribution, where there are both."""
        return self.maps[0].map_head(head) if head and self.maps else head

    def read_held_out(self, split: str) -> torch.Tensor:
        """The members' logits of a held-out split by index, neither combined nor mapped.

        Returns:
            float32 [N, K] of one member, [N, M, K] of several.
        """
        order = torch.from_numpy(self.row_order(split))
        outputs = [cache.read_targets(split, 0, np.arange(len(order)))[0] for cache in self.members]
        logits = _stack_teachers(outputs) if len(outputs) > 1 else outputs[0]
        by_index = torch.empty_like(logits)
        by_index[order] = logits
        return by_index


def _stack_teachers(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Stack outputs [n, K_m] of M teachers, [n, M, largest K_m], with zeros behind narrower ones."""
    width = max(z.shape[1] for z in outputs)
    return torch.stack([F.pad(z, (0, width - z.shape[1])) if z.shape[1] < width else z for z in outputs], 1)


def _scatter_rows(rows: torch.Tensor, is_present: torch.Tensor, fill: float) -> torch.Tensor:
    """[n, …]: the rows where is_present [n] is true, a value elsewhere."""
    scattered = rows.new_full((len(is_present), *rows.shape[1:]), fill)
    scattered[is_present] = rows
    return scattered


def check_same_views(caches: Sequence[CacheReader]) -> None:
    """Check that caches are of the same transfer set, views and classes, and that none is named twice.

    Raises:
        UsageError: Two of them are the same cache, or one of several has a sparse codec.
        CacheError: They differ; the message names the fields.
    """
    for cache, other in combinations(caches, 2):
        if other.manifest.fingerprint == cache.manifest.fingerprint:
            raise UsageError(f"'{cache.folder}' and '{other.folder}' are the same cache: one --cache is enough")
    for cache in caches if len(caches) > 1 else ():
        if cache.codec.kind != DENSE:
            raise UsageError(
                f"'{cache.folder}' has the codec {cache.codec_name}: several teachers need the logits of all classes,"
                " as float16 or sqrt8 stores them"
            )
    first = caches[0]
    expected = {name: first.manifest.identity[name] for name in ("transfer_set", "views")}
    for other in caches[1:]:
        identity = {name: other.manifest.identity[name] for name in ("transfer_set", "views")}
        if identity != expected:
            names = (str(first.folder), str(other.folder))
            raise CacheError(
                f"'{first.folder}' and '{other.folder}' are not of the same rows and views:"
                f"{format_differences(expected, identity, names)}"
                "\nMake the second with the --data, --views, --seed and cut of the first"
            )
        if other.classes != first.classes and first.task != EMBEDDING:
            raise CacheError(
                f"'{first.folder}' has {first.classes} classes, '{other.folder}' {other.classes}: combine teachers of"
                " the same classes"
            )


def find_missing_targets(
    caches: Sequence[CacheReader], draws: int, taps: tuple[str, ...], progress: Progress
) -> MissingTargets:
    """Find the training rows whose targets some cache lacks, because a shard is missing or damaged.

    Every shard is read and verified.

    Args:
        caches: The members of a teacher.
        draws: Only the first draws are looked at.
        taps: Taps whose features are read, of the first cache.
        progress: Wraps the loop over shards.

    Returns:
        {draw: bool [N] by position}, for draws with such rows.
    """
    shards = []
    for member, cache in enumerate(caches):
        datasets = {"logits"} if member else {"logits", *(f"features/{tap}" for tap in taps)}
        for record in cache.manifest.shards:
            if record.split == "train" and record.draw < draws and datasets & set(record.datasets):
                shards.append((cache, record))
    missing: MissingTargets = {}
    for cache, record in progress(shards, len(shards), "looking for missing rows"):
        try:
            verify_shard(cache, record)
        except CacheError:
            in_draw = missing.setdefault(record.draw, np.zeros(cache.manifest.splits["train"], bool))
            in_draw[record.start : record.start + record.rows] = True
    return missing


def list_missing_runs(missing: MissingTargets) -> dict[str, list[list[int]]]:
    """The missing positions as JSON: {draw: [[start, stop], …]}, runs from start to stop - 1."""
    runs = {}
    for draw, in_draw in sorted(missing.items()):
        edges = np.flatnonzero(np.diff(in_draw, prepend=False, append=False))
        runs[str(draw)] = edges.reshape(-1, 2).tolist()
    return runs
