"""The sentences at the top of a report: the best student beside its teacher and baseline, and what the cache saved."""

from collections.abc import Sequence

from softcache.base.errors import make_printable
from softcache.data.tasks import CLASSES
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER, TASK_FIGURES
from softcache.stages.cli.console import format_duration
from softcache.stages.compare.baseline import compare_with_baseline, format_gap
from softcache.stages.compare.significance import format_interval
from softcache.stages.runs.figures import IN_PERCENT, TITLES

from .load import LoadedRun
from .table import Group, Row


def format_summary(group: Group, rows: Sequence[Row]) -> list[str]:
    """Summarise a group of runs, a sentence or two in each line.

    Args:
        group: The runs.
        rows: Their table, see `table.make_table_rows`.
    """
    count = "1 run" if len(group.runs) == 1 else f"{len(group.runs)} runs"
    lines = [f"{count} on {group.title}, measured on the {group.rows:,} {group.split} images."]
    main = TASK_FIGURES[group.task].main
    students = [row for row in rows if row.kind == "student" and row.metrics[main].value is not None]
    finished = [row for row in students if not row.note]
    if finished:
        sign = -1 if main in LOWER_IS_BETTER else 1
        best = max(finished, key=lambda row: sign * (row.metrics[main].value or 0))
        lines.append(f"The best student is {best.name} ({best.arch}): {_format_main(main, best.metrics[main].text)}.")
        best_run = next(run for run in group.runs if make_printable(run.name) == best.name)
        lines += _compare_best(best_run, group.split)
    if group.task == CLASSES:
        lines += _describe_smallest(finished, rows)
    saved = sum(run.result["bill"]["saved"] or 0 for run in group.runs if run.result)
    if saved:
        lines.append(
            f"Compared with a teacher in the training loop, the cache saved {format_duration(saved)} of teacher time."
        )
    lines += [f"{run.name} is {run.state}." for run in group.runs if not run.result]
    return lines


def _format_main(main: str, text: str) -> str:
    """Format a main figure: "97.50 % accuracy", "RMSE 12.3 (lower is better)"."""
    if main in IN_PERCENT:
        return f"{text} % {TITLES[main]}"
    return f"{TITLES[main]} {text}" + (" (lower is better)" if main in LOWER_IS_BETTER else "")


def _compare_best(run: LoadedRun, split: str) -> list[str]:
    """Compare the best student with its teacher and its baseline."""
    main = TASK_FIGURES[run.task].main
    student, teacher = run.get_metrics("student", split), run.get_metrics("teacher", split)
    if not student or not teacher or student.get(main) is None or teacher.get(main) is None:
        return []
    lines = []
    if run.result:
        gap = format_gap(student[main] - teacher[main], main)
        arch = make_printable(run.result["teacher"]["arch"])
        lines.append(f"Its {TITLES[main]} is {gap} that of its teacher {arch}.")
    baseline = run.get_metrics("baseline", split)
    if baseline and baseline.get(main) is not None:
        gap = format_gap(student[main] - baseline[main], main)
        verdict = _format_verdict(run)
        lines.append(f"It is {gap} that of the same network trained from hard targets alone{verdict}.")
    return lines


def _format_verdict(run: LoadedRun) -> str:
    """Format whether student and baseline differ significantly, as `compare` computes it; empty without a verdict."""
    record = compare_with_baseline(run.name, run.result or {})
    if record["verdict"] is None:
        return ""
    interval, verdict = format_interval(record)
    return f" ({interval}: {verdict})"


def _describe_smallest(students: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Name the smallest student within a point of the best teacher, where there are several students."""
    accuracies = [row.metrics["accuracy"].value for row in rows if row.kind == "teacher"]
    teacher = max((value for value in accuracies if value is not None), default=None)
    if len(students) < 2 or teacher is None:
        return []
    near = [row for row in students if (row.metrics["accuracy"].value or 0) >= teacher - 0.01]
    if not near:
        return []
    smallest = min(near, key=lambda row: row.parameters or 0)
    return [
        f"The smallest student within a point of the best teacher is {smallest.name}:"
        f" {smallest.parameters:,} parameters."
    ]
