"""`stages compare`: finished runs of students side by side."""

import json
from pathlib import Path
from typing import Any

from data.errors import Refused, printable

from .console import Console
from .runs import read_json
from .settings import ListSettings
from .table import cell

_COLUMNS = {"accuracy": "accuracy", "f1_macro": "macro F1", "recall_tail": "tail recall", "agreement": "agreement"}


def run(names: tuple[str, ...], settings: ListSettings) -> None:
    """A line for each run, and one for each teacher and baseline among them; on the test split, else validation."""
    console = Console(settings.json)
    rows = [row for name in names for row in _rows(name)]
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]  # one teacher of many students
    if settings.json:
        return console.result(json.dumps(rows))
    title = " and ".join(sorted({row["split"] for row in rows})) + " split"
    width = max(len(title), *(len(row["name"]) for row in rows))
    console.say(f"{title:{width}}" + "".join(f"{title:>17}" for title in _COLUMNS.values()) + f"{'seeds':>7}")
    for row in rows:
        shown = [cell(row["mean"][key], row["spread"].get(key), row["seeds"], "n/a") for key in _COLUMNS]
        cells = "".join(f"{text:>17}" for text in shown)
        console.say(f"{row['name']:<{width}}{cells}{row['seeds'] or '':>7}")


def _rows(name: str) -> list[dict[str, Any]]:
    """The teacher, the baseline where there is one, and the student of a run."""
    result = read_json(Path(name) / "result.json")
    try:
        split, seeds = "test" if "test" in result["student"] else "val", len(result["seeds"])
        mapped = (result["settings"]["combine"], result["settings"]["map"])
        teacher = printable(f"teacher {result['teacher']['arch']}" + "".join(f", {how}" for how in mapped if how))
        rows = [_row(teacher, split, 0, result["teacher"][split], {})]
        for model in ("baseline", "student"):
            if model in result:
                title = f"{name}, hard targets only" if model == "baseline" else name
                rows.append(_row(title, split, seeds, result[model][split], result["spread"][model][split]))
        return rows
    except (KeyError, TypeError, AttributeError):
        raise Refused(f"'{name}/result.json' is not of a student's run") from None


def _row(name: str, split: str, seeds: int, mean: dict[str, Any], spread: dict[str, Any]) -> dict[str, Any]:
    """Raises TypeError for figures that are no numbers."""
    shown = {key: mean.get(key) for key in _COLUMNS}
    around = {key: spread.get(key) for key in shown} if spread else {}
    if not all(value is None or isinstance(value, int | float) for value in (*shown.values(), *around.values())):
        raise TypeError("no numbers")
    return {"name": name, "split": split, "seeds": seeds, "mean": shown, "spread": around}
