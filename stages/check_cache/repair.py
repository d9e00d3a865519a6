"""Asking the teacher again for the shards that are bad, and for no others."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from softcache.base.errors import CacheError
from softcache.base.lock import hold_lock
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.folder import HEAD_FILE
from softcache.pipeline.cache.manifest import Manifest, ShardRecord, ShardSpec
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.verification import compare_views
from softcache.pipeline.cache.writer import CacheWriter, compute_label_accuracy
from softcache.pipeline.models import find_head, get_head_arrays
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.teacher_cache.reproducibility import check_reproducibility, make_target_generator
from softcache.stages.teacher_cache.targets import TargetGenerator


def repair(
    cache: Cache, bad: dict[str, str], transfer_set: TransferSet, config: CheckConfig, console: Console
) -> None:
    """Put whole shards in the place of bad ones, if there are any. Raises CacheError with the reason when it cannot.

    The teacher must have the weights of the identity, and must say about good shards' rows what they hold.
    """
    if not bad:
        return
    beside = Path(f"{cache.folder}-teacher")
    if not config.weights and (beside / "result.json").is_file():
        config = replace(config, weights=str(beside))
    if not config.weights:
        raise CacheError(f"{len(bad)} files are bad and cannot be repaired without the teacher: add --weights …")
    with hold_lock(cache.folder):
        ask = make_target_generator(cache, transfer_set, config)
        _check_good_shards(cache, bad, transfer_set, ask)
        manifest = cache.manifest
        with progress_bar(len(bad), "repair", "shard") as shown:
            for record in [r for r in manifest.shards if r.path in bad]:
                manifest = _repair_shard(cache, manifest, record, ask, console)
                shown.update()
        if HEAD_FILE in bad:
            _repair_head(cache, manifest, ask, console)


def _check_good_shards(cache: Cache, bad: dict[str, str], transfer_set: TransferSet, ask: TargetGenerator) -> None:
    """What is not damaged must still come out as it did: the views and the teacher's words."""
    good = [r for r in cache.manifest.shards if r.path not in bad]
    for record in [r for r in good if r.correct is not None][:16]:
        positions = np.unique(np.linspace(record.start, record.start + record.rows - 1, 16).astype(int))
        seen = cache.read_rows(record.split, record.draw, "view_crc32", positions)
        compare_views(cache, transfer_set, record.split, record.draw, positions, seen)
    check_reproducibility(cache, ask, bad).raise_if_different()


def _repair_shard(
    cache: Cache, manifest: Manifest, record: ShardRecord, ask: TargetGenerator, console: Console
) -> Manifest:
    """Publish one shard anew, then the manifest that knows it: stopped in between, the shard is as bad as before."""
    if (cache.folder / record.path).parent.is_symlink():
        raise CacheError(f"'{(cache.folder / record.path).parent}' is a link: remove it, then repair")
    datasets = {name: manifest.datasets[name] for name in record.datasets}
    piece = ShardSpec(record.path, record.split, record.draw, record.start, record.rows, datasets)
    writer = CacheWriter(cache.folder, _make_plan(manifest), [piece])
    arrays, facts = ask.compute_shard(piece, lambda rows: None)
    writer.write_shard(piece, arrays, {**facts, "seconds": 0.0})
    new = writer.records[0]
    shards = tuple(new if r.path == record.path else r for r in manifest.shards)
    labelled = {split: int((rows.labels >= 0).sum()) for split, rows in ask.transfer_set.splits.items()}
    teacher = compute_label_accuracy(shards, manifest.splits, manifest.draws, labelled)
    manifest = replace(manifest, shards=shards, teacher=teacher)
    manifest.write(cache.folder)
    same = "the same rows as before" if new.payload == record.payload else "asked anew, not the bits of before"
    console.print(f"{record.path}: repaired, {same}")
    return manifest


def _repair_head(cache: Cache, manifest: Manifest, ask: TargetGenerator, console: Console) -> None:
    head = find_head(ask.teacher.network, ask.classes)
    if head is None:
        raise CacheError(f"{HEAD_FILE}: this teacher has no last linear layer of {ask.classes} outputs")
    record = CacheWriter(cache.folder, _make_plan(manifest), []).add_head(*get_head_arrays(head, ask.classes))
    replace(manifest, head=record).write(cache.folder)
    console.print(f"{HEAD_FILE}: repaired")


def _make_plan(manifest: Manifest) -> CachePlan:
    kept = (manifest.identity, manifest.classes, manifest.draws, manifest.splits, manifest.taps)
    return CachePlan(*kept, precision_record=manifest.arithmetic)
