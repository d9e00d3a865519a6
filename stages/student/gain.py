"""How far a student is from its baseline, with the interval and the verdict that `compare` computes."""

from pathlib import Path
from typing import Any

from softcache.pipeline.metrics.significance import RESAMPLES
from softcache.stages.cli.console import progress_bar
from softcache.stages.compare.candidates import read_candidate
from softcache.stages.compare.significance import SIGNIFICANT, compare_pairs, format_accuracy_interval


def explain_gain(result: dict[str, Any], folder: Path) -> list[str]:
    """Explain how far the student is from the baseline in accuracy, whether that is significant, and why.

    The paired interval is over the rows of the split; with several seeds also over the seeds.

    Args:
        result: the content of result.json.
        folder: of the run, with the logits of both.

    Returns:
        A sentence a line; none without a baseline or without labels.

    Raises:
        CacheError: when a file of logits is damaged.
    """
    split = "test" if "test" in result["student"] else "val"
    if "baseline" not in result or result["student"][split].get("accuracy") is None:
        return []
    baseline, student = (read_candidate(str(folder), model, result, model) for model in ("baseline", "student"))
    with progress_bar(RESAMPLES, "resamples", "", scale=True) as bar:
        (record,) = compare_pairs([(baseline, student)], bar.update)
    gap = _format_gap(result["student"][split]["accuracy"] - result["baseline"][split]["accuracy"])
    if record["verdict"] is None:
        return [f"The student from the cache is {gap} the baseline; no interval: {record['words']}."]
    interval, verdict = format_accuracy_interval(record)
    lines = [f"The student from the cache is {gap} the baseline ({interval}): {verdict}."]
    labelled, rows = result["settings"]["labelled"], result["cache"]["rows"]
    if not labelled:
        return [*lines, f"Both saw the same {rows:,} images, in the same order, for the same number of steps."]
    lines.append(
        f"The baseline learned from {labelled} labels; the student from the teacher's logits on all {rows:,} images."
    )
    if record["verdict"] == SIGNIFICANT and record["accuracy"]["value"] > 0:
        lines.append(
            f"The gain comes from the other {rows - labelled:,} images, whose labels the teacher was trained on: on"
            f" the same {labelled} rows alone distillation gains next to nothing."
        )
    return lines


def _format_gap(difference: float) -> str:
    """Format a difference of accuracies (-1 … 1), to be followed by a name."""
    points = 100 * difference
    if abs(points) < 0.005:
        return "equal to"
    return f"{abs(points):.2f} points {'above' if points > 0 else 'below'}"
