"""`softcache check-cache`: verify every byte of a cache; with --deep every view, and the teacher's outputs, too."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.threads import map_in_threads
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.folder import HEAD_FILE
from softcache.pipeline.cache.manifest import ShardRecord
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import compare_views, verify_shard
from softcache.pipeline.cache.writer import clean_up
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.cli.copied_commands import format_repair_command
from softcache.stages.runs.data import load_cache_data
from softcache.stages.teacher_cache.reproducibility import (
    ReproducibilityReport,
    check_reproducibility,
    make_target_generator,
)

from .repair import repair

_GOOD = "good"
_VIEWS_AT_ONCE = 512
Findings = dict[str, str]  # {file: _GOOD, or what is wrong with it}


def run(name: str, config: CheckConfig) -> None:
    """Check every file of a cache, and print what was found.

    With --repair, damaged files are computed again first. Damaged are those whose bytes changed; a file whose views
    come out differently on this machine is reported by --deep, and left as it is.

    Args:
        name: Folder of the cache.
        config: Options of the command.

    Raises:
        UsageError: --weights without --deep or --repair.
        CacheError: A file is damaged, a view comes out differently, or the teacher's outputs have changed.
    """
    console = Console(config.json)
    if config.weights and not (config.deep or config.repair):
        raise UsageError("--weights is for --deep or --repair")
    cache = CacheReader(Path(name))
    transfer_set = None
    if config.deep or config.repair:
        transfer_set = load_cache_data(cache, config.data, Path(config.data_root))
    if config.repair and transfer_set is not None:
        repair(cache, _select_bad(_check_files(cache, None)), transfer_set, config, console)
        clean_up(cache.folder)
        cache = CacheReader(Path(name))
        cache.check_transfer_set(transfer_set)
    findings = _check_files(cache, transfer_set if config.deep else None)
    report = None
    if config.deep and config.weights and transfer_set is not None and not _select_bad(findings):
        report = check_reproducibility(cache, make_target_generator(cache, transfer_set, config))
    _print_report(name, cache, findings, report, config, console)


def _check_files(cache: CacheReader, transfer_set: TransferSet | None) -> Findings:
    """Check every file, in as many threads as there are processors: reading and hashing release the GIL.

    Args:
        cache: The cache.
        transfer_set: Its images, to render every view again; None to check the bytes alone.
    """
    records = cache.manifest.shards
    findings: Findings = {}
    with (
        progress_bar(sum(record.rows for record in records), "check-cache", "row") as bar,
        closing(
            map_in_threads(lambda record: _check_shard(cache, record, transfer_set), records, os.cpu_count() or 1)
        ) as results,
    ):
        for record, finding in zip(records, results, strict=True):
            findings[record.path] = finding
            bar.update(record.rows)
    if cache.manifest.head:
        try:
            cache.read_head()
            findings[HEAD_FILE] = _GOOD
        except CacheError as error:
            findings[HEAD_FILE] = str(error)
    return findings


def _check_shard(cache: CacheReader, record: ShardRecord, transfer_set: TransferSet | None) -> str:
    """Check one shard, and return what is wrong with it."""
    try:
        crcs = verify_shard(cache, record)
        # The views of features that were added later have been compared with those of the logits.
        if transfer_set is not None and record.correct is not None:
            for start in range(0, record.rows, _VIEWS_AT_ONCE):
                batch_crcs = crcs[start : start + _VIEWS_AT_ONCE]
                positions = record.start + start + np.arange(len(batch_crcs))
                compare_views(cache, transfer_set, record.split, record.draw, positions, batch_crcs)
    except CacheError as error:
        return str(error)
    return _GOOD


def _select_bad(findings: Findings) -> Findings:
    return {path: finding for path, finding in findings.items() if finding != _GOOD}


def _print_report(
    name: str,
    cache: CacheReader,
    findings: Findings,
    report: ReproducibilityReport | None,
    config: CheckConfig,
    console: Console,
) -> None:
    """Print what is wrong with each file and a summary, or all of it as JSON.

    Raises:
        CacheError: A file is bad, or the teacher's outputs have changed.
    """
    manifest, bad = cache.manifest, _select_bad(findings)
    if config.json:
        record: dict[str, Any] = {
            "cache": name,
            "fingerprint": manifest.fingerprint,
            "manifest": manifest.digest,
            "shards": findings,
            "teacher": report.to_json() if report else None,
        }
        console.print_json(json.dumps(record))
    else:
        for path, finding in findings.items():
            console.print(f"{path}: {make_printable(finding, 2000)}")
        for path in cache.unlisted_files:
            advice = "run the same teacher-cache command again"
            console.print(f"{make_printable(path)}: of an addition that is not finished: {advice}")
    if bad:
        advice = ""
        if not config.repair:
            command = format_repair_command(cache, config)
            advice = f". This computes the damaged ones again, and no others:  {command}"
        raise CacheError(
            f"'{name}': {len(bad)} of {len(findings)} files are bad. The first: {next(iter(bad.values()))}{advice}"
        )
    deep = ", every view rendered again and equal" if config.deep else ""
    console.print(
        f"'{name}' is intact: {len(findings)} files, {manifest.bytes / 1e6:.1f} MB, {manifest.draws} draws{deep}"
    )
    if report:
        console.print(report.describe())
        report.raise_if_different()
