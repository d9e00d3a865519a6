"""What a search has found: a line for each trial, the table, tune.json, and the command of the best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softcache.base.files import publish_json
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.runs.environment import describe_machine, library_versions, select_device

from .space import SearchedOption, apply_values
from .study import FrozenTrial, TrialState

_SHOWN = 10
Row = dict[str, Any]


def validation_figure(config: StudentConfig) -> str:
    """By which figure of the validation split trials are compared."""
    return "accuracy" if config.select == "last" else config.select


def make_rows(holders: dict[int, FrozenTrial], space: Sequence[SearchedOption]) -> list[Row]:
    """A record of each trial. state: complete, pruned, failed (with why) or running; value: of validation."""
    return [_row(slot, trial, space) for slot, trial in holders.items()]


def _row(slot: int, trial: FrozenTrial, space: Sequence[SearchedOption]) -> Row:
    attributes = trial.user_attrs
    failed = "failed" in attributes and trial.state == TrialState.PRUNED  # to the sampler the worst there is
    row = {
        "trial": slot,
        "state": "failed" if failed else trial.state.name.lower(),
        "parameters": {one.name: one.decimal(trial.params[one.name]) for one in space},
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "epochs": len(trial.intermediate_values),
        "last": trial.intermediate_values.get(trial.last_step) if trial.last_step else None,
        "seconds": attributes.get("seconds"),
    }
    return row | ({"failed": attributes["failed"]} if failed else {})


def rank_rows(rows: Sequence[Row], figure: str) -> list[Row]:
    """The trials that came to their end, best first; of equals the earlier."""
    sign = 1 if figure == "nll" else -1
    return sorted((row for row in rows if row["state"] == "complete"), key=lambda r: (sign * r["value"], r["trial"]))


def find_best(rows: Sequence[Row], figure: str) -> Row | None:
    """The best trial, None while none has come to its end."""
    return next(iter(rank_rows(rows, figure)), None)


def format_row(row: Row, rows: Sequence[Row], slots: int, figure: str) -> str:
    """What is said of a trial when it is over."""
    best, done = find_best(rows, figure), sum(row["state"] != "running" for row in rows)
    parameters = " ".join(f"{name}={_short(value)}" for name, value in row["parameters"].items())
    so_far = f"; best {best['value']:.4f}, trial {best['trial']}" if best else ""
    return f"trial {row['trial']} ({done} of {slots}): {parameters}: {_outcome(row, figure)}{so_far}"


def _outcome(row: Row, figure: str) -> str:
    if row["state"] == "pruned":
        return f"pruned after epoch {row['epochs']} at {figure} {row['last']:.4f}"
    return f"{figure} {row['value']:.4f}" if row["value"] is not None else f"{row['state']}: {row.get('failed', '')}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(
    folder: Path, rows: list[Row], first: StudentConfig, space: Sequence[SearchedOption], begun: dict[str, Any]
) -> dict[str, Any]:
    """tune.json and the image; the record. (The storage's URL, which may hold a password, is in neither.)"""
    figure = validation_figure(first)
    best = find_best(rows, figure)
    record: dict[str, Any] = {
        "settings": begun,
        "figure": f"val {figure}",
        "best": None,
        "trials": rows,
        "picture": _draw_plot(folder / "tune.png", rows, space, figure),
        "versions": library_versions(),
        "machine": describe_machine(select_device(first.device)),
    }
    if best:
        own = apply_values(first, space, best["parameters"])
        record["best"] = {**best, "command": format_command("student", own, out="", json=False, resume=False)}
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
    """The table of the best trials, how the others ended, and how to have the best again."""
    rows, best = record["trials"], record["best"]
    top = rank_rows(rows, figure)[:_SHOWN]
    names = [one.name for one in space]
    table = [["trial", f"val {figure}", "seconds", *names]]
    for row in top:
        values = [_short(row["parameters"][name]) for name in names]
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
        console.print("no image without matplotlib: pip install 'softcache[report]', and the same command draws it")
    console.print(f"run:   {folder}/tune.json{', tune.png' if record['picture'] else ''}")
    if best is None:
        return console.print("No trial came to its end: search elsewhere, such as a lower learning_rate")
    chosen = "chosen on validation; its test figures were not looked at"
    console.print(f"best:  {folder}/trial-{best['trial']:04d}, {chosen}")
    console.print(f"again: {best['command']}")
