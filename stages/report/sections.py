"""The part of a report that is about one run: images, classes, rows that stand apart, bill, provenance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from softcache.base.errors import make_printable
from softcache.pipeline.metrics.soft_targets import calibration
from softcache.stages.cli.configs import ReportConfig
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.inspect import plots as of_inspection
from softcache.stages.runs.cost import format_cost

from . import plots as drawing
from .disagreements import Loaded, disagreements
from .load import Line, LoadedRun
from .page import ClassRow, PageImage, RunPart, make_page_image
from .plots import Point
from .summary import measure_agreement
from .text import Cell, Row

_CHANNELS = 15  # of a tap, in its panel


def make_cost_plot(rows: Sequence[Row]) -> PageImage | None:
    """The plot of accuracy over size and latency, where there is a finished network to draw."""
    points = [
        Point(
            row.name if row.kind == "teacher" else row.name.rpartition("/")[2],
            row.kind,
            row.figures["accuracy"].value,
            row.figures["accuracy"].sd or 0.0,
            row.parameters,
            row.milliseconds,
        )
        for row in rows
        if row.figures["accuracy"].value is not None and not row.note
    ]
    if not any(point.parameters for point in points):
        return None
    alt = "Accuracy of " + "; ".join(f"{point.name} {100 * point.accuracy:.2f} %" for point in points)
    return make_page_image(
        "costs", drawing.plot_costs(points), alt, "Accuracy over size and over the time of one image on this machine."
    )


def make_run_section(
    run: LoadedRun,
    split: str,
    inspections: dict[str, dict[str, Any]],
    config: ReportConfig,
    loaded: Loaded,
    unfolded: bool,
) -> RunPart:
    """All that the page has of a run."""
    notes: list[str] = []
    images = [*_curves(run, notes), *_of_figures(run, split, notes), *_of_logits(run, split, notes)]
    for fingerprint in run.fingerprints:
        if fingerprint in inspections:
            images += _of_inspection(inspections[fingerprint])
    apart = disagreements(run, split, config, loaded) if config.show else []
    return RunPart(
        name=make_printable(run.name),
        state=run.state,
        open=unfolded,
        split=split,
        images=images,
        notes=notes,
        classes=_classes(run, split),
        apart=[] if isinstance(apart, str) else apart,
        not_apart=make_printable(apart, None) if isinstance(apart, str) else "",
        bill=format_cost(run.result["bill"]) if run.result else "",
        provenance=_provenance(run),
        command=format_command("student", run.config, resume=False, json=False),
    )


def _curves(run: LoadedRun, notes: list[str]) -> list[PageImage]:
    """Of the student from its first epoch, fine-tuning after distillation in the same image, and of its baseline."""
    before = run.lines["distilled"]
    own = run.lines["student"]
    student: list[list[Line]] = [
        [*(before[i] if i < len(before) else []), *(own[i] if i < len(own) else [])]
        for i in range(max(len(before), len(own)))
    ]
    if not any(student):
        return []
    trainings = {"student": student, "baseline": run.lines["baseline"]}
    if not any(key.startswith("gradient_") for seed in student for line in seed for key in line):
        notes.append("The gradients of the terms were not measured in this run.")
    image = drawing.plot_curves(trainings, run.config.epochs if run.config.finetune_epochs else 0)
    last = student[-1][-1]
    alt = f"Curves over {max(map(len, student))} epochs; at the last one the loss is {last.get('loss', 0):.4g}"
    return [
        make_page_image(
            "curves", image, alt, "Training: terms of the loss as they are weighed, their gradients, and validation."
        )
    ]


def _of_figures(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    """Confusion matrices."""
    own, teacher = run.figures("student", split), run.figures("teacher", split)
    if not own or not teacher:
        return []
    one, other = own.get("confusion"), teacher.get("confusion")
    if not one or not other:
        notes.append("No confusion matrix: there are no labels, or more than 100 classes.")
        return []
    names = _names(run, len(one))
    wrong = [(one[i][j], i, j) for i in range(len(one)) for j in range(len(one)) if i != j]
    most, i, j = max(wrong) if wrong else (0, 0, 0)
    alt = f"Confusion matrices. The student's most frequent mistake: {names[i]} taken for {names[j]}, {most:.3g} times"
    caption = "Which class is taken for which, and where the student does so more or less than its teacher."
    return [make_page_image("confusion", drawing.plot_confusion(one, other, names), alt, caption)]


def _of_logits(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    """Reliability, and agreement with the teacher where it is right and where it is wrong; over all seeds."""
    students = [seed[split] for seed in run.logits["student"] if split in seed]
    teacher = run.logits["teacher"][0].get(split) if run.logits["teacher"] else None
    if not students or teacher is None:
        if run.result:
            notes.append("The run has kept no logits: no reliability, and no agreement.")
        return []
    if not (teacher.labels >= 0).any():
        notes.append(f"The {split} split has no labels: no reliability, and no agreement by right and wrong.")
        return []
    models = {"teacher": calibration(teacher.logits, teacher.labels)}
    for model in ("baseline", "student"):
        if seeds := [seed[split] for seed in run.logits[model] if split in seed]:
            logits, labels = (np.concatenate([getattr(one, key) for one in seeds]) for key in ("logits", "labels"))
            models[model] = calibration(logits, labels)
    errors = ", ".join(f"{name} {100 * one['ece']:.2f} %" for name, one in models.items())
    found = measure_agreement([one.logits for one in students], teacher.logits, teacher.labels)
    follows = f"the student says the same in {100 * found.right[0]:.1f} % of the rows that the teacher gets right"
    also = f"and in {100 * found.wrong[0]:.1f} % of those that it gets wrong" if found.rows[1] else ""
    return [
        make_page_image(
            "reliability",
            drawing.plot_reliability(models),
            f"Reliability diagram. Calibration error: {errors}",
            "Reliability: how often a guess of some confidence is right (15 bins), and how many rows each bin has.",
        ),
        make_page_image(
            "agreement",
            drawing.plot_agreement(found),
            f"Agreement: {follows} {also}",
            "Agreement with the teacher where it is right and where it is wrong.",
        ),
    ]


def _of_inspection(record: dict[str, Any]) -> list[PageImage]:
    """What `inspect` found in the teacher of this run's cache."""
    taps, joint, channels = record["taps"], record["joint"], record["channels"]
    if not taps:
        return []
    best = f"the best tap is {record['best']}"
    return [
        make_page_image(
            "taps",
            of_inspection.plot_taps(taps, joint["teacher"], joint["majority"], joint["split"]),
            f"Feature importance of the taps: {best}",
            "Feature importance: which layers of the teacher matter.",
        ),
        make_page_image(
            "channels",
            of_inspection.plot_channels(channels, _CHANNELS),
            "Feature importance of the channels of each tap",
            "Feature importance: the first channels of each tap.",
        ),
    ]


