"""What 8 bits cost: the loss of a student's main figure, by task, and whether --most-drop accepts it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, HardTargets, find_known
from softcache.pipeline.metrics.distances import cosines
from softcache.pipeline.metrics.numbers import evaluate_numbers
from softcache.stages.runs.figures import TITLES

from .output_comparison import Logits, OutputComparison

_FIGURES = {CLASSES: "accuracy", LABELS: "map"}


@dataclass(frozen=True)
class Int8Loss:
    """The loss of a student by quantisation.

    Attributes:
        drop: What is compared with --most-drop: the loss of accuracy or of mAP; without labels the share of
            predictions that change, which is the most that the accuracy can have lost; of numbers the relative
            increase of the RMSE, a mean over the outputs; of an embedding 1 - its mean cosine to that in float32.
        changes: Predictions that change; None of numbers and embeddings.
        before, after: The main figure in float32 and int8; None without labels, and of an embedding.
        figure: Its name in result.json; "" where there is none.
        text: The drop in words, such as "loses 1.20 points of accuracy".
        unit: Of the number in the text: "points", "%" or "".
    """

    drop: float
    changes: int | None
    before: float | None
    after: float | None
    figure: str
    text: str
    unit: str = "points"

    def describe_limit(self, most_drop: float) -> str:
        """Describe --most-drop in the unit of the text, such as "1 of --most-drop 0.01"."""
        number = {"points": f"{100 * most_drop:g} of ", "%": f"{100 * most_drop:g} % of ", "": ""}[self.unit]
        return f"{number}--most-drop {most_drop:g}"

    def to_json(self, task: str) -> dict[str, Any]:
        """Return the keys of `int8` in export.json that state the loss."""
        if task == CLASSES:
            return {"accuracy_before": self.before, "accuracy_after": self.after, "drop": self.drop}
        figures = {"figure": self.figure, "before": self.before, "after": self.after} if self.figure else {}
        return {**figures, "drop": self.drop}


def measure_int8_loss(
    comparison: OutputComparison,
    *,
    outputs: Logits,
    expected: Logits,
    labels: HardTargets,
    teacher: Logits,
    before: dict[str, Any],
    after: dict[str, Any],
) -> Int8Loss:
    """Measure what quantisation costs on a split.

    Args:
        comparison: How outputs of the task are compared.
        outputs: float32 [N, K] of the int8 file.
        expected: float32 [N, K] in float32.
        labels: Hard targets of the split.
        teacher: float32 [N, K], the teacher's outputs. Numbers without labels are compared with them.
        before, after: The figures of the split in float32 and in int8.
    """
    if comparison.task == EMBEDDING:
        drop = 1 - float(cosines(outputs.astype(np.float64), expected.astype(np.float64)).mean())
        return Int8Loss(drop, None, None, None, "", f"changes embeddings by {drop:.4f} (1 - cosine)", "")
    if comparison.task == NUMBERS:
        return _measure_rmse(outputs, expected, labels, teacher)
    changes = comparison.count_changes(outputs, expected)
    assert changes is not None
    figure = _FIGURES[comparison.task]
    old, new = before.get(figure), after.get(figure)
    title = TITLES[figure]
    if old is not None and new is not None:
        drop = old - new
        return Int8Loss(drop, changes, old, new, figure, f"loses {100 * drop:.2f} points of {title}")
    drop = changes / (len(expected) if comparison.task == CLASSES else expected.size)
    if comparison.task == LABELS:
        return Int8Loss(drop, changes, None, None, "", f"changes {100 * drop:.2f} % of the labels", "%")
    return Int8Loss(drop, changes, None, None, "", f"loses {100 * drop:.2f} points of {title}")


def _measure_rmse(outputs: Logits, expected: Logits, labels: HardTargets, teacher: Logits) -> Int8Loss:
    """Compare the errors of numbers, from labels or else from the teacher's numbers."""
    has_labels = bool(find_known(labels).any())
    targets, figure = (labels, "rmse") if has_labels else (teacher, "rmse_to_teacher")
    before, after = evaluate_numbers(expected, targets), evaluate_numbers(outputs, targets)
    increases = [
        new / old - 1 if old else float(new > 0)
        for old, new in zip(before["per_output"]["rmse"], after["per_output"]["rmse"], strict=True)
        if old is not None
    ]
    drop = float(np.mean(increases))
    text = f"raises the {TITLES[figure]} by {100 * drop:.2f} %"
    return Int8Loss(drop, None, before["rmse"], after["rmse"], figure, text, "%")
