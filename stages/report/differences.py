"""How student and teacher differ on a row, for each task: the rows that differ most, and the bars below an image."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, rel_entr, softmax

from softcache.data.tasks import EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.metrics.classification import log_softmax
from softcache.pipeline.metrics.distances import cosines
from softcache.stages.runs.logits import SplitLogits

Floats = NDArray[np.float64]
_BARS, _MIN_PROBABILITY = 3, 0.005  # classes of each distribution that get a bar, and the least that one needs
_MOST_BARS = 6  # of labels and numbers

# What the bars and the number of an image are, {task: text}; of classes where a task is not listed.
DIFFER_BY = {
    LABELS: "probabilities in %; Jensen–Shannon divergence in bits, mean over the labels",
    NUMBERS: "numbers, from the least to the largest of the split; difference in standard deviations of the teacher",
    EMBEDDING: "1 minus the cosine of the two embeddings",
}
DIFFER_BY_OF_CLASSES = "probabilities in %; Jensen–Shannon divergence in bits"


@dataclass(frozen=True)
class Bar:
    """The values of teacher and student for a class, a label or an output.

    Attributes:
        name: Of the class, label or output.
        teacher, student: Lengths of the bars, 0 … 1.
        teacher_text, student_text: The values.
    """

    name: str
    teacher: float
    student: float
    teacher_text: str
    student_text: str


def rank_disagreements(
    student: NDArray[np.floating], teacher: NDArray[np.floating], count: int
) -> list[tuple[int, float]]:
    """Find the rows whose two distributions differ most, by their Jensen-Shannon divergence.

    Args:
        student: Logits [N, K].
        teacher: Logits [N, K].
        count: Of rows to return, at most.

    Returns:
        (row, divergence in bits), the largest divergence first.

    Source:
        Lin 1991, Divergence measures based on the Shannon entropy.
    """
    divergences = _compute_divergences(np.exp(log_softmax(student)), np.exp(log_softmax(teacher)))
    return _rank(divergences, count)


def rank_rows(task: str, student: SplitLogits, teacher: SplitLogits, count: int) -> list[tuple[int, float]]:
    """Find the rows on which student and teacher differ most.

    Args:
        task: See data/tasks.py.
        student, teacher: Their outputs on the split, of one shape.
        count: Of rows to return, at most.

    Returns:
        (row, difference), the largest difference first: see DIFFER_BY.
    """
    z, t = student.logits.astype(np.float64), teacher.logits.astype(np.float64)
    if task == LABELS:
        p, q = (np.stack([expit(x), expit(-x)]) for x in (z, t))
        mean = (p + q) / 2
        divergences = (rel_entr(p, mean) + rel_entr(q, mean)).sum(0) / 2 / np.log(2)
        return _rank(divergences.mean(1), count)
    if task == NUMBERS:
        std = t.std(0)
        return _rank((np.abs(z - t) / np.where(std > 0, std, 1.0)).mean(1), count)
    if task == EMBEDDING:
        return _rank(1 - cosines(z, t), count)
    return rank_disagreements(student.logits, teacher.logits, count)


def _compute_divergences(p: Floats, q: Floats) -> Floats:
    """Compute the Jensen-Shannon divergence in bits of the distributions [N, K] of each row."""
    mean = (p + q) / 2
    return np.asarray((rel_entr(p, mean).sum(1) + rel_entr(q, mean).sum(1)) / 2 / np.log(2))


def _rank(differences: Floats, count: int) -> list[tuple[int, float]]:
    order = np.argsort(-differences, kind="stable")[:count]
    return [(int(row), float(differences[row])) for row in order]


def format_distance(task: str, difference: float) -> str:
    """Format the difference of a row with its unit."""
    if task == NUMBERS:
        return f"{difference:.2f} standard deviations"
    return f"1 - cosine {difference:.3f}" if task == EMBEDDING else f"{difference:.2f} bits"


def describe_label(task: str, split: SplitLogits, row: int) -> tuple[str, str | None]:
    """Return what the hard target of a row is called, and its text; None where it is not known."""
    label = split.labels[row]
    if task == LABELS:
        names = [name for name, value in zip(split.class_names, label, strict=True) if value == 1]
        return "true labels", (", ".join(names) or "none") if (label >= 0).any() else None
    if task == NUMBERS:
        is_unknown = np.isnan(label).all()
        return "target", None if is_unknown else ", ".join("?" if np.isnan(y) else f"{y:.4g}" for y in label)
    if label < 0:
        return "true class", None
    is_named = 0 <= label < len(split.classes)  # the outputs of an embedding are no classes
    if task == EMBEDDING:
        return "class", split.classes[label] if is_named else str(label)
    return "true class", split.class_names[label]


def make_bars(task: str, student: SplitLogits, teacher: SplitLogits, row: int) -> list[Bar]:
    """Make the bars below the image of a row; none of an embedding."""
    z, t = student.logits[row], teacher.logits[row]
    if task == EMBEDDING:
        return []
    if task == NUMBERS:
        lows = np.minimum(student.logits.min(0), teacher.logits.min(0))
        spans = np.maximum(student.logits.max(0), teacher.logits.max(0)) - lows
        lengths = [(x - lows) / np.where(spans > 0, spans, 1) for x in (t, z)]
        order = np.argsort(-np.abs(lengths[0] - lengths[1]), kind="stable")[:_MOST_BARS].tolist()
        return [
            Bar(student.class_names[d], float(lengths[0][d]), float(lengths[1][d]), f"{t[d]:.3g}", f"{z[d]:.3g}")
            for d in order
        ]
    if task == LABELS:
        p, q = expit(t), expit(z)
        order = np.argsort(-np.abs(p - q), kind="stable")[:_MOST_BARS].tolist()
    else:
        p, q = softmax(t), softmax(z)
        top_classes = dict.fromkeys([*np.argsort(-p)[:_BARS].tolist(), *np.argsort(-q)[:_BARS].tolist()])
        order = [c for c in top_classes if max(p[c], q[c]) >= _MIN_PROBABILITY]
    return [
        Bar(student.class_names[c], float(p[c]), float(q[c]), f"{100 * p[c]:.0f}", f"{100 * q[c]:.0f}") for c in order
    ]
