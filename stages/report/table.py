"""The table of a report: students beside their baselines and teachers, and what each costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, make_printable
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.models.prepared_model import InputSpec

from .latency import Network
from .load import LoadedRun
from .text import COLUMNS, Cell, Group, Row, make_cell

Found = Mapping[Network, tuple[int, float]]


def list_networks(run: LoadedRun) -> dict[str, list[Network]]:
    """{model: what is to be built to measure it, the members of a blend one by one}, as far as it is known: of a
    teacher only where its cache is here."""
    found: dict[str, list[Network]] = {}
    K = next((one.logits.shape[1] for seed in run.logits["student"] for one in seed.values()), 0)
    for model in ("baseline", "student") if run.result and K else ():
        if record := (run.result or {}).get(model):
            input_spec = InputSpec.from_json(record["preparation"])
            found[model] = [Network(record["arch"], K, input_spec.channels, input_spec.size)]
    try:
        caches = [Cache(Path(path)) for path in run.config.cache]
    except CacheError:
        return found
    if [cache.manifest.fingerprint for cache in caches] == run.fingerprints:
        found["teacher"] = [
            Network(one.teacher, one.classes, one.input_spec.channels, one.input_spec.size) for one in caches
        ]
    return found


def make_table_rows(group: Group, of_runs: Mapping[str, dict[str, list[Network]]], found: Found) -> list[Row]:
    """A row of each student, baseline and teacher; a teacher of several students once. of_runs: networks_of each run,
    by its name."""
    rows: list[Row] = []
    for run in group.runs:
        networks = of_runs[run.name]
        for model in ("student", "baseline"):
            if run.figures(model, group.split):
                rows.append(_student(run, model, group.split, _costs(networks.get(model, []), found)))
        if not run.result:
            rows.append(_unfinished(run))
        if run.figures("teacher", group.split):
            rows.append(_teacher(run, group.split, networks.get("teacher", []), found))
        rows += _members(run, group.split, networks.get("teacher", []), found)
    return [row for i, row in enumerate(rows) if row.kind != "teacher" or not _seen(row, rows[:i])]


def _costs(networks: Sequence[Network], found: Found) -> tuple[int, float] | None:
    """Parameters and milliseconds of all of them; None where one is not known."""
    known = [found[network] for network in networks if network in found]
    if not known or len(known) < len(networks):
        return None
    return sum(parameters for parameters, _ in known), sum(milliseconds for _, milliseconds in known)


def _members(run: LoadedRun, split: str, networks: Sequence[Network], found: Found) -> list[Row]:
    """The teachers of a blend, each as it is cached."""
    rows = []
    for i, member in enumerate((run.result or {}).get("members", ())):
        cells = {name: make_cell(name, member.get(split, {}).get(name)) for name in COLUMNS}
        parameters, milliseconds = _costs(networks[i : i + 1], found) or (None, None)
        arch = make_printable(member["arch"])
        rows.append(Row(f"{arch}, as cached", "teacher", arch, "", cells, parameters, milliseconds, None))
    return rows


def _seen(row: Row, rows: Sequence[Row]) -> bool:
    return any(one.kind == "teacher" and (one.name, one.figures) == (row.name, row.figures) for one in rows)


def _student(run: LoadedRun, model: str, split: str, costs: tuple[int, float] | None) -> Row:
    """Of a finished run, its student or its baseline."""
    assert run.result is not None
    record, spread = run.result[model], run.spread(model, split)
    figures = run.figures(model, split) or {}
    cells = {name: make_cell(name, figures.get(name), spread.get(name)) for name in COLUMNS}
    milliseconds = costs[1] if costs else None
    return Row(
        make_printable(run.name),
        model,
        make_printable(record["arch"]),
        "",
        cells,
        int(record["parameters"]),
        milliseconds,
        record["seconds"],
    )


def _teacher(run: LoadedRun, split: str, networks: Sequence[Network], found: Found) -> Row:
    """What the student learned from, as one teacher."""
    figures = run.figures("teacher", split) or {}
    cells = {name: make_cell(name, figures.get(name)) for name in COLUMNS}
    named = " + ".join(network.arch for network in networks) or "teacher"
    arch = make_printable(run.result["teacher"]["arch"] if run.result else named)
    how = [one for one in (run.config.combine, run.config.map) if one]
    parameters, milliseconds = _costs(networks, found) or (None, None)
    seconds = run.result["cache"]["seconds"] if run.result else None
    return Row(make_printable(", ".join([arch, *how])), "teacher", arch, "", cells, parameters, milliseconds, seconds)


def _unfinished(run: LoadedRun) -> Row:
    """As far as it came, by its last epoch's figures of validation."""
    last: dict[str, Any] = next(
        (seeds[-1][-1] for seeds in map(run.lines.get, ("student", "distilled")) if seeds and seeds[-1]), {}
    )
    cells: dict[str, Cell] = {name: make_cell(name, last.get(f"val_{name}")) for name in COLUMNS}
    note = f"{run.state}; figures of validation" if last else run.state
    return Row(make_printable(run.name), "student", make_printable(run.config.arch), note, cells, None, None, None)
