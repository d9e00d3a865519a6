"""The table of results that is printed at the end of a run."""

from typing import Any

from softcache.stages.cli.console import Console

from .figures import TITLES, Figures, choose_split, get_task, list_columns


def print_table(result: dict[str, Any], console: Console) -> None:
    """Print the metrics of teacher, baseline and student on the test split (or validation).

    Args:
        result: the content of result.json.
        console: where to print.
    """
    split = choose_split(result["teacher"])
    teacher = Figures(result["teacher"][split])
    seeds = len(result["seeds"])
    models = [model for model in ("teacher", "baseline", "student") if model in result]
    distribution_map = result["settings"]["map"]
    names = {
        "teacher": f"teacher {result['teacher']['arch']}" + (f", map {distribution_map}" if distribution_map else ""),
        "baseline": f"{result['student']['arch']}, hard targets only",
        "student": f"{result['student']['arch']}, from the cache",
    }
    seeds_note = f", mean ± sd of {seeds} seeds" if seeds > 1 else ""
    width = max(len(name) for name in names.values())
    columns = list_columns(get_task(result), teacher.has_labels())
    if teacher.get("recall_tail") is not None:
        columns += ("recall_tail",)
    console.print()
    console.print(
        f"{split + ' split' + seeds_note:<{width}}"
        + "".join(f"{TITLES[name]:>17}" for name in columns)
        + f"{'seconds':>10}"
    )
    for model in models:
        figures = Figures(result[model][split])
        spread = Figures(result["spread"].get(model, {}).get(split, {}))
        cells = [format_cell(figures.get(name), spread.get(name), seeds) for name in columns]
        seconds = result["cache"]["seconds"] if model == "teacher" else result[model]["seconds"]
        console.print(f"{names[model]:<{width}}" + "".join(f"{cell:>17}" for cell in cells) + f"{seconds:>10.1f}")
    console.print("(seconds: of the teacher, stage one, needed once; of a student, its training)")
    if not teacher.has_labels():
        console.print(f"(the {split} images have no labels: the student is compared with its teacher alone)")


def format_cell(value: float | None, spread: float | None, seeds: int, unknown: str = "-") -> str:
    """Format a metric, with its standard deviation where it is a mean of several seeds.

    Args:
        value: the metric; None where it is unknown.
        spread: its standard deviation over the seeds.
        seeds: number of seeds.
        unknown: the text for None.
    """
    if value is None:
        return unknown
    return f"{value:.4f} ± {spread:.4f}" if seeds > 1 and spread is not None else f"{value:.4f}"
