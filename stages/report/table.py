"""The table at the top of a report: students, baselines and teachers with their metrics, size and latency."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, make_printable
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER
from softcache.pipeline.models.prepared_model import InputSpec
from softcache.stages.compare.candidates import UNCOMPARED_OPTIONS, format_value
from softcache.stages.runs.figures import IN_PERCENT, TITLES, Figures

from .latency import Network
from .load import AT_THRESHOLDS, MODELS, LoadedRun

# The figures of the table of each task.
COLUMNS: dict[str, tuple[str, ...]] = {
    CLASSES: (
        "accuracy",
        "f1_macro",
        "precision_macro",
        "recall_macro",
        "auroc_macro",
        "nll",
        "ece",
        "agreement",
    ),
    LABELS: (
        "map",
        "f1_macro",
        AT_THRESHOLDS,
        "f1_micro",
        "precision_macro",
        "recall_macro",
        "auroc_macro",
        "nll",
        "agreement",
    ),
    NUMBERS: ("rmse", "mae", "r2", "spearman", "rmse_to_teacher", "r2_to_teacher"),
    EMBEDDING: ("cosine", "cka", "overlap", "knn", "probe", "centroid_1", "centroid_5"),
}
_OPTIONAL = {AT_THRESHOLDS, "cka", "overlap", "knn", "probe", "centroid_1", "centroid_5"}  # absent from many runs
_TITLES = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    AT_THRESHOLDS: "macro F1 at thresholds",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "auroc_macro": "AUROC",
    "nll": "NLL",
    "ece": "ECE",
    "agreement": "agreement",
    "knn": "kNN",
    "probe": "probe",
    "centroid_1": "1-shot",
    "centroid_5": "5-shot",
}
_IN_UNITS = {"rmse", "mae", "rmse_to_teacher"}  # in the units of the data
Latencies = Mapping[Network, tuple[int, float]]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: That is printed.
        value: By which the column is sorted; None where there is none.
        sd: Standard deviation over seeds, in the unit of `value`; None for a single seed.
    """

    text: str
    value: float | None
    sd: float | None = None


@dataclass(frozen=True)
class Row:
    """A network of the table.

    Attributes:
        name: Of its run, or of the teacher.
        kind: "teacher", "baseline" or "student".
        arch: Its arch.
        note: Why its metrics are not those of a finished run; else empty.
        options: The options in which its run differs from the others of the group; else empty.
        metrics: {name of a column: cell}.
        parameters: Number of its parameters; None where unknown.
        milliseconds: Its latency for one image; None where unknown.
        seconds: Of its training, of a teacher those of the cache; None where unknown.
    """

    name: str
    kind: str
    arch: str
    note: str
    options: str
    metrics: dict[str, Cell]
    parameters: int | None
    milliseconds: float | None
    seconds: float | None


@dataclass(frozen=True)
class Group:
    """Runs that were measured on the same rows.

    Attributes:
        title: Name of the data.
        split: On which they were measured.
        rows: Number of rows of the split.
        runs: The runs.
        task: Of all runs.
    """

    title: str
    split: str
    rows: int
    runs: list[LoadedRun]
    task: str = CLASSES


def make_cell(name: str, value: float | None, sd: float | None = None) -> Cell:
    """Format a metric, in percent or with four digits.

    Args:
        name: Of the metric, see COLUMNS.
        value: The metric; None where there is none.
        sd: Its standard deviation over seeds.
    """
    if value is None:
        return Cell("–", None)
    if name in _IN_UNITS:
        spread = f" ± {sd:.2g}" if sd is not None else ""
        return Cell(f"{value:.5g}{spread}", value, sd)
    scale, digits = (100, 2) if is_in_percent(name) else (1, 4)
    spread = f" ± {scale * sd:.{digits}f}" if sd is not None else ""
    return Cell(f"{scale * value:.{digits}f}{spread}", value, sd)


def is_in_percent(name: str) -> bool:
    """Whether a figure is a share, which is shown in percent."""
    return name in IN_PERCENT or name == AT_THRESHOLDS


