"""The results of a search: a line for each trial, the table of the best, tune.json, and the command of the best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softcache.base.files import publish_json
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER, TASK_FIGURES
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.runs.environment import describe_machine, library_versions, select_device

from .space import SearchedOption, apply_values
from .study import FrozenTrial, TrialState

_ROWS_SHOWN = 10
Row = dict[str, Any]


def validation_figure(config: StudentConfig, task: str) -> str:
    """Return the figure of the validation split by which trials are compared: --select, or the task's main one."""
    return TASK_FIGURES[task].main if config.select == "last" else config.select


def make_rows(trials: dict[int, FrozenTrial], space: Sequence[SearchedOption]) -> list[Row]:
    """Make a row for each trial, as tune.json holds them.

    Args:
        trials: {slot: trial}.
        space: what was searched.

    Returns:
        trial: its slot; state: complete, pruned, failed or running; parameters; value: the figure of a complete one;
        epochs: how many were reported; last: the figure of the last of them; seconds; failed: why, for a failed one.
    """
    return [_make_row(slot, trial, space) for slot, trial in trials.items()]


def _make_row(slot: int, trial: FrozenTrial, space: Sequence[SearchedOption]) -> Row:
    attributes = trial.user_attrs
    # A failed trial is stored as pruned, which the sampler takes for worse than any complete one.
    has_failed = "failed" in attributes and trial.state == TrialState.PRUNED
    row = {
        "trial": slot,
        "state": "failed" if has_failed else trial.state.name.lower(),
        "parameters": {option.name: option.round_to_point(trial.params[option.name]) for option in space},
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "epochs": len(trial.intermediate_values),
        "last": trial.intermediate_values.get(trial.last_step) if trial.last_step else None,
        "seconds": attributes.get("seconds"),
    }
    if has_failed:
        row["failed"] = attributes["failed"]
    return row


def rank_rows(rows: Sequence[Row], figure: str) -> list[Row]:
    """Return the complete trials, the best first; of equal ones the earlier comes first."""
    sign = 1 if figure in LOWER_IS_BETTER else -1
    return sorted((row for row in rows if row["state"] == "complete"), key=lambda r: (sign * r["value"], r["trial"]))


def find_best(rows: Sequence[Row], figure: str) -> Row | None:
    """Return the best trial, None while none is complete."""
    return next(iter(rank_rows(rows, figure)), None)


def format_row(row: Row, rows: Sequence[Row], slots: int, figure: str) -> str:
    """Format the line that is printed when a trial has ended.

    Args:
        row: the trial.
        rows: all trials so far.
        slots: number of trials of the search.
        figure: by which trials are compared.
    """
    best, ended = find_best(rows, figure), sum(row["state"] != "running" for row in rows)
    parameters = " ".join(f"{name}={_format_value(value)}" for name, value in row["parameters"].items())
    best_text = f"; best {best['value']:.4f}, trial {best['trial']}" if best else ""
    return f"trial {row['trial']} ({ended} of {slots}): {parameters}: {_format_outcome(row, figure)}{best_text}"


def _format_outcome(row: Row, figure: str) -> str:
    if row["state"] == "pruned":
        return f"pruned after epoch {row['epochs']} at {figure} {row['last']:.4f}"
    return f"{figure} {row['value']:.4f}" if row["value"] is not None else f"{row['state']}: {row.get('failed', '')}"


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(
    folder: Path,
    rows: list[Row],
    base_config: StudentConfig,
    space: Sequence[SearchedOption],
    settings: dict[str, Any],
    figure: str,
) -> dict[str, Any]:
    """Write tune.json, and tune.png where matplotlib is installed.

    Args:
        folder: the folder of the search.
        rows: all trials.
        base_config: the options of a student, except for those that were searched.
        space: what was searched.
        settings: those of the search. The URL of the storage is not among them: it may hold a password.
        figure: by which trials are compared.

    Returns:
        The content of tune.json.
    """
    best = find_best(rows, figure)
    record: dict[str, Any] = {
        "settings": settings,
        "figure": f"val {figure}",
        "best": None,
        "trials": rows,
        "picture": _draw_plot(folder / "tune.png", rows, space, figure),
        "versions": library_versions(),
        "machine": describe_machine(select_device(base_config.device)),
    }
    if best:
        best_config = apply_values(base_config, space, best["parameters"])
        command = format_command("student", best_config, out="", json=False, resume=False)
        record["best"] = {**best, "command": command}
    publish_json(folder / "tune.json", record)
    return record


def _draw_plot(path: Path, rows: list[Row], space: Sequence[SearchedOption], figure: str) -> str | None:
    try:
        from softcache.stages.cli.plot_style import save_png

        from .plots import plot_search
    except ImportError:
        return None
    save_png(path, plot_search(rows, space, figure))
    return str(path)


def print_rows(
    record: dict[str, Any], figure: str, space: Sequence[SearchedOption], folder: Path, console: Console
) -> None:
    """Print the table of the best trials, how many ended in which way, and the command that trains the best again.

    Args:
        record: the content of tune.json.
        figure: by which trials are compared.
        space: what was searched.
        folder: the folder of the search.
        console: where to print.
    """
    rows, best = record["trials"], record["best"]
    names = [option.name for option in space]
    table = [["trial", f"val {figure}", "seconds", *names]]
    for row in rank_rows(rows, figure)[:_ROWS_SHOWN]:
        values = [_format_value(row["parameters"][name]) for name in names]
        table.append([str(row["trial"]), f"{row['value']:.4f}", f"{row['seconds'] or 0:.1f}", *values])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    console.print()
    for line in table:
        console.print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    states = [row["state"] for row in rows]
    seconds = format_duration(sum(row["seconds"] or 0 for row in rows))
    console.print(
        f"{len(rows)} trials in {seconds} of training: {states.count('complete')} complete,"
        f" {states.count('pruned')} pruned, {states.count('failed')} failed"
    )
    for row in rows:
        if row["state"] == "failed":
            console.print(f"trial {row['trial']} failed: {row['failed']}")
    if not record["picture"]:
        console.print("no image without matplotlib: pip install -e '.[report]', and the same command draws it")
    console.print(f"run:   {folder}/tune.json{', tune.png' if record['picture'] else ''}")
    if best is None:
        return console.print("No trial was completed: search other values, such as a lower learning_rate")
    selection = "selected on the validation split; its test figures were not used"
    console.print(f"best:  {folder}/trial-{best['trial']:04d}, {selection}")
    console.print(f"again: {best['command']}")
