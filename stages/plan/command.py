"""`softcache plan`: what a cache will take, before anything is written."""

import json
from dataclasses import asdict
from typing import Any

from softcache.pipeline.cache.manifest import MAX_SHARDS
from softcache.stages.cli.configs import PlanConfig
from softcache.stages.cli.console import Console, format_duration

from .budget import Choice, find_smallest, list_choices
from .estimate import Estimate, estimate
from .quantities import format_bytes, parse_bytes
from .subject import Subject, read_subject

_SHOWN = 8  # choices within a budget


def run(config: PlanConfig) -> None:
    """Print what the cache of these options takes, and what of it fits a budget.

    Raises:
        UsageError: An option does not exist, or does not fit the data or the teacher.
        CacheError: A file of the data or of the weights is damaged.
    """
    console = Console(config.json)
    budget = parse_bytes(config.budget) if config.budget else 0
    subject = read_subject(config, console)
    estimated = estimate(subject, config)
    choices = list_choices(subject, budget) if budget else []
    if config.json:
        record: dict[str, Any] = {
            "settings": asdict(config),
            "data": subject.data,
            "teacher": subject.arch,
            "splits": subject.splits,
            "classes": subject.classes,
            "draws": subject.config.draws,
            "codec": subject.config.codec,
            "taps": subject.taps,
            "views_per_second": subject.rate,
            **estimated.to_json(),
            "budget": [asdict(choice) for choice in choices] if budget else None,
        }
        return console.print_json(json.dumps(record))
    _print_subject(subject, console)
    _print_estimate(subject, estimated, config, console)
    if budget:
        _print_choices(choices, subject, config, console)


def _print_subject(subject: Subject, console: Console) -> None:
    rows = ", ".join(f"{split} {count:,}" for split, count in subject.splits.items())
    taps = ", ".join(f"{tap} {'x'.join(map(str, shape)) or '1'}" for tap, shape in subject.taps.items())
    console.print(f"data:    {subject.data}: {rows} rows, {subject.classes:,} classes")
    console.print(f"teacher: {subject.arch}, {_format_rate(subject.rate)} views a second, {subject.rate_source}")
    if taps:
        console.print(f"taps:    {taps}")


def _print_estimate(subject: Subject, estimated: Estimate, config: PlanConfig, console: Console) -> None:
    size, options = estimated.size, subject.config
    draws = f"{options.draws} draw{'s' if options.draws > 1 else ''}"
    console.print(f"row:     {size.row_bytes:,} bytes, logits in {options.codec}")
    of_view = f"{size.bytes / size.rows:,.1f} bytes a view"
    console.print(f"cache:   {format_bytes(size.bytes)} in {draws}: {size.rows:,} rows, {of_view}")
    console.print(
        f"files:   {size.files:,}: {size.shards:,} shards of up to {size.shard_rows:,} rows,"
        f" {format_bytes(size.shard_bytes)}; manifest {format_bytes(size.manifest_bytes)}"
    )
    if estimated.shard_rows:
        advice = f"add --shard-rows {estimated.shard_rows}"
        console.print(f"         a manifest lists {MAX_SHARDS:,} shards at most: {advice}")
    elif not estimated.can_be_listed:
        console.print(
            f"         a manifest lists {MAX_SHARDS:,} shards of 4 GiB at most: take fewer draws or taps, a smaller"
            " codec, or several caches"
        )
    ranks = f"; {config.ranks:,} ranks {format_duration(estimated.rank_seconds)} each" if config.ranks > 1 else ""
    console.print(f"stage 1: {format_duration(estimated.seconds)}{ranks}")
    writer, reader = format_bytes(estimated.writer_memory), format_bytes(estimated.reader_memory)
    console.print(
        f"memory:  up to {writer} in stage one beside PyTorch, data and teacher; {reader} of the cache in a student's"
        " process"
    )
    pace = f"{format_bytes(estimated.read_rate)} a second at {_format_rate(config.student_rate)} views a second"
    console.print(f"student: reads {pace}, {estimated.read_bytes:,} bytes a view")
    students = f"{config.students:,} student{'s' if config.students > 1 else ''}"
    of_each = " of each" if config.students > 1 else ""
    if estimated.paid_epochs <= config.epochs:
        paid = f"the cache is paid for after {estimated.paid_epochs:,} epochs{of_each}"
    else:
        paid = f"less than the cache, which takes {estimated.paid_epochs:,} epochs{of_each} to pay for"
    console.print(
        f"instead: the teacher in the loop of {students} would take {format_duration(estimated.live_seconds)} in"
        f" {config.epochs:,} epochs; {paid}"
    )


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _print_choices(choices: list[Choice], subject: Subject, config: PlanConfig, console: Console) -> None:
    """Print what fits the budget, or what the smallest cache takes."""
    if not choices:
        smallest = find_smallest(subject)
        return console.print(
            f"budget:  nothing fits {config.budget}: {smallest.codec} with 1 draw and no taps takes"
            f" {format_bytes(smallest.bytes)}; take fewer rows, or a larger --budget"
        )
    console.print(f"budget:  {config.budget}; best first: most taps, then most draws, then the finest codec")
    for choice in choices[:_SHOWN]:
        taps = f"--taps {','.join(choice.taps)}" if choice.taps else "no taps" if subject.taps else ""
        words = f"--codec {choice.codec:8} --draws {choice.draws:<6}"
        console.print(f"         {format_bytes(choice.bytes):>9}  {words} {taps}".rstrip())
