"""`softcache report`: read the runs, measure what a image takes, draw, write one page and one text."""

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from softcache.base.errors import UsageError, make_printable
from softcache.base.files import make_folder, publish_text
from softcache.data.transfer_set import short_name
from softcache.stages.cli.configs import ReportSettings
from softcache.stages.cli.console import Console, progress
from softcache.stages.cli.copied_commands import command, this_program
from softcache.stages.cli.extras import require
from softcache.stages.runs.cost import in_one_line
from softcache.stages.runs.folder import free_run

from .latency import latencies
from .load import Run, read_runs
from .text import Group, markdown, summary

if TYPE_CHECKING:
    from softcache.stages.cli.plot_style import Plot

    from .page import GroupPart


def run(names: tuple[str, ...], settings: ReportSettings) -> None:
    """Everything is made before the first file is written."""
    require("report needs", "report", "matplotlib", "jinja2")
    from softcache.stages.cli.plot_style import publish_png

    from .page import GroupPart, page
    from .sections import costs_of, part_of
    from .table import networks_of, rows_of

    console = Console(settings.json)
    runs, inspections = read_runs(names)
    folder = _folder(settings)
    groups = _groups(runs)
    networks = {one.name: networks_of(one) for one in runs}
    every = [network for of_run in networks.values() for some in of_run.values() for network in some]
    found = latencies(every) if settings.latency else {}
    loaded: dict[Any, Any] = {}
    parts, texts = [], []
    for group in groups:
        rows = rows_of(group, networks, found)
        words = summary(group, rows)
        texts.append((group, rows, words))
        each = [
            part_of(one, group.split, inspections, settings, loaded, len(runs) <= 4)
            for one in progress(group.runs, len(group.runs), "report")
        ]
        parts.append(GroupPart(group.title, group.split, group.rows, words, rows, costs_of(rows), each))
    again = _again(names, settings)
    title = f"Students of {', '.join(dict.fromkeys(group.title for group in groups))}"
    images = _named(parts) if settings.png else {}
    files = {"report.html": page(title, parts, again), "report.md": markdown(texts, _bills(runs), again)}
    make_folder(folder)
    for name, text in files.items():
        publish_text(folder / name, text)
    for name, one in progress(images.items(), len(images), "PNGs"):
        publish_png(folder / name, one)
    if settings.json:
        record = {"out": str(folder), "runs": [one.name for one in runs], "files": [*files, *images]}
        return console.result(json.dumps(record))
    for _, _, words in texts:
        for line in words:
            console.say(line)
    more = f", {len(images)} PNGs" if images else ""
    console.say(f"files: {folder}/report.html ({len(files['report.html']) / 1e6:.1f} MB), {folder}/report.md{more}")


def _folder(settings: ReportSettings) -> Path:
    """Where the report goes; one that lies there is replaced. Raises UsageError for a folder of something else."""
    if not settings.out:
        return free_run("report")
    folder = Path(settings.out)
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


def _groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by the rows on which they were measured."""
    found: dict[tuple[str, str], list[Run]] = {}
    for one in runs:
        teacher = one.said["teacher"][0] if one.said["teacher"] else {}
        split = "test" if "test" in teacher or (one.result and "test" in one.result["teacher"]) else "val"
        content = teacher[split].content if split in teacher else "".join(one.fingerprints[:1])
        found.setdefault((split, content), []).append(one)
    groups = []
    for (split, _), some in found.items():
        first = some[0]
        teacher = first.said["teacher"][0] if first.said["teacher"] else {}
        figures = first.figures("teacher", split) or {}
        rows = len(teacher[split].labels) if split in teacher else int(figures.get("rows", 0))
        data = short_name(first.settings.data) if first.settings.data else Path(first.settings.cache[0]).name
        groups.append(Group(make_printable(data), split, rows, some))
    return groups


def _bills(runs: Sequence[Run]) -> dict[str, str]:
    return {one.name: in_one_line(one.result["bill"]) for one in runs if one.result}


def _again(names: tuple[str, ...], settings: ReportSettings) -> str:
    program = f"{this_program()} report"
    options = command("report", settings, json=False).removeprefix(program)
    return " ".join([program, *(quote(make_printable(name, None)) for name in names)]) + options
