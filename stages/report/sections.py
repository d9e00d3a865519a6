"""The section of a run in the page: plots, classes, disagreements, cost and provenance; and a group's cost plot."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from softcache.base.errors import make_printable
from softcache.data.tasks import CLASSES, NUMBERS
from softcache.pipeline.metrics.soft_targets import calibration
from softcache.pipeline.metrics.tasks import TASK_FIGURES
from softcache.stages.cli.configs import ReportConfig
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.inspect.plots import plot_channels, plot_taps
from softcache.stages.runs.cost import format_cost
from softcache.stages.runs.figures import IN_PERCENT, TITLES

from .agreement import measure_agreement
from .differences import DIFFER_BY, DIFFER_BY_OF_CLASSES
from .disagreements import TransferSets, collect_disagreements
from .load import LISTS, EpochMetrics, LoadedRun
from .page import ClassRow, PageImage, RunSection, make_page_image
from .plots import Point, plot_agreement, plot_confusion, plot_costs, plot_curves, plot_reliability
from .table import Cell, Row
from .task_sections import list_class_names, make_output_rows, plot_task

_CHANNELS = 15  # of a tap, in its panel


def make_cost_plot(task: str, rows: Sequence[Row]) -> PageImage | None:
    """Plot the main figure over size and latency.

    Args:
        task: Of the group.
        rows: The table of a group.

    Returns:
        The plot; None where the size of no finished network is known.
    """
    main = TASK_FIGURES[task].main
    points = [
        Point(
            name=row.name if row.kind == "teacher" else row.name.rpartition("/")[2],
            kind=row.kind,
            value=value,
            sd=row.metrics[main].sd or 0.0,
            parameters=row.parameters,
            milliseconds=row.milliseconds,
        )
        for row in rows
        if (value := row.metrics[main].value) is not None and not row.note
    ]
    if not any(point.parameters for point in points):
        return None
    title = {"accuracy": "Accuracy", "cosine": "Cosine"}.get(main, TITLES[main])
    values = "; ".join(
        f"{point.name} {100 * point.value:.2f} %" if main in IN_PERCENT else f"{point.name} {point.value:.4g}"
        for point in points
    )
    return make_page_image(
        "costs",
        plot_costs(points, main),
        alt=f"{title} of {values}",
        caption=f"{title} over size and over the latency of one image on this machine.",
    )


def make_run_section(
    run: LoadedRun,
    split: str,
    *,
    inspections: dict[str, dict[str, Any]],
    config: ReportConfig,
    transfer_sets: TransferSets,
    is_open: bool,
) -> RunSection:
    """Make the section of a run.

    Args:
        run: The run.
        split: On which it was measured.
        inspections: {fingerprint of a cache: inspect.json}.
        config: Options of the command.
        transfer_sets: Those that are open already, see `collect_disagreements`.
        is_open: Whether the section is unfolded at first.
    """
    notes: list[str] = []
    images = [
        *_plot_training(run, notes),
        *(_plot_confusions(run, split, notes) if run.task == CLASSES else ()),
        *(_plot_logits(run, split, notes) if run.task == CLASSES else plot_task(run, split, notes)),
    ]
    for fingerprint in run.fingerprints:
        if fingerprint in inspections:
            images += _plot_inspection(inspections[fingerprint])
    disagreements = collect_disagreements(run, split, config, transfer_sets) if config.show else []
    return RunSection(
        name=make_printable(run.name),
        state=run.state,
        is_open=is_open,
        split=split,
        images=images,
        notes=notes,
        classes=make_output_rows(run, split) if run.task == NUMBERS else _make_class_rows(run, split),
        task=run.task,
        differ_by=DIFFER_BY.get(run.task, DIFFER_BY_OF_CLASSES),
        disagreements=[] if isinstance(disagreements, str) else disagreements,
        no_disagreements=make_printable(disagreements, None) if isinstance(disagreements, str) else "",
        cost=format_cost(run.result["bill"]) if run.result else "",
        provenance=_list_provenance(run),
        command=format_command("student", run.config, out="", resume=False, json=False),
    )


# Plots. Each function appends to the notes why a plot is missing.


def _plot_training(run: LoadedRun, notes: list[str]) -> list[PageImage]:
    """Plot the curves of the student, with its fine-tuning after the distillation, and of its baseline."""
    # `distilled` is empty without fine-tuning; with it, `student` is the fine-tuning, which a seed may not have begun.
    distilled, student_epochs = run.epoch_metrics["distilled"], run.epoch_metrics["student"]
    student: list[list[EpochMetrics]] = []
    for seed in range(max(len(distilled), len(student_epochs))):
        before = distilled[seed] if seed < len(distilled) else []
        after = student_epochs[seed] if seed < len(student_epochs) else []
        student.append([*before, *after])
    if not student:
        return []
    if not any(key.startswith("gradient_") for seed in student for metrics in seed for key in metrics):
        notes.append("The gradients of the terms were not measured in this run.")
    plot = plot_curves(
        {"student": student, "baseline": run.epoch_metrics["baseline"]},
        finetuned_from=run.config.epochs if run.config.finetune_epochs else 0,
        task=run.task,
    )
    epochs, loss = max(map(len, student)), student[-1][-1].get("loss", 0)
    return [
        make_page_image(
            "curves",
            plot,
            alt=f"Curves over {epochs} epochs; at the last one the loss is {loss:.4g}",
            caption="Training: weighted terms of the loss, their gradients, and validation.",
        )
    ]


def _plot_confusions(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    """Plot the student's confusion matrix, and its difference from the teacher's."""
    student_metrics, teacher_metrics = run.get_metrics("student", split), run.get_metrics("teacher", split)
    if not student_metrics or not teacher_metrics:
        return []
    student, teacher = student_metrics.get("confusion"), teacher_metrics.get("confusion")
    if not student or not teacher:
        notes.append("No confusion matrix: there are no labels, or more than 100 classes.")
        return []
    names, K = list_class_names(run, len(student)), len(student)
    errors = [(student[i][j], i, j) for i in range(K) for j in range(K) if i != j]
    count, i, j = max(errors) if errors else (0, 0, 0)
    return [
        make_page_image(
            "confusion",
            plot_confusion(student, teacher, names),
            alt=f"Confusion matrices. The student's most frequent error: {names[i]} predicted as {names[j]},"
            f" {count:.3g} times",
            caption="Predicted classes of each true class, and where the student predicts them more or less often than"
            " its teacher.",
        )
    ]


def _plot_logits(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    """Plot reliability, and agreement with the teacher, over all seeds."""
    students = [splits[split] for splits in run.logits["student"] if split in splits]
    teacher = run.logits["teacher"][0].get(split) if run.logits["teacher"] else None
    if not students or teacher is None:
        if run.result:
            notes.append("The run has no files of logits: no reliability diagram, and no agreement.")
        return []
    if not (teacher.labels >= 0).any():
        notes.append(f"The {split} split has no labels: no reliability diagram, and no agreement.")
        return []
    calibrations = {"teacher": calibration(teacher.logits, teacher.labels)}
    for model in ("baseline", "student"):
        if seeds := [splits[split] for splits in run.logits[model] if split in splits]:
            logits = np.concatenate([seed.logits for seed in seeds])
            labels = np.concatenate([seed.labels for seed in seeds])
            calibrations[model] = calibration(logits, labels)
    errors = ", ".join(f"{model} {100 * values['ece']:.2f} %" for model, values in calibrations.items())
    agreement = measure_agreement([seed.logits for seed in students], teacher.logits, teacher.labels)
    agreement_text = (
        f"student and teacher predict the same class in {100 * agreement.right[0]:.1f} % of the rows where the"
        " teacher is right"
    )
    if agreement.rows[1]:
        agreement_text += f", and in {100 * agreement.wrong[0]:.1f} % of those where it is wrong"
    return [
        make_page_image(
            "reliability",
            plot_reliability(calibrations),
            alt=f"Reliability diagram. Calibration error: {errors}",
            caption="Reliability: accuracy by confidence in 15 bins, hollow where a bin has fewer than 10 rows.",
        ),
        make_page_image(
            "agreement",
            plot_agreement(agreement),
            alt=f"Agreement: {agreement_text}",
            caption="Agreement with the teacher where it is right and where it is wrong.",
        ),
    ]


def _plot_inspection(record: dict[str, Any]) -> list[PageImage]:
    """Plot the importance of taps and channels, by the inspect.json of a run's cache."""
    taps, joint, channels = record["taps"], record["joint"], record["channels"]
    if not taps:
        return []
    return [
        make_page_image(
            "taps",
            plot_taps(taps, joint["teacher"], joint["majority"], joint["split"]),
            alt=f"Feature importance of the taps: the best tap is {record['best']}",
            caption="Feature importance: which layers of the teacher matter.",
        ),
        make_page_image(
            "channels",
            plot_channels(channels, _CHANNELS),
            alt="Feature importance of the channels of each tap",
            caption="Feature importance: the most important channels of each tap.",
        ),
    ]


