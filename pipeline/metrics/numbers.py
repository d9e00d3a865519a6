"""Metrics of numbers: each output is compared with its hard target, and averaged over the outputs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.tasks import find_known

from .arrays import Array, check_outputs, mean_of_known, to_numpy

Floats = NDArray[np.float64]
_NAMES = ("mae", "rmse", "r2", "spearman")


def evaluate_numbers(outputs: Array, labels: Array, teacher_outputs: Array | None = None) -> dict[str, Any]:
    """Compute every metric of numbers, in the units of the data.

    Numbers that are not known are left out.

    Args:
        outputs: float [N, D].
        labels: float [N, D], NaN where unknown.
        teacher_outputs: float [N, D]; None where there is no teacher.

    Returns:
        {name: value}. Without labels only rows, labelled, rmse_to_teacher and r2_to_teacher.

        rows, labelled: Numbers of rows, and of those with a known number.
        rmse_to_teacher, r2_to_teacher: Root mean squared difference from the teacher's numbers, and the share of their
            variance that the model explains; means over the outputs.
        mae, rmse: Mean absolute error, root mean squared error; means over the outputs.
        r2, spearman: Share of the variance that is explained, rank correlation; means over the outputs of which at
            least two numbers differ, None where there is none.
        per_output: The last four of each output, [D]; None where not defined.

    Raises:
        UsageError: An argument has another shape or type, or outputs are not finite.
    """
    z, y = to_numpy("outputs", outputs).astype(np.float64), to_numpy("labels", labels).astype(np.float64)
    teacher = None if teacher_outputs is None else to_numpy("teacher_outputs", teacher_outputs).astype(np.float64)
    check_outputs(z, y, teacher)
    if infinite := int(np.isinf(y).any(1).sum()):
        raise UsageError(f"labels are infinite in {infinite} of {len(y)} rows: expected numbers, NaN where unknown")
    result: dict[str, Any] = {"rows": len(y), "labelled": int(find_known(y).sum())}
    if teacher is not None:
        of_teacher = [_compute_metrics(z[:, d], teacher[:, d]) for d in range(z.shape[1])]
        result["rmse_to_teacher"] = mean_of_known([figures["rmse"] for figures in of_teacher])
        result["r2_to_teacher"] = mean_of_known([figures["r2"] for figures in of_teacher])
    if result["labelled"]:
        known = ~np.isnan(y)
        figures = [_compute_metrics(z[known[:, d], d], y[known[:, d], d]) for d in range(z.shape[1])]
        per_output = {name: [each[name] for each in figures] for name in _NAMES}
        result |= {name: mean_of_known(per_output[name]) for name in _NAMES}
        result["per_output"] = per_output
    return result


def summarize_numbers(outputs: NDArray[np.floating], labels: NDArray[Any]) -> dict[str, float]:
    """Compute the metrics that are shown during training: rmse, mae and r2; none without labels.

    Args:
        outputs: float [N, D].
        labels: float [N, D], NaN where unknown.
    """
    figures = evaluate_numbers(outputs, labels)
    return {name: figures[name] for name in ("rmse", "mae", "r2") if figures.get(name) is not None}


def _compute_metrics(outputs: Floats, numbers: Floats) -> dict[str, float | None]:
    """Compute the metrics of one output [n]; None for each where nothing is known of it."""
    if not len(numbers):
        return dict.fromkeys(_NAMES)
    from scipy.stats import spearmanr  # not at the top: they take 1 s to import, and students of classes need neither
    from sklearn.metrics import r2_score

    varies = len(numbers) > 1 and bool(np.ptp(numbers) > 0)
    ranks_vary = varies and bool(np.ptp(outputs) > 0)
    return {
        "mae": float(np.abs(outputs - numbers).mean()),
        "rmse": float(np.sqrt(np.square(outputs - numbers).mean())),
        "r2": float(r2_score(numbers, outputs)) if varies else None,
        "spearman": float(spearmanr(outputs, numbers).statistic) if ranks_vary else None,
    }
