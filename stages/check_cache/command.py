"""`softcache check-cache`: verify every byte of a cache; with --deep every view, and the teacher's outputs, too."""

import json
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.data.content_index import open_index
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import Findings, check_files, select_damage
from softcache.pipeline.cache.writer import clean_up
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.cli.copied_commands import format_head_command, format_repair_command
from softcache.stages.runs.data import load_cache_data
from softcache.stages.teacher_cache.reproducibility import (
    ReproducibilityReport,
    check_reproducibility,
    make_target_generator,
)
from softcache.stages.teacher_cache.teachers.file_teachers import get_file

from .repair import repair


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
    if get_file(config) and not (config.deep or config.repair):
        raise UsageError(f"--{'weights' if config.weights else 'teacher'} is for --deep or --repair")
    cache = CacheReader(Path(name))
    if get_file(config) and "head" in cache.manifest.identity["teacher"]:
        raise UsageError(
            f"--{'weights' if config.weights else 'teacher'} cannot be compared with '{name}', whose logits a head"
            " computed from a cache of embeddings: check that one"
        )
    transfer_set = None
    if config.deep or config.repair:
        index = open_index(config.index, config.rehash)
        transfer_set = load_cache_data(cache, config.data, Path(config.data_root), index)
        for line in index.notes:
            console.note(line)
    if config.repair and transfer_set is not None:
        repair(cache, select_damage(check_files(cache, None, progress)), transfer_set, config, console)
        clean_up(cache.folder)
        cache = CacheReader(Path(name))
        cache.check_transfer_set(transfer_set)
    findings = check_files(cache, transfer_set if config.deep else None, progress)
    report = None
    if config.deep and get_file(config) and transfer_set is not None and not select_damage(findings):
        report = check_reproducibility(cache, make_target_generator(cache, transfer_set, config))
    _print_report(name, cache, findings, report, config, console)


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
    manifest, bad = cache.manifest, select_damage(findings)
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
        if "head" in manifest.identity["teacher"]:
            advice = f". Remove them and manifest.json, then  {format_head_command(cache, config.data)}"
        elif not config.repair:
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
