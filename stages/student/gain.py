"""How far a student is from its baseline, with the interval and the verdict that `compare` computes."""

from pathlib import Path
from typing import Any

from softcache.data.tasks import CLASSES
from softcache.stages.compare.baseline import compare_with_baseline, format_gap
from softcache.stages.compare.significance import SIGNIFICANT, format_accuracy_interval
from softcache.stages.runs.figures import Figures, choose_split, get_task


def explain_gain(result: dict[str, Any], folder: Path, labelled_rows: int = 0) -> list[str]:
    """Explain how far the student is from the baseline in accuracy, whether that is significant, and why.

    The paired interval is over the rows of the split; with several seeds also over the seeds.

    Args:
        result: the content of result.json.
        folder: of the run, with the logits of both.
        labelled_rows: number of training images that have a label, where others have none; 0 where all have one.

    Returns:
        A sentence a line; none without a baseline or without labels.

    Raises:
        CacheError: when a file of logits is damaged.
    """
    split = choose_split(result["student"])
    if get_task(result) != CLASSES or "baseline" not in result or not Figures(result["student"][split]).has_labels():
        return []
    record = compare_with_baseline(str(folder), result)
    gap = format_gap(result["student"][split]["accuracy"] - result["baseline"][split]["accuracy"])
    if record["verdict"] is None:
        return [f"The student from the cache is {gap} the baseline; no interval: {record['words']}."]
    interval, verdict = format_accuracy_interval(record)
    lines = [f"The student from the cache is {gap} the baseline ({interval}): {verdict}."]
    labelled, rows = result["settings"]["labelled"], result["cache"]["rows"]
    if not labelled and not labelled_rows:
        return [*lines, f"Both saw the same {rows:,} images, in the same order, for the same number of steps."]
    lines.append(
        f"The baseline learned from {labelled or labelled_rows} labels; the student from the teacher's logits on all"
        f" {rows:,} images."
    )
    if labelled and record["verdict"] == SIGNIFICANT and record["accuracy"]["value"] > 0:
        lines.append(
            f"The gain comes from the other {rows - labelled:,} images, whose labels the teacher was trained on: on"
            f" the same {labelled} rows alone distillation gains next to nothing."
        )
    return lines
