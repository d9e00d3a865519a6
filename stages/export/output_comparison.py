"""How outputs of a student are compared: in which unit, and how many predictions differ."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class OutputComparison:
    """Compares the outputs of two runtimes for the same rows.

    Attributes:
        task: See data/tasks.py.
        unit: float32 [K] or [1], what a difference of 1 means. None for logits, which are compared as they are.
            Numbers and embeddings have units and sizes of their own: their differences are in standard deviations.
    """

    task: str = CLASSES
    unit: Logits | None = None

    @staticmethod
    def of_task(task: str, expected: Logits, output_std: tuple[float, ...] = ()) -> "OutputComparison":
        """Choose the unit of a task.

        Args:
            task: The task.
            expected: float32 [N, K], PyTorch's outputs of a split.
            output_std: Of numbers: the standard deviation of each in the training rows, the unit.

        Returns:
            The comparison. The unit of an embedding is the standard deviation of its dimensions over the split, the
            root mean square over the dimensions; 1 where nothing differs.
        """
        if task == NUMBERS:
            return OutputComparison(task, np.array(output_std, np.float32))
        if task == EMBEDDING:
            spread = np.sqrt(np.square(expected.astype(np.float64).std(0)).mean())
            return OutputComparison(task, np.array([spread if spread > 0 else 1.0], np.float32))
        return OutputComparison(task)

    @property
    def noun(self) -> str:
        """What one output is called."""
        return "logit" if self.unit is None else "number"

    def measure(self, outputs: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
        """Return the largest difference of an output [B, K], in units; NaN where one is NaN."""
        differences = np.abs(outputs - expected)
        return float((differences if self.unit is None else differences / self.unit).max())

    def count_changes(self, outputs: Logits, expected: Logits) -> int | None:
        """Count what is predicted differently: classes, or labels whose logits differ in sign; None of numbers."""
        if self.task == CLASSES:
            return int((outputs.argmax(1) != expected.argmax(1)).sum())
        return int(((outputs > 0) != (expected > 0)).sum()) if self.task == LABELS else None

    def describe_changes(self, changes: int | None, total: int, split: str = "") -> str:
        """Describe the number of changes, as "2 of 360 top-1 predictions on test change"; "" of numbers.

        Args:
            changes: See `count_changes`.
            total: Of how many: the rows, or the rows times the labels.
            split: The split, if it is to be named.
        """
        if changes is None:
            return ""
        what = "top-1 predictions" if self.task == CLASSES else "labels"
        return f"{changes} of {total:,} {what}{split and ' on ' + split} change"

    def describe_unit(self) -> str:
        """Return " standard deviations", the unit of a difference; "" of logits."""
        return "" if self.unit is None else " standard deviations"

    def to_json(self, changes: int | None) -> dict[str, Any]:
        """Return what export.json has of it beside the differences: the changes where they exist, and the unit."""
        record: dict[str, Any] = {} if changes is None else {"flips": changes}
        if self.unit is not None:
            record["unit"] = "standard deviation"
        return record
