"""`softcache report`: runs of students as one HTML page, and as Markdown for a pull request."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softcache.base.errors import UsageError, make_printable
from softcache.base.files import make_folder, publish_text
from softcache.base.packages import require_extra
from softcache.data.sources import parse_data, short_name
from softcache.pipeline.models import is_external_arch
from softcache.stages.cli.configs import ReportConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.cli.new_folders import make_new_folder
from softcache.stages.runs.cost import format_cost
from softcache.stages.runs.output_folder import check_output_folder

from .disagreements import TransferSets
from .latency import measure_latencies
from .load import LoadedRun, read_runs
from .summary import format_summary
from .table import Group, list_networks, list_report_columns, make_table_rows

if TYPE_CHECKING:
    from softcache.stages.cli.plot_style import Plot

    from .page import GroupSection

_MOST_OPEN_RUNS = 4  # with more runs, their sections are folded at first


def run(names: tuple[str, ...], config: ReportConfig) -> None:
    """Write the report of runs. Everything is made before the first file is written.

    Args:
        names: Folders of runs, or folders that contain such folders; all runs when empty.
        config: Options of the command.

    Raises:
        UsageError: There is no run, an optional library is missing, or the folder is not one of a report.
        CacheError: A run is damaged.
    """
    require_extra("report needs", "report", "matplotlib", "jinja2")
    from softcache.stages.cli.plot_style import save_png

    from .markdown import format_markdown
    from .page import GroupSection, render_page
    from .sections import make_cost_plot, make_run_section

    console = Console(config.json)
    if config.data:
        parse_data(config.data)
    folder = _choose_folder(config)
    runs, inspections = read_runs(names)
    networks = {loaded.name: list_networks(loaded) for loaded in runs}
    every_network = [network for models in networks.values() for model in models.values() for network in model]
    latencies = measure_latencies(every_network) if config.latency else {}
    custom = sorted({network.arch for network in every_network if is_external_arch(network.arch)})
    if config.latency and custom:
        archs = ", ".join(make_printable(arch, 80) for arch in custom[:5])
        console.print(f"no latency of {archs}: a report does not import code that a run names")
    transfer_sets: TransferSets = {}
    sections = []
    for group in _group_runs(runs):
        table = make_table_rows(group, networks, latencies)
        summary = format_summary(group, table)
        run_sections = [
            make_run_section(
                loaded,
                group.split,
                inspections=inspections,
                config=config,
                transfer_sets=transfer_sets,
                is_open=len(runs) <= _MOST_OPEN_RUNS,
            )
            for loaded in progress(group.runs, len(group.runs), "report")
        ]
        sections.append(
            GroupSection(
                group=group,
                summary=summary,
                table=table,
                columns=list_report_columns(group),
                costs=make_cost_plot(group.task, table),
                runs=run_sections,
            )
        )

    title = f"Students of {', '.join(dict.fromkeys(section.group.title for section in sections))}"
    command = format_command("report", config, *names, json=False)
    costs = {loaded.name: format_cost(loaded.result["bill"]) for loaded in runs if loaded.result}
    texts = {
        "report.html": render_page(title, sections, command),
        "report.md": format_markdown(sections, costs, command),
    }
    plots = _name_plots(sections) if config.png else {}
    make_folder(folder)
    for name, text in texts.items():
        publish_text(folder / name, text)
    for name, plot in progress(plots.items(), len(plots), "PNGs"):
        save_png(folder / name, plot)

    if config.json:
        record = {"out": str(folder), "runs": [loaded.name for loaded in runs], "files": [*texts, *plots]}
        return console.print_json(json.dumps(record))
    for section in sections:
        for line in section.summary:
            console.print(line)
    pngs = f", {len(plots)} PNGs" if plots else ""
    size = len(texts["report.html"]) / 1e6
    console.print(f"files: {folder}/report.html ({size:.1f} MB), {folder}/report.md{pngs}")


def _choose_folder(config: ReportConfig) -> Path:
    """Return the folder of the report. Raises UsageError for one with other files than those of an older report."""
    if not config.out:
        return make_new_folder("report")
    folder = Path(config.out)
    check_output_folder(folder)
    if folder.exists() and (not folder.is_dir() or not all(_is_report_file(path) for path in folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is not the folder of a report: choose another --out")
    return folder


def _is_report_file(path: Path) -> bool:
    return path.name in ("report.html", "report.md") or path.suffix == ".png"


def _group_runs(runs: Sequence[LoadedRun]) -> list[Group]:
    """Group the runs by their task and the rows on which they were measured."""
    members: dict[tuple[str, str, str], list[LoadedRun]] = {}
    for loaded in runs:
        teacher = loaded.logits["teacher"][0] if loaded.logits["teacher"] else {}
        has_test = "test" in teacher or (loaded.result is not None and "test" in loaded.result["teacher"])
        split = "test" if has_test else "val"
        content = teacher[split].content if split in teacher else "".join(loaded.fingerprints[:1])
        members.setdefault((split, content, loaded.task), []).append(loaded)
    groups = []
    for (split, _, task), group_runs in members.items():
        first = group_runs[0]
        teacher = first.logits["teacher"][0] if first.logits["teacher"] else {}
        if split in teacher:
            rows = len(teacher[split].labels)
        else:
            rows = int((first.get_metrics("teacher", split) or {}).get("rows", 0))
        data = short_name(first.config.data) if first.config.data else "".join(first.config.cache[:1])
        data = Path(data).name or "data"
        groups.append(Group(make_printable(data), split, rows, group_runs, task))
    return groups


def _name_plots(sections: "Sequence[GroupSection]") -> "dict[str, Plot]":
    """Return {name of a PNG file: plot} of all plots in the page."""
    plots: dict[str, Plot] = {}
    for section in sections:
        owners = [(section.group.title, [section.costs] if section.costs else [])]
        owners += [(run_section.name, run_section.images) for run_section in section.runs]
        for name, images in owners:
            stem = "".join(c if c.isalnum() or c in "._" else "-" for c in name).strip("-.")
            plots |= {f"{stem}-{image.name}.png": image.plot for image in images}
    return plots