def get_figure(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return a figure of the table from the figures of a split; None where it is absent."""
    if name != AT_THRESHOLDS:
        return Figures(metrics).get(name)
    at_thresholds = metrics.get("at_thresholds")
    return Figures(at_thresholds).get("f1_macro") if isinstance(at_thresholds, dict) else None


def list_report_columns(group: "Group") -> list[str]:
    """List the figures of a group's table: those of its task, without optional ones that no network has."""
    splits = [run.get_metrics(model, group.split) or {} for run in group.runs for model in MODELS]
    return [
        name
        for name in COLUMNS[group.task]
        if name not in _OPTIONAL or any(get_figure(metrics, name) is not None for metrics in splits)
    ]


def _make_cells(task: str, metrics: Mapping[str, Any], spread: Mapping[str, Any]) -> dict[str, Cell]:
    """Make a cell of each figure of a task, also of those that are absent."""
    return {name: make_cell(name, get_figure(metrics, name), get_figure(spread, name)) for name in COLUMNS[task]}


def format_column_title(name: str) -> str:
    """Return the title of a column with its unit."""
    return _TITLES.get(name, TITLES.get(name, name)) + (", %" if is_in_percent(name) else "")


def describe_direction(name: str) -> str:
    """Say whether lower or higher values of a metric are better."""
    return "lower is better" if name in LOWER_IS_BETTER else "higher is better"


def list_networks(run: LoadedRun) -> dict[str, list[Network]]:
    """List the networks of a run whose latency can be measured.

    Returns:
        {model: networks}: one of a student or baseline; of a teacher one for each of its caches, and only where the
        run's caches are available.
    """
    networks: dict[str, list[Network]] = {}
    K = next((stored.logits.shape[1] for splits in run.logits["student"] for stored in splits.values()), 0)
    if run.result and K:
        for model in ("baseline", "student"):
            if record := run.result.get(model):
                input_spec = InputSpec.from_json(record["preparation"])
                networks[model] = [Network.of_input(record["arch"], K, input_spec)]
    try:
        caches = [CacheReader(Path(path)) for path in run.config.cache]
    except CacheError:
        return networks
    if [cache.manifest.fingerprint for cache in caches] == run.fingerprints:
        networks["teacher"] = [Network.of_input(cache.teacher, cache.classes, cache.input_spec) for cache in caches]
    return networks


def make_table_rows(group: Group, networks: Mapping[str, dict[str, list[Network]]], latencies: Latencies) -> list[Row]:
    """Make a row of each student, baseline and teacher.

    Args:
        group: The runs.
        networks: {name of a run: see `list_networks`}.
        latencies: See `latency.measure_latencies`.

    Returns:
        The rows, run after run; a teacher of several students has one row. Those of unfinished runs are the last ones:
        their metrics are of another split.
    """
    rows: list[Row] = []
    unfinished: list[Row] = []
    options = describe_differences(group.runs)
    for run in group.runs:
        run_networks = networks[run.name]
        for model in ("student", "baseline"):
            if run.get_metrics(model, group.split):
                model_networks = run_networks.get(model, [])
                row = _make_model_row(run, model, group.split, networks=model_networks, latencies=latencies)
                rows.append(replace(row, options=options[run.name] if model == "student" else "hard targets alone"))
        if not run.result:
            unfinished.append(replace(_make_unfinished_row(run), options=options[run.name]))
        teachers = run_networks.get("teacher", [])
        if run.get_metrics("teacher", group.split):
            row = _make_teacher_row(run, group.split, teachers, latencies)
            if not _has_teacher(rows, row):
                rows.append(row)
        for row in _make_member_rows(run, group.split, teachers, latencies):
            if not _has_teacher(rows, row):
                rows.append(row)
    return rows + unfinished


def describe_differences(runs: Sequence[LoadedRun]) -> dict[str, str]:
    """Describe the options in which runs differ: {name of a run: `loss kd:temperature=4, seed 1`}.

    The arch, which has a column of its own, is left out, and what cannot change a student.
    """
    configs = {run.name: asdict(run.config) for run in runs}
    ignored = {*UNCOMPARED_OPTIONS, "arch"}
    names = [
        name
        for name in next(iter(configs.values()))
        if name not in ignored and any(config[name] != configs[runs[0].name][name] for config in configs.values())
    ]
    names.sort(key=lambda name: name != "loss")  # first what most often makes the difference
    return {
        run: ", ".join(f"{name.replace('_', ' ')} {format_value(config[name])}" for name in names)
        for run, config in configs.items()
    }


def _has_teacher(rows: Sequence[Row], teacher: Row) -> bool:
    """Whether one of the rows is a teacher of the same name and metrics."""
    return any(row.kind == "teacher" and row.name == teacher.name and row.metrics == teacher.metrics for row in rows)


def _sum_costs(networks: Sequence[Network], latencies: Latencies) -> tuple[int | None, float | None]:
    """Return the parameters and milliseconds of all networks together; None where one is not known."""
    costs = [latencies[network] for network in networks if network in latencies]
    if not costs or len(costs) < len(networks):
        return None, None
    return sum(parameters for parameters, _ in costs), sum(milliseconds for _, milliseconds in costs)


def _make_model_row(
    run: LoadedRun, model: str, split: str, *, networks: Sequence[Network], latencies: Latencies
) -> Row:
    """Make the row of a finished run's student or baseline."""
    assert run.result is not None
    record, spread = run.result[model], run.get_spread(model, split)
    metrics = run.get_metrics(model, split) or {}
    _, milliseconds = _sum_costs(networks, latencies)
    return Row(
        name=make_printable(run.name),
        kind=model,
        arch=make_printable(record["arch"]),
        note="",
        options="",
        metrics=_make_cells(run.task, metrics, spread),
        parameters=int(record["parameters"]),
        milliseconds=milliseconds,
        seconds=record["seconds"],
    )


def _make_unfinished_row(run: LoadedRun) -> Row:
    """Make the row of an unfinished run, with the validation metrics of its last epoch."""
    trainings = (run.epoch_metrics["student"], run.epoch_metrics["distilled"])
    metrics = next((seeds[-1][-1] for seeds in trainings if seeds), {})
    return Row(
        name=make_printable(run.name),
        kind="student",
        arch=make_printable(run.config.arch),
        note=f"{run.state}; validation metrics" if metrics else run.state,
        options="",
        metrics=_make_cells(run.task, {name[4:]: metrics[name] for name in metrics if name.startswith("val_")}, {}),
        parameters=None,
        milliseconds=None,
        seconds=None,
    )


def _make_teacher_row(run: LoadedRun, split: str, networks: Sequence[Network], latencies: Latencies) -> Row:
    """Make the row of a run's teacher; several caches are one teacher."""
    metrics = run.get_metrics("teacher", split) or {}
    archs = " + ".join(network.arch for network in networks) or "teacher"
    arch = make_printable(run.result["teacher"]["arch"] if run.result else archs)
    options = [option for option in (run.config.combine, run.config.map) if option]
    parameters, milliseconds = _sum_costs(networks, latencies)
    return Row(
        name=make_printable(", ".join([arch, *options])),
        kind="teacher",
        arch=arch,
        note="",
        options="",
        metrics=_make_cells(run.task, metrics, {}),
        parameters=parameters,
        milliseconds=milliseconds,
        seconds=run.result["cache"]["seconds"] if run.result else None,
    )


def _make_member_rows(run: LoadedRun, split: str, networks: Sequence[Network], latencies: Latencies) -> list[Row]:
    """Make a row of each teacher that is a member of a combined one, with the metrics stored in its cache."""
    rows = []
    for i, member in enumerate((run.result or {}).get("members", ())):
        metrics = member.get(split, {})
        arch = make_printable(member["arch"])
        parameters, milliseconds = _sum_costs(networks[i : i + 1], latencies)
        rows.append(
            Row(
                name=f"{arch}, as cached",
                kind="teacher",
                arch=arch,
                note="",
                options="",
                metrics=_make_cells(run.task, metrics, {}),
                parameters=parameters,
                milliseconds=milliseconds,
                seconds=None,
            )
        )
    return rows
