"""What `softcache compare` prints below its table: the differing options, the differences, and their verdicts."""

from collections.abc import Sequence
from typing import Any

from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER, TASK_FIGURES
from softcache.stages.cli.console import Console
from softcache.stages.runs.figures import IN_PERCENT, TITLES

from .candidates import Candidate, OptionDifference, find_differing_options, format_value, only_seeds_differ
from .significance import ALPHA, SIGNIFICANT, VERDICT_TEXT, Record, format_difference, get_figures


def print_pair(first: Candidate, second: Candidate, record: Record, console: Console) -> None:
    """Print one comparison in full: the differing options side by side, a line for each metric, the verdict.

    Args:
        first: The candidate that is subtracted.
        second: The candidate from which it is subtracted.
        record: Of their comparison, see `significance.compare_pairs`.
        console: Where to print.
    """
    console.print()
    _print_options(first, second, console)
    if record["verdict"] is None:
        return console.print(f"no verdict: {record['words']}")
    title = f"difference: {second.name} minus {first.name}, {record['split']} split"
    console.print(f"{title}, {record['rows']:,} rows, {_format_seeds(*record['seeds'])}:")
    for key in get_figures(record):
        value, low, high = _format_interval(key, record[key])
        unit = " points" if key in IN_PERCENT else ""
        direction = "; lower is better" if key in LOWER_IS_BETTER else ""
        interval = f"{100 * record['level']:.4g} % interval {low} to {high}{direction}"
        console.print(f"  {TITLES[key]:<9} {value}{unit}, {interval}")
    tests = record.get("mcnemar", [])
    if len(tests) == 1:
        counts = f"right in only one of the two: {tests[0]['first_alone']:,} and {tests[0]['second_alone']:,} rows"
        console.print(f"  McNemar   {counts}, p = {tests[0]['p']:.2g}")
    elif tests:
        p_values = ", ".join(f"{test['p']:.2g} (seeds {test['seeds'][0]}, {test['seeds'][1]})" for test in tests)
        note = ": each of two single students, not part of the verdict" if record["about"] == "settings" else ""
        console.print(f"  McNemar   p = {p_values}{note}")
    console.print(record["words"])


def _format_seeds(first: int, second: int) -> str:
    """Format the numbers of seeds: `1 seed each`, `3 seeds each`, `3 and 1 seeds`."""
    if first != second:
        return f"{first} and {second} seeds"
    return "1 seed each" if first == 1 else f"{first} seeds each"


def _print_options(first: Candidate, second: Candidate, console: Console) -> None:
    differences = find_differing_options(first, second)
    if not differences:
        return console.print("They differ in no setting.")
    if only_seeds_differ(differences):
        console.print("They differ only in seeds:")
    rows = [("", first.name, second.name)]
    rows += [(format_value(name), format_value(a), format_value(b)) for name, a, b in differences]
    name_width, first_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, first_value, second_value in rows:
        console.print(f"  {name:{name_width}}  {first_value:{first_width}}  {second_value}")


def print_pairs(pairs: Sequence[tuple[Candidate, Candidate]], records: Sequence[Record], console: Console) -> None:
    """Print several comparisons with the first candidate, two lines each: metrics and verdict, and differing options.

    Args:
        pairs: The candidates; the first one is the same in all pairs.
        records: Of their comparisons, see `significance.compare_pairs`.
        console: Where to print.
    """
    console.print()
    n, width = len(pairs), max(len(second.name) for _, second in pairs)
    level = f"{100 * (1 - ALPHA / n):.4g} % intervals: {100 * (1 - ALPHA):g} % for all {n} together (Bonferroni)"
    main = TASK_FIGURES[pairs[0][0].task].main
    unit = ", in points" if main in IN_PERCENT else ", where lower is better" if main in LOWER_IS_BETTER else ""
    console.print(f"Each minus {pairs[0][0].name}{unit}; {level}")
    for (first, second), record in zip(pairs, records, strict=True):
        console.print(f"  {second.name:{width}}  {_format_comparison(record)}")
        console.print(f"  {'':{width}}    {_format_differences(find_differing_options(first, second))}")
    of_students = [record["verdict"] for record in records if record["verdict"] and record["about"] == "students"]
    if SIGNIFICANT in of_students:
        console.print(
            "With one seed, a significant difference is one between the trained students, not yet between their"
            " settings: two seeds of the same settings often differ significantly too; train with --seeds 3"
        )
    elif of_students:
        console.print(
            "With one seed, this holds for these trained students, and may not for other seeds; train with --seeds 3"
        )


def _format_comparison(record: Record) -> str:
    if record["verdict"] is None:
        return f"no verdict: {record['words']}"
    metrics = [
        "{} {} ({} to {})".format(TITLES[key], *_format_interval(key, record[key])) for key in get_figures(record)
    ]
    tests = record.get("mcnemar", [])
    p = f", McNemar's p {tests[0]['p']:.2g}" if len(tests) == 1 else ""
    return f"{', '.join(metrics)}{p}: {VERDICT_TEXT[record['verdict']]}"


def _format_differences(differences: Sequence[OptionDifference]) -> str:
    if not differences:
        return "differs in no setting"
    changes = ", ".join(f"{format_value(name)} {format_value(a)} → {format_value(b)}" for name, a, b in differences)
    return f"differs only in {changes}" if only_seeds_differ(differences) else f"differs in {changes}"


def _format_interval(name: str, difference: dict[str, Any]) -> tuple[str, str, str]:
    """Format value, low and high of a figure with their signs."""
    value, low, high = (format_difference(name, difference[key]) for key in ("value", "low", "high"))
    return value, low, high
