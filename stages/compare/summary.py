"""What `softcache compare` prints below its table: in what students differ, by how much, and whether that is real."""

from collections.abc import Sequence
from typing import Any

from softcache.stages.cli.console import Console

from .candidates import Candidate, OptionDifference, find_differing_options, format_value, only_seeds_differ
from .significance import ALPHA, SIGNIFICANT, Record

_FIGURES = {"accuracy": "accuracy", "f1_macro": "macro F1"}


def print_pair(first: Candidate, second: Candidate, record: Record, console: Console) -> None:
    """Two in full: their settings side by side, the figures a line each, the verdict."""
    console.print()
    _print_options(first, second, console)
    if record["verdict"] is None:
        return console.print(f"no verdict: {record['words']}")
    seeds = " and ".join(map(str, dict.fromkeys(record["seeds"])))
    each = f"{seeds} seed{'s' * (seeds != '1')}{' each' * (' ' not in seeds)}"
    title = f"difference: {second.name} less {first.name}, {record['split']} split"
    console.print(f"{title}, {record['rows']:,} rows, {each}:")
    for key, name in _FIGURES.items():
        value, low, high = _format_points(record[key])
        console.print(f"  {name:<9} {value} points, {100 * record['level']:.4g} % interval {low} to {high}")
    tests = record["mcnemar"]
    if len(tests) == 1:
        alone = f"right in one alone: {tests[0]['first_alone']:,} and {tests[0]['second_alone']:,} rows"
        console.print(f"  McNemar   {alone}, p = {tests[0]['p']:.2g}")
    else:
        by_seed = ", ".join(f"{test['p']:.2g} (seeds {test['seeds'][0]}, {test['seeds'][1]})" for test in tests)
        alone = ": each of two students alone, it decides nothing" if record["about"] == "settings" else ""
        console.print(f"  McNemar   p = {by_seed}{alone}")
    console.print(record["words"])


def _print_options(first: Candidate, second: Candidate, console: Console) -> None:
    apart = find_differing_options(first, second)
    rows = [
        ("", first.name, second.name),
        *((format_value(name), format_value(one), format_value(other)) for name, one, other in apart),
    ]
    if not apart:
        return console.print("They differ in no setting.")
    if only_seeds_differ(apart):
        console.print("They differ in nothing but seeds:")
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, one, other in rows:
        console.print(f"  {name:{widths[0]}}  {one:{widths[1]}}  {other}")


def print_pairs(pairs: Sequence[tuple[Candidate, Candidate]], records: Sequence[Record], console: Console) -> None:
    """Each against the first, in two lines: figures and verdict, and in what it differs."""
    console.print()
    n, width = len(pairs), max(len(second.name) for _, second in pairs)
    level = f"{100 * (1 - ALPHA / n):.4g} % intervals: {100 * (1 - ALPHA):g} % for all {n} together (Bonferroni)"
    console.print(f"Each less {pairs[0][0].name}, in points; {level}")
    for (first, second), record in zip(pairs, records, strict=True):
        apart = find_differing_options(first, second)
        console.print(f"  {second.name:{width}}  {_format_comparison(record)}")
        console.print(f"  {'':{width}}    {_format_differences(apart)}")
    if any(record["verdict"] == SIGNIFICANT and record["about"] == "students" for record in records):
        console.print(
            "One seed: real is said of the trained students, not yet of their settings: two seeds of the same settings"
            " are often told apart like this; --seeds 3 tells"
        )
    elif any(record["verdict"] and record["about"] == "students" for record in records):
        console.print(
            "One seed: that is of these trained students; another seed could give another answer; --seeds 3 tells"
        )


def _format_comparison(record: Record) -> str:
    if record["verdict"] is None:
        return f"no verdict: {record['words']}"
    figures = ["{} {} ({} to {})".format(name, *_format_points(record[key])) for key, name in _FIGURES.items()]
    p = f", McNemar's p {record['mcnemar'][0]['p']:.2g}" if len(record["mcnemar"]) == 1 else ""
    return f"{', '.join(figures)}{p}: {record['verdict']}"


def _format_differences(apart: Sequence[OptionDifference]) -> str:
    if not apart:
        return "differs in no setting"
    changes = ", ".join(
        f"{format_value(name)} {format_value(one)} → {format_value(other)}" for name, one, other in apart
    )
    return f"differs in {'nothing but ' * only_seeds_differ(apart)}{changes}"


def _format_points(difference: dict[str, Any]) -> tuple[str, str, str]:
    """value, low and high as points with a sign."""
    value, low, high = (f"{round(100 * difference[key], 2) + 0.0:+.2f}" for key in ("value", "low", "high"))
    return value, low, high
