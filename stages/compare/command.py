"""`softcache compare`: finished runs of students in one table, and whether they differ significantly."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.data.tasks import CLASSES
from softcache.pipeline.metrics.significance import RESAMPLES
from softcache.stages.cli.configs import ListConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.runs.figures import TITLES, Figures, choose_split, get_task, list_columns
from softcache.stages.runs.folder import read_json
from softcache.stages.runs.results_table import format_cell

from .candidates import Candidate, find_differing_options, pair_candidates, read_candidate
from .significance import compare_pairs
from .summary import print_pair, print_pairs

_CLASS_COLUMNS = ("accuracy", "f1_macro", "recall_tail", "agreement")
Row = dict[str, Any]


def run(names: tuple[str, ...], config: ListConfig) -> None:
    """Print a table of runs, and compare each run's student with that of the first run.

    The table has a line for each student, and for each teacher and baseline among the runs, measured on the test
    split, or on validation where a run has no test split. Of a single run, the student is compared with its baseline.

    Args:
        names: Folders of the runs.
        config: Options of the command.

    Raises:
        UsageError: A folder is not a run, or the runs are of several tasks.
        CacheError: A run is damaged, or is not a student's.
    """
    console = Console(config.json)
    runs = [_read_run(name) for name in dict.fromkeys(str(Path(name)) for name in names)]
    rows: list[Row] = []
    _check_same_task([candidates["student"] for _, candidates in runs])
    for run_rows, _ in runs:
        rows += [row for row in run_rows if row not in rows]  # several students can have the same teacher
    pairs = pair_candidates([candidates for _, candidates in runs])
    with progress_bar(RESAMPLES * len(pairs), "resamples", "", scale=True) as bar:
        comparisons = compare_pairs(pairs, bar.update) if pairs else []
    if config.json:
        differences = [
            {
                "first": first.name,
                "second": second.name,
                "setting": difference.name,
                "values": [difference.first, difference.second],
            }
            for first, second in pairs
            for difference in find_differing_options(first, second)
        ]
        return console.print_json(json.dumps({"rows": rows, "differences": differences, "comparisons": comparisons}))
    _print_table(rows, console)
    if len(pairs) == 1:
        print_pair(*pairs[0], comparisons[0], console)
    elif pairs:
        print_pairs(pairs, comparisons, console)


def _check_same_task(students: Sequence[Candidate]) -> None:
    for student in students:
        if student.task != students[0].task:
            raise UsageError(
                f"'{students[0].name}' is of the task {students[0].task}, '{student.name}' of {student.task}, and they"
                " have no figure in common: compare runs of one task"
            )


def _print_table(rows: Sequence[Row], console: Console) -> None:
    title = " and ".join(sorted({row["split"] for row in rows})) + " split"
    width = max(len(title), *(len(row["name"]) for row in rows))
    columns = list(rows[0]["mean"])
    console.print(f"{title:{width}}" + "".join(f"{TITLES[column]:>17}" for column in columns) + f"{'seeds':>7}")
    for row in rows:
        cells = [format_cell(row["mean"][key], row["spread"].get(key), row["seeds"], "n/a") for key in columns]
        console.print(f"{row['name']:<{width}}{''.join(f'{cell:>17}' for cell in cells)}{row['seeds'] or '':>7}")


def _read_run(name: str) -> tuple[list[Row], dict[str, Candidate]]:
    """Read the rows of a run's teacher, baseline and student, and {"baseline": …, "student": …} as candidates.

    The baseline is left out where the run has none. Raises CacheError for what is not the result of a student's run.
    """
    result = read_json(Path(name) / "result.json")
    try:
        columns = _list_columns(result)
        split, seeds = "test" if "test" in result["student"] else "val", len(result["seeds"])
        options = "".join(
            f", {value}" for value in (result["settings"]["combine"], result["settings"]["map"]) if value
        )
        teacher = make_printable(f"teacher {result['teacher']['arch']}{options}")
        rows = [_make_row(teacher, split, columns, seeds=0, mean=result["teacher"][split], spread={})]
        candidates: dict[str, Candidate] = {}
        for model in ("baseline", "student"):
            if model in result:
                title = f"{name}, hard targets only" if model == "baseline" else name
                spread = result["spread"][model][split]
                rows.append(_make_row(title, split, columns, seeds=seeds, mean=result[model][split], spread=spread))
                candidates[model] = read_candidate(name, title, result, model)
        return rows, candidates
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise CacheError(f"'{name}/result.json' is not of a student's run") from None


def _list_columns(result: dict[str, Any]) -> tuple[str, ...]:
    """List the figures of the table. Raises KeyError for a task that does not exist."""
    task = get_task(result)
    if task == CLASSES:
        return _CLASS_COLUMNS
    split = choose_split(result["teacher"])
    return list_columns(task, Figures(result["teacher"][split]).has_labels())


def _find_figure(figures: dict[str, Any], name: str) -> Any:
    """Return a figure, not checked; `at_thresholds.f1_macro` is the one within another."""
    value: Any = figures
    for key in name.split("."):
        value = value.get(key) if value is not None else None
    return value


def _make_row(
    name: str, split: str, columns: Sequence[str], *, seeds: int, mean: dict[str, Any], spread: dict[str, Any]
) -> Row:
    """Make a row of the table. Raises TypeError for metrics that are not numbers."""
    means = {key: _find_figure(mean, key) for key in columns}
    spreads = {key: _find_figure(spread, key) for key in columns} if spread else {}
    if not all(value is None or isinstance(value, int | float) for value in (*means.values(), *spreads.values())):
        raise TypeError("the metrics are not numbers")
    return {"name": name, "split": split, "seeds": seeds, "mean": means, "spread": spreads}
