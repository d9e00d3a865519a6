"""report.md: the summaries, tables, costs and provenance of a report as Markdown, for a pull request."""

from collections.abc import Sequence

from softcache.base.text import escape_markdown, format_code_span
from softcache.data.tasks import CLASSES, LABELS

from .load import AT_THRESHOLDS, LoadedRun
from .page import GroupSection
from .table import format_column_title

# Of the page's columns of classes and labels, to fit in width.
_COLUMNS = ("accuracy", "map", "f1_macro", AT_THRESHOLDS, "auroc_macro", "nll", "agreement")


def format_markdown(sections: Sequence[GroupSection], costs: dict[str, str], command: str) -> str:
    """Format report.md. Markup in names is escaped.

    Args:
        sections: Of the page.
        costs: {name of a run: its cost}.
        command: That makes the report again.
    """
    lines = ["# Report", ""]
    for section in sections:
        lines += [
            f"## {escape_markdown(section.group.title)}",
            "",
            *(f"{escape_markdown(line)}  " for line in section.summary),
            "",
        ]
        lines += [*_table_lines(section), ""]
    if costs:
        lines += ["## Cost", "", *(f"- {escape_markdown(name)}: {cost}" for name, cost in costs.items()), ""]
    runs = [run for section in sections for run in section.group.runs]
    lines += [
        "## Provenance",
        "",
        *(f"- {escape_markdown(run.name)}: {escape_markdown(_format_provenance(run))}" for run in runs),
    ]
    return "\n".join([*lines, "", f"Made by {format_code_span(command)}.", ""])


def _table_lines(section: GroupSection) -> list[str]:
    columns = [name for name in section.columns if section.group.task not in (CLASSES, LABELS) or name in _COLUMNS]
    titles = [
        "",
        "network",
        *(["differs in"] if section.has_options else []),
        *map(format_column_title, columns),
        "parameters",
        "ms per image",
    ]
    texts = 3 if section.has_options else 2
    lines = [_table_line(titles), _table_line(["---"] * texts + ["---:"] * (len(titles) - texts))]
    for row in section.table:
        name = row.name if row.kind == "student" else f"{row.name}, {row.kind}"
        note = f" ({row.note})" if row.note else ""
        parameters = f"{row.parameters:,}" if row.parameters else "–"
        milliseconds = f"{row.milliseconds:.2f}" if row.milliseconds else "–"
        metrics = [row.metrics[column].text for column in columns]
        options = [row.options or "–"] if section.has_options else []
        lines.append(_table_line([name + note, row.arch, *options, *metrics, parameters, milliseconds]))
    return lines


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape_markdown(cell) for cell in cells) + " |"


def _format_provenance(run: LoadedRun) -> str:
    """Format caches, seeds, versions and machine of a run in one line."""
    caches = ", ".join(fingerprint[:12] for fingerprint in run.fingerprints)
    seeds = f"seed {run.config.seed}" if run.config.seeds == 1 else f"{run.config.seeds} seeds"
    if not run.result:
        return f"{run.state}; cache {caches}, {seeds}"
    versions = ", ".join(f"{name} {version}" for name, version in run.result["versions"].items())
    return f"cache {caches}, {seeds}, {versions}, {run.result['machine']['device']}"
