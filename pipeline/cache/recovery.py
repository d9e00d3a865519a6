"""A cache that lost its manifest: what its shards say that they are. Each vouches for itself, see Writer.have."""

from dataclasses import replace
from pathlib import Path

from softcache.base.errors import CacheError

from .folder import IN_PROGRESS_FILE, MANIFEST_FILE, list_shard_files, make_shard_path, parse_shard_path
from .manifest import ROW_KEYS, ShardSpec
from .shards import read_claims


def find_lost_shards(folder: Path, fingerprint: str, splits: dict[str, int]) -> list[ShardSpec]:
    """The shards of a cache whose manifest is gone, those that are missing between them included.

    None where there is a manifest, or a cache was only begun. Raises CacheError for a shard of another cache.
    """
    if not folder.is_dir() or (folder / MANIFEST_FILE).is_file() or (folder / IN_PROGRESS_FILE).is_file():
        return []
    parts: dict[tuple[str, int, int], dict[int, ShardSpec]] = {}
    for name in sorted(list_shard_files(folder)):
        if found := _recover_shard(folder, name, fingerprint):
            piece, number, part = found
            parts.setdefault((piece.split, piece.draw, part), {})[number] = piece
    return [piece for (_, _, part), there in parts.items() for piece in _fill_gaps(part, there, splits)]


def _recover_shard(folder: Path, name: str, fingerprint: str) -> tuple[ShardSpec, int, int] | None:
    """The shard, its number, and its part; None where it cannot say, for it is damaged."""
    said = read_claims(folder, name)
    numbers = parse_shard_path(name)
    if said is None or numbers is None:
        return None
    attributes, layout = said
    if attributes.get("fingerprint") != fingerprint:
        raise CacheError(f"{folder / name} is of another cache: choose another --out, or move it away")
    split, draw, start = (attributes.get(key) for key in ("split", "draw", "start"))
    number, part = numbers
    if not isinstance(split, str) or not isinstance(draw, int) or not isinstance(start, int) or "index" not in layout:
        return None
    if name != make_shard_path(split, draw, number, part) or not set(ROW_KEYS) < set(layout):
        return None
    datasets = {key: (shape[1:], dtype) for key, (shape, dtype) in layout.items()}
    return ShardSpec(name, split, draw, start, layout["index"][0][0], datasets), number, part


def _fill_gaps(part: int, there: dict[int, ShardSpec], splits: dict[str, int]) -> list[ShardSpec]:
    """A part's shards by number, and one for each gap between them."""
    one = next(iter(there.values()))
    ends = [(-1, 0), *((n, p.start + p.rows) for n, p in sorted(there.items()))]
    starts = [*((n, p.start) for n, p in sorted(there.items())), (max(there) + 1, splits.get(one.split, 0))]
    gaps = [
        replace(one, path=make_shard_path(one.split, one.draw, n + 1, part), start=end, rows=start - end)
        for (n, end), (_, start) in zip(ends, starts, strict=True)
        if start > end
    ]
    return sorted([*there.values(), *gaps], key=lambda piece: piece.start)


def measure_extent(pieces: list[ShardSpec]) -> tuple[int, dict[str, list[int]]]:
    """How many draws they are of, and {tap: row shape} of the features that they hold."""
    draws = max((piece.draw + 1 for piece in pieces if piece.split == "train"), default=0)
    names = {name: shape for piece in pieces for name, (shape, _) in piece.datasets.items()}
    return draws, {n.removeprefix("features/"): list(s) for n, s in names.items() if n.startswith("features/")}
