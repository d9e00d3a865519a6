"""Recovery of a cache whose manifest is lost, from what its shards record about themselves.

Every shard has, as attributes of its HDF5 file, the fingerprint of its cache, its split, draw and first row, and a
digest of its datasets. `CacheWriter.adopt` verifies each shard before it is listed in a new manifest.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from softcache.base.errors import CacheError

from .folder import list_shard_files, make_shard_path, parse_shard_path
from .manifest import ROW_KEYS, ShardSpec
from .shards import Layout, read_header

Attributes = dict[str, str | int]


@dataclass(frozen=True)
class OrphanedShard:
    """A readable HDF5 file with the name of a shard, in a folder without a manifest.

    Attributes:
        path: Path in the cache's folder.
        number: Position among the shards of its draw and part, from its name.
        part: 0, or 1, 2, … for taps that were added later, from its name.
        attributes: Attributes of the file.
        spec: Rows and datasets that it holds; None where its attributes and its name contradict each other.
    """

    path: str
    number: int
    part: int
    attributes: Attributes
    spec: ShardSpec | None


def find_orphaned_shards(folder: Path) -> tuple[OrphanedShard, ...]:
    """Find the shards in a folder without a manifest, sorted by path. Files that cannot be read are left out."""
    shards = []
    for path in sorted(list_shard_files(folder)):
        numbers, header = parse_shard_path(path), read_header(folder, path)
        if numbers is not None and header is not None:
            attributes, layout = header
            shards.append(OrphanedShard(path, *numbers, attributes, _make_spec(path, *numbers, attributes, layout)))
    return tuple(shards)


def _make_spec(path: str, number: int, part: int, attributes: Attributes, layout: Layout) -> ShardSpec | None:
    """Make the spec that a shard was written by; None where its header is not that of a shard of this path."""
    split, draw, start = (attributes.get(key) for key in ("split", "draw", "start"))
    if not isinstance(split, str) or not isinstance(draw, int) or not isinstance(start, int) or "index" not in layout:
        return None
    if path != make_shard_path(split, draw, number, part) or not set(ROW_KEYS) < set(layout):
        return None
    datasets = {name: (shape[1:], dtype) for name, (shape, dtype) in layout.items()}
    return ShardSpec(path, split, draw, start, layout["index"][0][0], datasets)


def recover_specs(
    folder: Path, shards: tuple[OrphanedShard, ...], fingerprint: str, splits: dict[str, int]
) -> list[ShardSpec]:
    """List the shards of a cache whose manifest is lost, those that are missing between them included.

    Args:
        folder: The cache's folder.
        shards: The shards that are left.
        fingerprint: Of the cache.
        splits: {split: rows}; without a split, its rows after the last shard are not filled up.

    Raises:
        CacheError: A shard belongs to another cache.
    """
    specs: dict[tuple[str, int, int], dict[int, ShardSpec]] = {}  # {(split, draw, part): {number: spec}}
    for shard in shards:
        if shard.attributes.get("fingerprint") != fingerprint:
            raise CacheError(f"{folder / shard.path} is of another cache: choose another --out, or move it away")
        if shard.spec:
            specs.setdefault((shard.spec.split, shard.spec.draw, shard.part), {})[shard.number] = shard.spec
    complete = []
    for (split, _, part), by_number in specs.items():
        complete += _fill_gaps(by_number, part, splits.get(split, 0))
    return complete


def _fill_gaps(specs: dict[int, ShardSpec], part: int, rows: int) -> list[ShardSpec]:
    """Add a shard for each gap between the shards of one draw and part, and return all of them in row order."""
    template = next(iter(specs.values()))
    gaps = []
    number, end = -1, 0
    ranges = [(n, spec.start, spec.start + spec.rows) for n, spec in sorted(specs.items())]
    for next_number, start, stop in [*ranges, (max(specs) + 1, rows, rows)]:
        if start > end:
            path = make_shard_path(template.split, template.draw, number + 1, part)
            gaps.append(replace(template, path=path, start=end, rows=start - end))
        number, end = next_number, stop
    return sorted([*specs.values(), *gaps], key=lambda spec: spec.start)


def measure_extent(specs: list[ShardSpec]) -> tuple[int, dict[str, list[int]]]:
    """Return how many draws these shards are of, and {tap: row shape} of the features that they hold."""
    draws = max((spec.draw + 1 for spec in specs if spec.split == "train"), default=0)
    shapes = {name: shape for spec in specs for name, (shape, _) in spec.datasets.items()}
    prefix = "features/"
    return draws, {name.removeprefix(prefix): list(s) for name, s in shapes.items() if name.startswith(prefix)}
