"""How far a student is from its baseline, with the interval and the verdict that `compare` computes."""

from pathlib import Path
from typing import Any

from softcache.data.tasks import CLASSES
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER, TASK_FIGURES
from softcache.stages.compare.baseline import compare_with_baseline, format_gap
from softcache.stages.compare.significance import SIGNIFICANT, format_interval
from softcache.stages.runs.figures import TITLES, Figures, choose_split, get_task


def explain_gain(result: dict[str, Any], folder: Path, labelled_rows: int = 0) -> list[str]:
    """Explain how far the student is from the baseline in the task's main figure, whether significantly, and why.

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
    split, task = choose_split(result["student"]), get_task(result)
    main = TASK_FIGURES[task].main
    if "baseline" not in result or not Figures(result["student"][split]).has_labels():
        return []
    figures = [Figures(result[model][split]).get(main) for model in ("student", "baseline")]
    if figures[0] is None or figures[1] is None:
        return []
    record = compare_with_baseline(str(folder), result)
    gap = format_gap(figures[0] - figures[1], main)
    subject = "The student from the cache is"
    if task != CLASSES:  # "RMSE (lower is better) of the student from the cache is 0.21 below the baseline (…)"
        direction = " (lower is better)" if main in LOWER_IS_BETTER else ""
        subject = f"{TITLES[main]}{direction} of the student from the cache is"
    if record["verdict"] is None:
        return [f"{subject} {gap} the baseline; no interval: {record['words']}."]
    interval, verdict = format_interval(record)
    lines = [f"{subject} {gap} the baseline ({interval}): {verdict}."]
    labelled, rows = result["settings"]["labelled"], result["cache"]["rows"]
    if not labelled and not labelled_rows:
        return [*lines, f"Both saw the same {rows:,} images, in the same order, for the same number of steps."]
    labels, logits = ("labels", "logits") if task == CLASSES else ("images with hard targets", "outputs")
    lines.append(
        f"The baseline learned from {labelled or labelled_rows} {labels}; the student from the teacher's {logits} on"
        f" all {rows:,} images."
    )
    # What follows was measured for classes.
    if task == CLASSES and labelled and record["verdict"] == SIGNIFICANT and record["accuracy"]["value"] > 0:
        lines.append(
            f"The gain comes from the other {rows - labelled:,} images, whose labels the teacher was trained on: on"
            f" the same {labelled} rows alone distillation gains next to nothing."
        )
    return lines
