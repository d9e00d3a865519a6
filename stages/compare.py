"""`stages compare`: finished runs of students side by side."""

import json
from pathlib import Path
from typing import Any

from data.errors import Refused

from .console import Console
from .runs import read_json
from .settings import ListSettings

_COLUMNS = {"accuracy": "accuracy", "f1_macro": "macro F1", "recall_tail": "tail recall", "agreement": "agreement"}


def run(names: tuple[str, ...], settings: ListSettings) -> None:
    """A line for each run, and one for each teacher and baseline among them; on the test split, else validation."""
    console = Console(settings.json)
    rows = [row for name in names for row in _rows(name)]
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]  # one teacher of many students
    if settings.json:
        return console.result(json.dumps(rows))
    width = max(len(row["name"]) for row in rows)
    console.say(f"{'':{width}}" + "".join(f"{title:>17}" for title in _COLUMNS.values()) + f"{'seeds':>7}")
    for row in rows:
        cells = "".join(f"{_cell(row['mean'][key], row['spread'].get(key), row['seeds']):>17}" for key in _COLUMNS)
        console.say(f"{row['name']:<{width}}{cells}{row['seeds'] or '':>7}")


def _rows(name: str) -> list[dict[str, Any]]:
    """The teacher, the baseline where there is one, and the student of a run."""
    result = read_json(Path(name) / "result.json")
    try:
        split, seeds = "test" if "test" in result["student"] else "val", len(result["seeds"])
        mapped = result["settings"]["map"] or result["settings"]["combine"]
        teacher = f"teacher {result['teacher']['arch']}" + (f", {mapped}" if mapped else "")
        rows = [_row(teacher, 0, result["teacher"][split], {})]
        for model in ("baseline", "student"):
            if model in result:
                title = f"{name}, hard targets only" if model == "baseline" else name
                rows.append(_row(title, seeds, result[model][split], result["spread"][model][split]))
        return rows
    except (KeyError, TypeError, AttributeError):
        raise Refused(f"'{name}/result.json' is not of a student's run") from None


def _row(name: str, seeds: int, mean: dict[str, Any], spread: dict[str, Any]) -> dict[str, Any]:
    shown = {key: mean.get(key) for key in _COLUMNS}
    return {"name": name, "seeds": seeds, "mean": shown, "spread": {k: spread.get(k) for k in shown} if spread else {}}


def _cell(value: float | None, spread: float | None, seeds: int) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f} ± {spread:.4f}" if seeds > 1 and spread is not None else f"{value:.4f}"
