"""The parts of a run's section that only tasks beside classes have: their plots, and the table of outputs."""

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import make_printable
from softcache.data.tasks import EMBEDDING, LABELS, find_known
from softcache.pipeline.metrics.distances import cosines

from .load import LoadedRun
from .page import ClassRow, PageImage, make_page_image
from .table import Cell
from .task_plots import plot_cosines, plot_label_f1, plot_numbers


def plot_task(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    """Plot what a task has in place of confusions and calibration; nothing of an unfinished run.

    Args:
        run: Of labels, numbers or an embedding.
        split: On which it was measured.
        notes: Why a plot is missing; added to.
    """
    if not run.result:
        return []
    if run.task == LABELS:
        return _plot_labels(run, split, notes)
    return _plot_cosines(run, split, notes) if run.task == EMBEDDING else _plot_numbers(run, split, notes)


def list_class_names(run: LoadedRun, classes: int) -> list[str]:
    """List the names of classes, labels or outputs as stored with the teacher's logits; else their numbers."""
    stored = [split_logits for splits in run.logits["teacher"] for split_logits in splits.values()]
    names = stored[0].class_names if stored else ()
    if len(names) != classes:
        return [str(c) for c in range(classes)]
    return [make_printable(name, 60) for name in names]


def _plot_labels(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    f1 = {}
    for model in ("teacher", "baseline", "student"):
        if lists := (run.get_metrics(model, split) or {}).get("per_label"):
            f1[model] = lists["f1"]
    if "student" not in f1 or all(value is None for value in f1["student"]):
        notes.append(f"No F1 of each label: the {split} split has no labels.")
        return []
    names = list_class_names(run, len(f1["student"]))
    values = (f"{name} {100 * x:.1f} %" for name, x in zip(names, f1["student"], strict=True) if x is not None)
    return [
        make_page_image(
            "labels",
            plot_label_f1(f1, names),
            alt=f"F1 of each label, of the student: {', '.join(values)}",
            caption="F1 of each label, where a logit above 0 predicts a label; the lowest of the student first.",
        )
    ]


def _plot_numbers(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    outputs: dict[str, NDArray[np.float32]] = {}
    for model in ("teacher", "baseline", "student"):
        if run.logits[model] and split in run.logits[model][0]:
            stored = run.logits[model][0][split]
            outputs[model] = stored.logits
    if "student" not in outputs:
        notes.append("The run has no files of outputs: predicted and true numbers are not drawn.")
        return []
    if not find_known(stored.labels).any():
        notes.append(f"The {split} split has no numbers to compare with: predicted and true ones are not drawn.")
        return []
    seed = ", of the first seed" if len(run.logits["student"]) > 1 else ""
    return [
        make_page_image(
            "numbers",
            plot_numbers(outputs, stored.labels, list_class_names(run, stored.logits.shape[1])),
            alt=f"Predicted over true numbers of {', '.join(outputs)}",
            caption=f"Predicted over true numbers{seed}, in the units of the data.",
        )
    ]


def _plot_cosines(run: LoadedRun, split: str, notes: list[str]) -> list[PageImage]:
    teacher = run.logits["teacher"][0].get(split) if run.logits["teacher"] else None
    students = [splits[split].logits for splits in run.logits["student"] if split in splits]
    if teacher is None or not students:
        notes.append("The run has no files of outputs: the cosine of each row is not drawn.")
        return []
    if students[0].shape != teacher.logits.shape:
        notes.append("The embeddings of student and teacher differ in width: they have no cosine.")
        return []
    values = np.concatenate([cosines(z.astype(np.float64), teacher.logits.astype(np.float64)) for z in students])
    return [
        make_page_image(
            "cosines",
            plot_cosines(values),
            alt=f"Cosine of student and teacher: mean {values.mean():.4f}, least {values.min():.4f}",
            caption="How near the student's embedding of each row is to its teacher's.",
        )
    ]


def make_output_rows(run: LoadedRun, split: str) -> list[ClassRow]:
    """Make the table of the outputs of a run of numbers, the largest RMSE first and unknown ones last."""
    student = (run.get_metrics("student", split) or {}).get("per_output")
    teacher = (run.get_metrics("teacher", split) or {}).get("per_output")
    if not student or not teacher:
        return []
    rows: list[tuple[tuple[bool, float], ClassRow]] = []
    for d, name in enumerate(list_class_names(run, len(student["rmse"]))):
        rmse, teacher_rmse = student["rmse"][d], teacher["rmse"][d]
        cells = [
            *(_format_number(student[key][d]) for key in ("rmse", "mae", "r2", "spearman")),
            _format_number(teacher_rmse),
            _format_number(None if rmse is None or teacher_rmse is None else rmse - teacher_rmse, "+"),
        ]
        rows.append(((rmse is None, -(rmse or 0.0)), ClassRow(name, cells)))
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _format_number(value: float | None, sign: str = "") -> Cell:
    return Cell("–", None) if value is None else Cell(f"{value:{sign}.4g}", value)
