"""A run's student beside its baseline: the comparison of the two, and how to say how far they are apart."""

from typing import Any

from softcache.base.errors import CacheError
from softcache.pipeline.metrics.significance import RESAMPLES
from softcache.stages.cli.console import progress_bar
from softcache.stages.runs.figures import IN_PERCENT

from .candidates import read_candidate
from .significance import Record, compare_pairs


def compare_with_baseline(name: str, result: dict[str, Any]) -> Record:
    """Compare the student of a run with its baseline, as `softcache compare` does.

    Args:
        name: Folder of the run, which has a baseline.
        result: Its result.json, not yet checked.

    Returns:
        The record, second minus first being student minus baseline, see `significance.compare_pairs`.

    Raises:
        CacheError: `result` is not of a student's run, or a file of logits is damaged.
    """
    try:
        baseline, student = (read_candidate(name, model, result, model) for model in ("baseline", "student"))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise CacheError(f"'{name}/result.json' is not of a student's run") from None
    with progress_bar(RESAMPLES, "resamples", "", scale=True) as bar:
        (record,) = compare_pairs([(baseline, student)], bar.update)
    return record


def format_gap(difference: float, name: str = "accuracy") -> str:
    """Format a difference of a figure, to be followed by what it is a difference from.

    Args:
        difference: Of accuracies -1 … 1, of other figures in their units.
        name: Of the figure.

    Returns:
        Such as "1.20 points above", "0.0312 below" or "equal to".
    """
    is_share = name in IN_PERCENT
    if difference == 0 or (is_share and abs(100 * difference) < 0.005):
        return "equal to"
    size = f"{abs(100 * difference):.2f} points" if is_share else f"{abs(difference):.4g}"
    return f"{size} {'above' if difference > 0 else 'below'}"