def _names(run: LoadedRun, classes: int) -> list[str]:
    """Of the classes, as the run's teacher has kept them; else their numbers."""
    kept = [one for seed in run.logits["teacher"] for one in seed.values()]
    names = kept[0].class_names if kept else ()
    return [make_printable(name, 60) for name in names] if len(names) == classes else [str(c) for c in range(classes)]


def _classes(run: LoadedRun, split: str) -> list[ClassRow]:
    """The weakest first."""
    own, teacher = run.figures("student", split), run.figures("teacher", split)
    if not own or not teacher or "per_class" not in own or "per_class" not in teacher:
        return []
    figures, theirs = own["per_class"], teacher["per_class"]
    rows = []
    for c, name in enumerate(_names(run, len(figures["f1"]))):
        f1, other = figures["f1"][c], theirs["f1"][c]
        gap = f1 - other if f1 is not None and other is not None else None
        support = figures["support"][c]
        cells = [
            Cell(f"{support:,.0f}", support),
            *map(_percent, (figures["precision"][c], figures["recall"][c], f1, other)),
        ]
        rows.append((f1 is None, f1 or 0, ClassRow(name, [*cells, _percent(gap, "+")])))
    return [row for _, _, row in sorted(rows, key=lambda one: one[:2])]


def _percent(value: float | None, sign: str = "") -> Cell:
    return Cell("–", None) if value is None else Cell(f"{100 * value:{sign}.1f}", value)


def _provenance(run: LoadedRun) -> list[tuple[str, str]]:
    """Where everything comes from, by name."""
    found = [("folder", run.name), ("data", run.config.data)]
    found += [("cache", f"{path} {one}") for path, one in zip(run.config.cache, run.fingerprints, strict=False)]
    if result := run.result:
        found += [
            ("manifest", result["cache"]["manifest"]),
            ("rows, draws", f"{result['cache']['rows']:,}, {result['cache']['draws']}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
            ("machine", ", ".join(str(value) for value in result["machine"].values())),
        ]
    return [(name, make_printable(value, 300)) for name, value in found]