# Table of classes, and provenance


def _make_class_rows(run: LoadedRun, split: str) -> list[ClassRow]:
    """Make the table of classes, the lowest F1 first and classes without F1 last."""
    student_metrics, teacher_metrics = run.get_metrics("student", split), run.get_metrics("teacher", split)
    if not student_metrics or not teacher_metrics:
        return []
    name = LISTS.get(run.task, "per_class")
    student, teacher = student_metrics.get(name), teacher_metrics.get(name)
    if not student or not teacher:
        return []
    rows: list[tuple[tuple[bool, float], ClassRow]] = []
    for c, name in enumerate(list_class_names(run, len(student["f1"]))):
        f1, teacher_f1, support = student["f1"][c], teacher["f1"][c], student["support"][c]
        cells = [
            Cell(f"{support:,.0f}", support),
            _format_percent(student["precision"][c]),
            _format_percent(student["recall"][c]),
            _format_percent(f1),
            _format_percent(teacher_f1),
            _format_percent(None if f1 is None or teacher_f1 is None else f1 - teacher_f1, sign="+"),
        ]
        rows.append(((f1 is None, f1 or 0), ClassRow(name, cells)))
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _format_percent(value: float | None, sign: str = "") -> Cell:
    return Cell("–", None) if value is None else Cell(f"{100 * value:{sign}.1f}", value)


def _list_provenance(run: LoadedRun) -> list[tuple[str, str]]:
    """List (name, value) of folder, data, caches, versions and machine."""
    values = [("folder", run.name), ("data", run.config.data)]
    for path, fingerprint in zip(run.config.cache, run.fingerprints, strict=False):
        values.append(("cache", f"{path} {fingerprint}"))
    if result := run.result:
        values += [
            ("manifest", result["cache"]["manifest"]),
            ("rows, draws", f"{result['cache']['rows']:,}, {result['cache']['draws']}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
            ("machine", ", ".join(str(value) for value in result["machine"].values())),
        ]
    return [(name, make_printable(value, 300)) for name, value in values]
