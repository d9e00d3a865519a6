"""Figures of a model on a split, any of which may be absent: images without labels have no accuracy.

Whatever reads a figure of a result reads it through `Figures`, whose methods return None, or print "-", for a figure
that is absent. mypy then refuses arithmetic on a figure that may not be there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS

TITLES = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "nll": "NLL",
    "agreement": "agreement",
    "kl_to_teacher": "KL to teacher",
    "recall_tail": "tail recall",
    "map": "mAP",
    "f1_micro": "micro F1",
    "at_thresholds.f1_macro": "F1 tuned",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "spearman": "Spearman",
    "rmse_to_teacher": "RMSE to teacher",
    "r2_to_teacher": "R² to teacher",
    "cosine": "cosine",
    "knn": "kNN accuracy",
    "probe": "probe accuracy",
    "centroid_1": "1-shot accuracy",
    "centroid_5": "5-shot accuracy",
    "cka": "CKA",
    "overlap": "overlap@10",
}
# Shares, which are shown in percent, and whose differences are in points.
IN_PERCENT = frozenset(
    (
        "accuracy",
        "agreement",
        "auroc_macro",
        "centroid_1",
        "centroid_5",
        "ece",
        "f1_macro",
        "f1_micro",
        "f1_samples",
        "f1_weighted",
        "knn",
        "map",
        "overlap",
        "precision_macro",
        "probe",
        "recall_macro",
    )
)
# The figures of a table: with labels, and what can be measured without them.
LABELLED_COLUMNS: tuple[str, ...] = ("accuracy", "f1_macro", "agreement")
UNLABELLED_COLUMNS: tuple[str, ...] = ("agreement", "kl_to_teacher")
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of each task, with labels and without
    CLASSES: (LABELLED_COLUMNS, UNLABELLED_COLUMNS),
    LABELS: (("map", "f1_macro", "at_thresholds.f1_macro", "agreement"), UNLABELLED_COLUMNS),
    NUMBERS: (("rmse", "mae", "r2", "r2_to_teacher"), ("rmse_to_teacher", "r2_to_teacher")),
    EMBEDDING: (("knn", "probe", "cosine", "cka", "overlap"), ("cosine", "cka", "overlap")),
}


def get_task(result: Mapping[str, Any]) -> str:
    """Return the task of a result.json, which names none where it is "classes"."""
    return str(result.get("task", CLASSES))


def list_columns(task: str, has_labels: bool) -> tuple[str, ...]:
    """List the figures of a table of results."""
    return _COLUMNS[task][0 if has_labels else 1]


@dataclass(frozen=True)
class Figures:
    """The figures of a model on one split.

    Args:
        values: {name: value}, as `pipeline.metrics.classification.evaluate` returns them or a result.json holds them.
            Values that are not numbers are treated as absent.
    """

    values: Mapping[str, Any]

    def get(self, name: str) -> float | None:
        """Return a figure, None where it is absent; `at_thresholds.f1_macro` is the one within another."""
        value: Any = self.values
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def has_labels(self) -> bool:
        """Whether any row of the split had a hard target."""
        return bool(self.get("labelled")) or self.get("accuracy") is not None

    def format(self, name: str, absent: str = "-") -> str:
        """Format a figure with four digits; `absent` where there is none."""
        value = self.get(name)
        return absent if value is None else f"{value:.4f}"

    def describe(self, names: Iterable[str], absent: str = "no labels to compare with") -> str:
        """Format the figures that are there, `accuracy 0.9812, NLL 0.0713`; `absent` where there is none of them."""
        parts = [f"{TITLES[name]} {self.format(name)}" for name in names if self.get(name) is not None]
        return ", ".join(parts) or absent


def choose_split(figures: Mapping[str, Any]) -> str:
    """Return the split on which a model is reported: `test` where there is one, else `val`.

    Args:
        figures: {split: figures} of the model, and other keys; a split that is missing may also be None.
    """
    return "test" if figures.get("test") else "val"


def choose_labelled_split(figures: Mapping[str, Any]) -> str:
    """Return the split on which a model's accuracy is reported: `test`, or `val` where test has no labels."""
    has_labels = bool(figures.get("test")) and Figures(figures["test"]).has_labels()
    return "test" if has_labels else "val"
