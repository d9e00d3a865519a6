"""`softcache report`: read the runs, measure what a image takes, draw, write one page and one text."""

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from softcache.base.errors import UsageError, make_printable
from softcache.base.files import make_folder, publish_text
from softcache.data.sources import short_name
from softcache.stages.cli.configs import ReportConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.cli.copied_commands import format_command, program_name
from softcache.stages.cli.extras import require_extra
from softcache.stages.runs.cost import format_cost
from softcache.stages.runs.folder import find_free_folder

from .latency import measure_latencies
from .load import LoadedRun, read_runs
from .text import Group, format_markdown, format_summary

if TYPE_CHECKING:
    from softcache.stages.cli.plot_style import Plot

    from .page import GroupPart


def run(names: tuple[str, ...], config: ReportConfig) -> None:
    """Everything is made before the first file is written."""
    require_extra("report needs", "report", "matplotlib", "jinja2")
    from softcache.stages.cli.plot_style import save_png

    from .page import GroupPart, render_page
    from .sections import make_cost_plot, make_run_section
    from .table import list_networks, make_table_rows

    console = Console(config.json)
    runs, inspections = read_runs(names)
    folder = _folder(config)
    groups = _groups(runs)
    networks = {one.name: list_networks(one) for one in runs}
    every = [network for of_run in networks.values() for some in of_run.values() for network in some]
    found = measure_latencies(every) if config.latency else {}
    loaded: dict[Any, Any] = {}
    parts, texts = [], []
    for group in groups:
        rows = make_table_rows(group, networks, found)
        words = format_summary(group, rows)
        texts.append((group, rows, words))
        each = [
            make_run_section(one, group.split, inspections, config, loaded, len(runs) <= 4)
            for one in progress(group.runs, len(group.runs), "report")
        ]
        parts.append(GroupPart(group.title, group.split, group.rows, words, rows, make_cost_plot(rows), each))
    again = _again(names, config)
    title = f"Students of {', '.join(dict.fromkeys(group.title for group in groups))}"
    images = _named(parts) if config.png else {}
    files = {"report.html": render_page(title, parts, again), "report.md": format_markdown(texts, _bills(runs), again)}
    make_folder(folder)
    for name, text in files.items():
        publish_text(folder / name, text)
    for name, one in progress(images.items(), len(images), "PNGs"):
        save_png(folder / name, one)
    if config.json:
        record = {"out": str(folder), "runs": [one.name for one in runs], "files": [*files, *images]}
        return console.print_json(json.dumps(record))
    for _, _, words in texts:
        for line in words:
            console.print(line)
    more = f", {len(images)} PNGs" if images else ""
    console.print(f"files: {folder}/report.html ({len(files['report.html']) / 1e6:.1f} MB), {folder}/report.md{more}")


def _folder(config: ReportConfig) -> Path:
    """Where the report goes; one that lies there is replaced. Raises UsageError for a folder of something else."""
    if not config.out:
        return find_free_folder("report")
    folder = Path(config.out)
    if folder.exists() and (not folder.is_dir() or not all(_is_ours(path) for path in folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is no report: choose another --out")
    return folder


def _is_ours(path: Path) -> bool:
    return path.name in ("report.html", "report.md") or path.suffix == ".png"


def _named(groups: "Sequence[GroupPart]") -> "dict[str, Plot]":
    """{file: image} of all that are drawn."""
    found: dict[str, Plot] = {}
    for group in groups:
        each = [(group.title, [group.costs] if group.costs else [])] + [(run.name, run.images) for run in group.runs]
        for name, images in each:
            stem = "".join(c if c.isalnum() or c in "._" else "-" for c in name).strip("-.")
            found |= {f"{stem}-{one.name}.png": one.image for one in images}
    return found


def _groups(runs: Sequence[LoadedRun]) -> list[Group]:
    """The runs by the rows on which they were measured."""
    found: dict[tuple[str, str], list[LoadedRun]] = {}
    for one in runs:
        teacher = one.logits["teacher"][0] if one.logits["teacher"] else {}
        split = "test" if "test" in teacher or (one.result and "test" in one.result["teacher"]) else "val"
        content = teacher[split].content if split in teacher else "".join(one.fingerprints[:1])
        found.setdefault((split, content), []).append(one)
    groups = []
    for (split, _), some in found.items():
        first = some[0]
        teacher = first.logits["teacher"][0] if first.logits["teacher"] else {}
        figures = first.figures("teacher", split) or {}
        rows = len(teacher[split].labels) if split in teacher else int(figures.get("rows", 0))
        data = short_name(first.config.data) if first.config.data else Path(first.config.cache[0]).name
        groups.append(Group(make_printable(data), split, rows, some))
    return groups


def _bills(runs: Sequence[LoadedRun]) -> dict[str, str]:
    return {one.name: format_cost(one.result["bill"]) for one in runs if one.result}


def _again(names: tuple[str, ...], config: ReportConfig) -> str:
    program = f"{program_name()} report"
    options = format_command("report", config, json=False).removeprefix(program)
    return " ".join([program, *(quote(make_printable(name, None)) for name in names)]) + options
