"""`softcache compare`: finished runs of students side by side, and whether they differ beyond chance."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, make_printable
from softcache.pipeline.metrics.significance import RESAMPLES
from softcache.stages.cli.configs import ListConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.runs.folder import read_json
from softcache.stages.runs.results_table import format_cell

from .candidates import Candidate, find_differing_options, pair_candidates, read_candidate
from .significance import compare_pairs
from .summary import print_pair, print_pairs

_COLUMNS = {"accuracy": "accuracy", "f1_macro": "macro F1", "recall_tail": "tail recall", "agreement": "agreement"}
Row = dict[str, Any]


def run(names: tuple[str, ...], config: ListConfig) -> None:
    """A line for each run, and one for each teacher and baseline among them; on the test split, else validation. Then
    each student against that of the first run; with one run, its student against its baseline."""
    console = Console(config.json)
    read = [_read(name) for name in dict.fromkeys(str(Path(name)) for name in names)]
    rows = [row for of_run, _ in read for row in of_run]
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]  # one teacher of many students
    pairs = pair_candidates([sides for _, sides in read])
    with progress_bar(RESAMPLES * len(pairs), "resamples", "", scale=True) as shown:
        comparisons = compare_pairs(pairs, shown.update) if pairs else []
    if config.json:
        differences = [_difference(*pair, *one) for pair in pairs for one in find_differing_options(*pair)]
        return console.print_json(json.dumps({"rows": rows, "differences": differences, "comparisons": comparisons}))
    _print_table(rows, console)
    if len(pairs) == 1:
        print_pair(*pairs[0], comparisons[0], console)
    elif pairs:
        print_pairs(pairs, comparisons, console)


def _difference(first: Candidate, second: Candidate, name: str, one: Any, other: Any) -> dict[str, Any]:
    return {"first": first.name, "second": second.name, "setting": name, "values": [one, other]}


def _print_table(rows: Sequence[Row], console: Console) -> None:
    title = " and ".join(sorted({row["split"] for row in rows})) + " split"
    width = max(len(title), *(len(row["name"]) for row in rows))
    console.print(f"{title:{width}}" + "".join(f"{title:>17}" for title in _COLUMNS.values()) + f"{'seeds':>7}")
    for row in rows:
        shown = [format_cell(row["mean"][key], row["spread"].get(key), row["seeds"], "n/a") for key in _COLUMNS]
        cells = "".join(f"{text:>17}" for text in shown)
        console.print(f"{row['name']:<{width}}{cells}{row['seeds'] or '':>7}")


def _read(name: str) -> tuple[list[Row], dict[str, Candidate]]:
    """Of a run the rows of teacher, baseline where there is one, and student; and the last two as sides."""
    result = read_json(Path(name) / "result.json")
    try:
        split, seeds = "test" if "test" in result["student"] else "val", len(result["seeds"])
        mapped = (result["settings"]["combine"], result["settings"]["map"])
        teacher = make_printable(f"teacher {result['teacher']['arch']}" + "".join(f", {how}" for how in mapped if how))
        rows = [_row(teacher, split, 0, result["teacher"][split], {})]
        sides: dict[str, Candidate] = {}
        for model in ("baseline", "student"):
            if model in result:
                title = f"{name}, hard targets only" if model == "baseline" else name
                rows.append(_row(title, split, seeds, result[model][split], result["spread"][model][split]))
                sides[model] = read_candidate(name, title, result, model)
        return rows, sides
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise CacheError(f"'{name}/result.json' is not of a student's run") from None


def _row(name: str, split: str, seeds: int, mean: dict[str, Any], spread: dict[str, Any]) -> Row:
    """Raises TypeError for figures that are no numbers."""
    shown = {key: mean.get(key) for key in _COLUMNS}
    around = {key: spread.get(key) for key in shown} if spread else {}
    if not all(value is None or isinstance(value, int | float) for value in (*shown.values(), *around.values())):
        raise TypeError("no numbers")
    return {"name": name, "split": split, "seeds": seeds, "mean": shown, "spread": around}
