"""`softcache check-cache`: is every byte what it was? --deep: every image, and the teacher too."""

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.threads import map_in_threads
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.folder import HEAD_FILE
from softcache.pipeline.cache.manifest import ShardRecord
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.verification import compare_views, verify_shard
from softcache.pipeline.cache.writer import clean_up
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.runs.data import load_cache_data
from softcache.stages.teacher_cache.reproducibility import (
    ReproducibilityReport,
    check_reproducibility,
    make_target_generator,
)

from .repair import repair

_VIEWS_AT_ONCE = 512
Findings = dict[str, str]  # {file: "good", or what is wrong with it}


def run(name: str, config: CheckConfig) -> None:
    """A verdict per shard; CacheError at the end when one is bad."""
    console = Console(config.json)
    if config.weights and not (config.deep or config.repair):
        raise UsageError("--weights is for --deep or --repair")
    cache = Cache(Path(name))
    transfer_set = None
    if config.deep or config.repair:
        transfer_set = load_cache_data(cache, config.data, Path(config.data_root))
    if config.repair and transfer_set is not None:  # bad are those whose bytes changed, not whose views drifted
        repair(cache, _damaged(_check_files(cache, None)), transfer_set, config, console)
        clean_up(cache.folder)
        cache = Cache(Path(name))
        cache.check_transfer_set(transfer_set)
    verdicts = _check_files(cache, transfer_set if config.deep else None)
    asked = None
    if config.deep and config.weights and transfer_set is not None and not _damaged(verdicts):
        asked = check_reproducibility(cache, make_target_generator(cache, transfer_set, config))
    _print_report(name, cache, verdicts, asked, config, console)


def _check_files(cache: Cache, transfer_set: TransferSet | None) -> Findings:
    """Of every file, by as many threads as there are processors: reading and hashing leave Python alone."""
    records = cache.manifest.shards
    verdicts: Findings = {}
    with (
        progress_bar(sum(record.rows for record in records), "check-cache", "row") as counted,
        closing(map_in_threads(lambda r: _check_file(cache, r, transfer_set), records, os.cpu_count() or 1)) as found,
    ):
        for record, verdict in zip(records, found, strict=True):
            verdicts[record.path] = verdict
            counted.update(record.rows)
    if cache.manifest.head:
        verdicts[HEAD_FILE] = _refusal(cache.read_head)
    return verdicts


def _check_file(cache: Cache, record: ShardRecord, transfer_set: TransferSet | None) -> str:
    def check() -> None:
        seen = verify_shard(cache, record)
        if transfer_set is None or record.correct is None:  # features added later were compared with the logits' views
            return
        for at in range(0, record.rows, _VIEWS_AT_ONCE):
            part = seen[at : at + _VIEWS_AT_ONCE]
            positions = record.start + at + np.arange(len(part))
            compare_views(cache, transfer_set, record.split, record.draw, positions, part)

    return _refusal(check)


def _refusal(check: Callable[[], object]) -> str:
    try:
        check()
    except CacheError as refusal:
        return str(refusal)
    return "good"


def _damaged(verdicts: Findings) -> Findings:
    return {path: verdict for path, verdict in verdicts.items() if verdict != "good"}


def _print_report(
    name: str,
    cache: Cache,
    verdicts: Findings,
    asked: ReproducibilityReport | None,
    config: CheckConfig,
    console: Console,
) -> None:
    manifest, bad = cache.manifest, _damaged(verdicts)
    if config.json:
        record: dict[str, Any] = {"cache": name, "fingerprint": manifest.fingerprint, "manifest": manifest.digest}
        console.print_json(json.dumps(record | {"shards": verdicts, "teacher": asked and asked.to_json()}))
    else:
        for path, verdict in verdicts.items():
            console.print(f"{path}: {make_printable(verdict, 2000)}")
        for path in cache.unlisted_files:
            unfinished = "of an addition that is not finished: run the same teacher-cache command again"
            console.print(f"{make_printable(path)}: {unfinished}")
    if bad:
        first = next(iter(bad.values()))
        raise CacheError(
            f"'{name}': {len(bad)} of {len(verdicts)} files are bad. The first: {first}{_suggest_repair(config)}"
        )
    deep = ", every view rendered again and equal" if config.deep else ""
    console.print(
        f"'{name}' is whole: {len(verdicts)} files, {manifest.bytes / 1e6:.1f} MB, {manifest.draws} draws{deep}"
    )
    if asked:
        console.print(asked.describe())
        asked.raise_if_different()


def _suggest_repair(config: CheckConfig) -> str:
    return "" if config.repair else ". --repair --weights … asks the teacher again for damaged ones alone"
