"""Verifying a cache: every byte of its shards, and that its views can still be rendered as the teacher saw them."""

import math
import os
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.base.progress import Progress
from softcache.base.threads import map_in_threads
from softcache.data.transfer_set import TransferSet
from softcache.data.views.render import ImageSource, render

from .checksums import compute_crc32
from .folder import HEAD_FILE
from .manifest import ShardRecord
from .reader import CacheReader
from .rows import Positions
from .shards import Shard

_PIXEL_BYTES = 8 << 20  # of views that are rendered at once
_VIEWS_AT_ONCE = 512  # whose checksums are compared at once
GOOD = "good"
Findings = dict[str, str]  # {file: GOOD, or what is wrong with it}


def check_files(cache: CacheReader, transfer_set: TransferSet | None, progress: Progress) -> Findings:
    """Check every file of a cache, in as many threads as there are processors: reading and hashing release the GIL.

    Args:
        cache: The cache.
        transfer_set: Its images, to render every view again; None to check the bytes alone.
        progress: Shows how many shards have been checked.
    """
    records = cache.manifest.shards
    findings: Findings = {}
    threads = os.cpu_count() or 1
    with closing(
        map_in_threads(lambda record: _check_shard(cache, record, transfer_set), records, threads)
    ) as results:
        for record, finding in zip(records, progress(results, len(records), "check-cache"), strict=True):
            findings[record.path] = finding
    if cache.manifest.head:
        try:
            cache.read_head_arrays()
            findings[HEAD_FILE] = GOOD
        except CacheError as error:
            findings[HEAD_FILE] = str(error)
    return findings


def select_damage(findings: Findings) -> Findings:
    """Return the files with which something is wrong."""
    return {path: finding for path, finding in findings.items() if finding != GOOD}


def _check_shard(cache: CacheReader, record: ShardRecord, transfer_set: TransferSet | None) -> str:
    """Check one shard, and return what is wrong with it."""
    try:
        crcs = verify_shard(cache, record)
        # The views of features that were added later have been compared with those of the logits.
        if transfer_set is not None and record.has_logits:
            for start in range(0, record.rows, _VIEWS_AT_ONCE):
                batch_crcs = crcs[start : start + _VIEWS_AT_ONCE]
                positions = record.start + start + np.arange(len(batch_crcs))
                compare_views(cache, transfer_set, record.split, record.draw, positions, batch_crcs)
    except CacheError as error:
        return str(error)
    return GOOD


def verify_shard(cache: CacheReader, record: ShardRecord) -> NDArray[np.generic]:
    """Verify all of a shard that can be verified without its images. May be called by several threads.

    Returns:
        uint32 [rows], the checksums of its views, see checksums.compute_crc32.

    Raises:
        CacheError: The shard is missing, damaged, or not of this place of this cache.
    """
    with closing(cache.open_shard(record)) as shard:
        if shard.verify_payload() != record.payload:
            raise CacheError(f"{shard.path}: the digest of its datasets is not the one in the manifest")
        for name in record.datasets:
            if name.startswith("features/") and not np.isfinite(shard.read(name)).all():
                raise CacheError(f"{shard.path}: {name} has values that are not finite")
        if not record.has_logits:
            _check_views_of_features(cache, shard, record)
        return shard.read("view_crc32")


def _check_views_of_features(cache: CacheReader, shard: Shard, record: ShardRecord) -> None:
    """Check that features which were added later are of the same views as the logits.

    Shards of logits that cannot be read are passed over: they are reported by themselves.
    """
    crcs = shard.read("view_crc32")
    for logits in cache.list_records(record.split, record.draw, "view_crc32"):
        start = max(logits.start, record.start)
        stop = min(logits.start + logits.rows, record.start + record.rows)
        if start >= stop:
            continue
        layout = cache.manifest.get_layout(logits)
        try:
            with closing(Shard(cache.folder, logits.path, layout, logits.bytes, logits.checksum)) as logits_shard:
                logits_crcs = logits_shard.read("view_crc32", start - logits.start, stop - start)
        except CacheError:
            continue
        if not np.array_equal(crcs[start - record.start : stop - record.start], logits_crcs):
            raise CacheError(f"{shard.path}: its features are of other views than the logits of {logits.path}")


