"""Repairing a cache: the damaged files are computed again, and no others."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from softcache.base.errors import CacheError
from softcache.base.lock import hold_lock
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.folder import HEAD_FILE
from softcache.pipeline.cache.manifest import Manifest, ShardRecord, ShardSpec
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import compare_views
from softcache.pipeline.cache.writer import CacheWriter, compute_label_accuracy
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.cli.copied_commands import format_head_command
from softcache.stages.teacher_cache.reproducibility import check_reproducibility, make_target_generator
from softcache.stages.teacher_cache.targets import TargetGenerator
from softcache.stages.teacher_cache.teachers.file_teachers import get_file
from softcache.stages.teacher_cache.writing import write_head

_SAMPLED_SHARDS, _SAMPLED_ROWS = 16, 16  # whose views are rendered again before a repair


def repair(
    cache: CacheReader, bad: Collection[str], transfer_set: TransferSet, config: CheckConfig, console: Console
) -> None:
    """Replace the damaged files of a cache. Nothing is done where there are none.

    Before anything is written, views and outputs of intact shards are computed again and compared.

    Args:
        cache: The cache.
        bad: Paths of the damaged files.
        transfer_set: Its images.
        config: Options of the command. Without weights, a teacher that was trained for this cache is used.
        console: Prints a line for each file.

    Raises:
        CacheError: There is no teacher, it has other weights than those of the cache, or the views or the outputs for
            intact shards come out differently.
        UsageError: The weights do not fit the arch, or the arch is a user's code that --teacher does not name.
    """
    if not bad:
        return
    if "head" in cache.manifest.identity["teacher"]:
        raise CacheError(
            f"{len(bad)} files are bad, and what a head made is not repaired by its teacher: remove them and"
            f" manifest.json, then  {format_head_command(cache, config.data)}"
        )
    trained_teacher = Path(f"{cache.folder}-teacher")
    if not get_file(config) and (trained_teacher / "result.json").is_file():
        config = replace(config, weights=str(trained_teacher))
    if not get_file(config):
        raise CacheError(f"{len(bad)} files are bad and cannot be repaired without the teacher: add --weights …")
    repair_files(cache, bad, make_target_generator(cache, transfer_set, config), console)


def repair_files(cache: CacheReader, bad: Collection[str], generator: TargetGenerator, console: Console) -> None:
    """Replace the damaged files of a cache by what its teacher, which is loaded, computes.

    Args:
        cache, bad, console: As of `repair`.
        generator: The teacher and the images.

    Raises:
        CacheError: The views or the outputs for intact shards come out differently.
    """
    with hold_lock(cache.folder):
        _check_intact_shards(cache, bad, generator.transfer_set, generator)
        manifest = cache.manifest
        with progress_bar(len(bad), "repair", "shard") as bar:
            for record in cache.manifest.shards:
                if record.path in bad:
                    manifest = _repair_shard(cache, manifest, record, generator, console)
                    bar.update()
        if HEAD_FILE in bad:
            _repair_head(cache, manifest, generator, console)


def _check_intact_shards(
    cache: CacheReader, bad: Collection[str], transfer_set: TransferSet, generator: TargetGenerator
) -> None:
    """Check that the views and the teacher's outputs of intact shards still come out as they are stored."""
    intact = [record for record in cache.manifest.shards if record.path not in bad and record.has_logits]
    for record in intact[:_SAMPLED_SHARDS]:
        last = record.start + record.rows - 1
        positions = np.unique(np.linspace(record.start, last, _SAMPLED_ROWS).astype(int))
        crcs = cache.read_rows(record.split, record.draw, "view_crc32", positions)
        compare_views(cache, transfer_set, record.split, record.draw, positions, crcs)
    check_reproducibility(cache, generator, bad).raise_if_different()


def _repair_shard(
    cache: CacheReader, manifest: Manifest, record: ShardRecord, generator: TargetGenerator, console: Console
) -> Manifest:
    """Publish one shard again, then the manifest with its new checksum.

    If it is interrupted between the two, the shard is as bad as before, and can be repaired again.

    Returns:
        The new manifest.
    """
    folder = (cache.folder / record.path).parent
    if folder.is_symlink():
        raise CacheError(f"'{folder}' is a link: remove it, then repair")
    datasets = {name: manifest.datasets[name] for name in record.datasets}
    spec = ShardSpec(record.path, record.split, record.draw, record.start, record.rows, datasets)
    writer = CacheWriter(cache.folder, _make_plan(manifest), [spec])
    arrays, measurements = generator.compute_shard(spec, lambda rows: None)
    writer.write_shard(spec, arrays, {**measurements, "seconds": 0.0})
    new_record = writer.records[0]
    shards = tuple(new_record if shard.path == record.path else shard for shard in manifest.shards)
    labelled_rows = generator.transfer_set.count_labelled()
    teacher = compute_label_accuracy(shards, manifest.splits, manifest.draws, labelled_rows, manifest.task)
    manifest = replace(manifest, shards=shards, teacher=teacher)
    manifest.write(cache.folder)
    is_identical = new_record.payload == record.payload
    result = "the same rows as before" if is_identical else "its rows are not bit for bit those of before"
    console.print(f"{record.path}: repaired, {result}")
    return manifest


def _repair_head(cache: CacheReader, manifest: Manifest, generator: TargetGenerator, console: Console) -> None:
    """Publish the teacher's last linear layer again, then the manifest with its new checksum."""
    writer = CacheWriter(cache.folder, _make_plan(manifest), [])
    axes = manifest.head is not None and manifest.head.inputs > 0
    head_record = write_head(writer, generator, manifest.shards, axes)
    if head_record is None:
        raise CacheError(f"{HEAD_FILE}: this teacher has no last linear layer of {generator.classes} outputs")
    replace(manifest, head=head_record).write(cache.folder)
    console.print(f"{HEAD_FILE}: repaired")


def _make_plan(manifest: Manifest) -> CachePlan:
    return CachePlan(
        identity=manifest.identity,
        classes=manifest.classes,
        draws=manifest.draws,
        splits=manifest.splits,
        taps=manifest.taps,
        precision_record=manifest.arithmetic,
    )
