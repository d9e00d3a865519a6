"""`softcache teacher-cache`, stage one: run the teacher once and write its outputs to a cache.

Under torchrun every rank runs a teacher of its own and writes every world-th shard. Rank 0 alone holds the lock,
starts the folder and writes the manifest; the ranks share files only, and a shard carries its own checksums. The rows
do not depend on the number of ranks. On a CPU they may depend on its threads in the last bit of float32, with or
without ranks: with 1 and 2 threads `mlp:800,800` and `cnn` at 28 px differ by 5e-7, resnets do not. torchrun gives
each rank one thread unless OMP_NUM_THREADS is set; the same OMP_NUM_THREADS gives the same bits.
"""

import json
from dataclasses import asdict
from typing import Any

from softcache.data.sources import get_source_name, has_argument
from softcache.data.tasks import CLASSES, EMBEDDING
from softcache.data.views.policy import read_views
from softcache.pipeline.cache.manifest import Manifest
from softcache.stages.cli.configs import CacheConfig, StudentConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.distributed import ranks
from softcache.stages.runs.data import format_teacher_accuracies, has_labels

from .cache_readme import describe_fidelity
from .preparation import fill_defaults, prepare_cache, suggest_other_command
from .writing import write_cache, write_share_of_rank


def run(config: CacheConfig) -> None:
    """Make a cache, or complete or extend the one in the folder, and report what it holds."""
    console = Console(config.json)
    with ranks.process_group("teacher-cache", asdict(config)):
        if ranks.is_first():
            config, manifest = make_cache(config, console)
            _print_report(manifest, config, console)
        else:
            write_share_of_rank(prepare_cache(fill_defaults(config), console), console)


def make_cache(config: CacheConfig, console: Console) -> tuple[CacheConfig, Manifest]:
    """Make a cache: prepare what it is to hold, write shard after shard, then the manifest.

    Returns:
        The options with the defaults of the data set, and the manifest.

    Raises:
        UsageError: An option does not fit the data or the teacher.
        CacheError: The folder holds another cache, or something that cannot be used or written.
    """
    config = fill_defaults(config)
    with suggest_other_command(config):
        prepared = prepare_cache(config, console)
        return config, write_cache(prepared, console)


def _print_report(manifest: Manifest, config: CacheConfig, console: Console) -> None:
    """Print what the cache holds, or with --json one object."""
    rows = manifest.count_views()
    record: dict[str, Any] = {
        "cache": config.out,
        "settings": asdict(config),
        "fingerprint": manifest.fingerprint,
        "draws": manifest.draws,
        "rows": rows,
        "bytes": manifest.bytes,
        "seconds": manifest.seconds,
        "pictures_per_second": round(rows / manifest.seconds, 1) if manifest.seconds else None,
        "teacher": manifest.teacher,
        "fidelity": manifest.fidelity,
    }
    if config.json:
        return console.print_json(json.dumps(record))
    accuracy = format_teacher_accuracies(manifest)
    draws = f"{manifest.draws} draw{'s' if manifest.draws > 1 else ''}"
    console.print(
        f"cache:   {config.out} ({manifest.fingerprint[:12]}), {draws} of {manifest.splits['train']:,} views"
    )
    pace = f", {rows / manifest.seconds:,.0f} images a second" if manifest.seconds else ""
    size = f"{manifest.bytes / rows:.1f} bytes a view"
    console.print(f"wrote:   {rows:,} rows, {size}, in {format_duration(manifest.seconds)}{pace}")
    mixed = ", train on mixed views" if read_views(manifest.identity["views"]).mixes_images else ""
    if manifest.task == CLASSES:
        sampled = ", of the stored samples" if "reverse_kl_1" in manifest.fidelity else ""
        console.print(f"teacher: accuracy {accuracy or 'unknown, there are no labels'}{mixed}{sampled}")
    else:
        labelled = ", ".join(f"{split} {figures['labelled']:,}" for split, figures in manifest.teacher.items())
        width = f"{manifest.classes:,} output{'s' if manifest.classes > 1 else ''}"
        console.print(f"teacher: {width}, task {manifest.task}; rows with hard targets: {labelled}")
    console.print(f"codec:   {manifest.identity['codec']} costs {describe_fidelity(manifest)}")
    data = config.data if has_argument(get_source_name(config.data)) else ""
    student = StudentConfig(
        data=data,
        data_root=config.data_root,
        index=config.index,
        cache=(config.out,),
        baseline=has_labels(manifest, "train") and manifest.task != EMBEDDING,
    )
    console.print(f"next:    {format_command('student', student)}")