def verify_views(
    cache: CacheReader,
    transfer_set: TransferSet,
    draws: int,
    missing: dict[int, NDArray[np.bool_]] | None = None,
    views: int = 256,
) -> None:
    """Render some views again and compare them with the checksums in the cache.

    Args:
        cache: Whose views are compared.
        transfer_set: Its images.
        draws: Views of the first draws are compared, of up to eight of them, and views of the held-out splits.
        missing: {draw: bool [rows]}, True at positions of the training split whose targets are missing; their views
            are left out.
        views: How many are rendered in all.

    Raises:
        CacheError: A view comes out differently.
    """
    sampled_draws = min(draws, 8)
    places = [("train", i * draws // sampled_draws) for i in range(sampled_draws)]
    places += [(split, 0) for split in cache.manifest.splits if split != "train"]
    for split, draw in places:
        available = np.arange(cache.manifest.splits[split])
        if missing and split == "train" and draw in missing:
            available = available[~missing[draw]]
        count = min(len(available), -(-views // len(places)))
        positions = available[np.arange(count) * len(available) // max(count, 1)]
        crcs = cache.read_rows(split, draw, "view_crc32", positions)
        compare_views(cache, transfer_set, split, draw, positions, crcs)


def compare_views(
    cache: CacheReader,
    transfer_set: TransferSet,
    split: str,
    draw: int,
    positions: Positions,
    crcs: NDArray[np.generic],
) -> None:
    """Render the views at these positions and compare their checksums.

    Args:
        cache: Whose views are compared.
        transfer_set: Its images.
        split: `train`, `val` or `test`.
        draw: Draw of the views; 0 for a held-out split.
        positions: [n].
        crcs: [n], the checksums in the cache.

    Raises:
        CacheError: A view comes out differently. The message names the first one.
    """
    images, index = transfer_set.splits[split].images, cache.index_at(split, positions)
    policy = cache.views.of_split(split)
    shape = cache.input_spec.shape
    view_bytes = 4 * math.prod(shape) if shape else 3 * max(cache.views.size, cache.views.resize) ** 2
    batch = max(1, _PIXEL_BYTES // view_bytes)
    for start in range(0, len(index), batch):
        part = index[start : start + batch]
        views = render(images, policy, cache.seed, part, draw)
        wrong = np.flatnonzero(compute_crc32(views) != crcs[start : start + batch])
        if len(wrong):
            raise make_view_error(
                cache,
                images,
                split=split,
                index=int(part[wrong[0]]),
                draw=draw,
                wrong=len(wrong),
                compared=len(part),
            )


def make_view_error(
    cache: CacheReader, images: ImageSource, *, split: str, index: int, draw: int, wrong: int, compared: int
) -> CacheError:
    """Make the error of views that are not those that the teacher saw.

    Args:
        cache: Whose checksums they do not have.
        images: Of the split.
        split, index, draw: Of the first such view.
        wrong: How many there are.
        compared: How many were compared.
    """
    file = f", of the image {make_printable(images.describe(index), None)}" if images.describe(index) else ""
    return CacheError(
        f"{wrong} of {compared} views of '{cache.folder}' come out differently here, the first is"
        f" {split} index {index}, draw {draw}{file}: an image, the decoder or a library changed. Put it back,"
        f" or make a new cache. The cache was written with {_format_versions(cache.manifest.versions)}"
    )


def _format_versions(versions: dict[str, str]) -> str:
    return make_printable(", ".join(f"{name} {version}" for name, version in versions.items()))
