"""What the runs of a report come to, in plain words and as text for a pull request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softcache.base.errors import CacheError, make_printable
from softcache.pipeline.metrics.significance import RESAMPLES
from softcache.stages.cli.console import format_duration, progress_bar
from softcache.stages.compare.candidates import read_candidate
from softcache.stages.compare.significance import compare_pairs

from .load import LoadedRun

COLUMNS = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "auroc_macro": "AUROC",
    "nll": "NLL",
    "ece": "ECE",
    "agreement": "agreement",
}
_IN_PERCENT = {"accuracy", "f1_macro", "precision_macro", "recall_macro", "auroc_macro", "ece", "agreement"}
_FEW = ("accuracy", "f1_macro", "auroc_macro", "nll", "agreement")  # of the columns, for a pull request
_LESS_IS_BETTER = {"nll", "ece"}


@dataclass(frozen=True)
class Cell:
    """A figure as it is read, and as it is sorted, None where there is none; and its standard deviation over seeds."""

    shown: str
    value: float | None
    sd: float | None = None


@dataclass(frozen=True)
class Row:
    """A network of the table. kind: teacher, baseline or student; note: what is to be known of its figures."""

    name: str
    kind: str
    arch: str
    note: str
    figures: dict[str, Cell]
    parameters: int | None
    milliseconds: float | None
    seconds: float | None


@dataclass(frozen=True)
class Group:
    """Runs that were measured on the same rows: those of a split with so many rows of a data set."""

    title: str
    split: str
    rows: int
    runs: list[LoadedRun]


def make_cell(name: str, value: float | None, sd: float | None = None) -> Cell:
    """A figure with its spread."""
    if value is None:
        return Cell("–", None)
    scale, digits = (100, 2) if name in _IN_PERCENT else (1, 4)
    around = f" ± {scale * sd:.{digits}f}" if sd is not None else ""
    return Cell(f"{scale * value:.{digits}f}{around}", value, sd)


def column_title(name: str) -> str:
    """Of a column, with its unit."""
    return COLUMNS[name] + (", %" if name in _IN_PERCENT else "")


def is_better(name: str) -> str:
    """Which way a figure is better."""
    return "lower is better" if name in _LESS_IS_BETTER else "higher is better"


def format_summary(group: Group, rows: Sequence[Row]) -> list[str]:
    """What the runs come to, a sentence each."""
    students = [row for row in rows if row.kind == "student" and row.figures["accuracy"].value is not None]
    finished = [row for row in students if not row.note]
    count = len(group.runs)
    lines = [f"{count} run{'s' * (count != 1)} on {group.title}, measured on the {group.rows:,} {group.split} images."]
    if finished:
        best = max(finished, key=lambda row: row.figures["accuracy"].value or 0)
        lines.append(f"The best student is {best.name} ({best.arch}): {best.figures['accuracy'].shown} % accuracy.")
        lines += _against(best, group)
    lines += _smallest(finished, rows)
    saved = sum(run.result["bill"]["saved"] or 0 for run in group.runs if run.result)
    if saved:
        lines.append(f"Beside a teacher in the loop, the cache has saved {format_duration(saved)} of teacher in all.")
    lines += [f"{run.name} is {run.state}." for run in group.runs if not run.result]
    return lines


def _against(best: Row, group: Group) -> list[str]:
    """The best student beside its teacher and its baseline."""
    run = next(run for run in group.runs if run.name == best.name)
    own, teacher = run.figures("student", group.split), run.figures("teacher", group.split)
    if not own or not teacher or own.get("accuracy") is None or teacher.get("accuracy") is None:
        return []
    gap = 100 * (own["accuracy"] - teacher["accuracy"])
    lines = (
        [f"That is {_points(gap)} its teacher {make_printable(run.result['teacher']['arch'])}."] if run.result else []
    )
    base = run.figures("baseline", group.split)
    if base and base.get("accuracy") is not None:
        gain = 100 * (own["accuracy"] - base["accuracy"])
        lines.append(f"It is {_points(gain)} the same network trained from hard targets alone{_verdict(run)}.")
    return lines


def _verdict(run: LoadedRun) -> str:
    """Whether student and baseline are told apart, as `compare` has it."""
    try:
        sides = [read_candidate(run.name, model, run.result or {}, model) for model in ("baseline", "student")]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise CacheError(f"'{run.name}/result.json' is not of a student's run") from None
    with progress_bar(RESAMPLES, "resamples", "", scale=True) as shown:
        (record,) = compare_pairs([(sides[0], sides[1])], shown.update)
    if record["verdict"] is None:
        return ""
    low, high = (f"{100 * record['accuracy'][key]:+.2f}" for key in ("low", "high"))
    one = " for these trained students" if record["about"] == "students" else ""
    return f" ({100 * record['level']:.4g} % interval {low} to {high}: {record['verdict']}{one})"


def _points(gap: float) -> str:
    if abs(gap) < 0.005:
        return "level with"
    return f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}"


def _smallest(students: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The smallest student within a point of the best teacher, where there is a choice."""
    accuracies = [row.figures["accuracy"].value for row in rows if row.kind == "teacher"]
    teacher = max((value for value in accuracies if value is not None), default=None)
    near = [row for row in students if teacher is not None and (row.figures["accuracy"].value or 0) >= teacher - 0.01]
    if len(students) < 2 or not near:
        return []
    least = min(near, key=lambda row: row.parameters or 0)
    return [
        f"The smallest student within a point of the best teacher is {least.name}: {least.parameters:,} parameters."
    ]


def format_markdown(groups: Sequence[tuple[Group, list[Row], list[str]]], bills: dict[str, str], again: str) -> str:
    """report.md: summaries, tables, bills and provenance; nothing in it is markup that a name brought along."""
    lines = ["# Report", ""]
    for group, rows, words in groups:
        lines += [f"## {_plain(group.title)}", "", *(f"{_plain(line)}  " for line in words), ""]
        titles = ["", "network", *map(column_title, _FEW), "parameters", "ms a image"]
        lines += [_line(titles), _line(["---", "---", *["---:"] * (len(titles) - 2)])]
        for row in rows:
            kind = f"{row.name}, {row.kind}" if row.kind != "student" else row.name
            note = f" ({row.note})" if row.note else ""
            size = f"{row.parameters:,}" if row.parameters else "–"
            took = f"{row.milliseconds:.2f}" if row.milliseconds else "–"
            lines.append(_line([kind + note, row.arch, *(row.figures[name].shown for name in _FEW), size, took]))
        lines.append("")
    lines += ["## Bill", "", *(f"- {_plain(name)}: {bill}" for name, bill in bills.items()), ""] if bills else []
    runs = [run for group, _, _ in groups for run in group.runs]
    lines += ["## Provenance", "", *(f"- {_plain(run.name)}: {_plain(provenance_line(run))}" for run in runs)]
    return "\n".join([*lines, "", f"Made by `{again}`.", ""])


def provenance_line(run: LoadedRun) -> str:
    """Caches, seeds, versions and machine of a run."""
    caches = ", ".join(one[:12] for one in run.fingerprints)
    seeds = f"seed {run.config.seed}" if run.config.seeds == 1 else f"{run.config.seeds} seeds"
    if not run.result:
        return f"{run.state}; cache {caches}, {seeds}"
    versions: dict[str, Any] = run.result["versions"]
    with_ = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"cache {caches}, {seeds}, {with_}, {run.result['machine']['device']}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Without what Markdown or HTML would take for markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in make_printable(text, None))
