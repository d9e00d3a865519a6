"""Whether two trained students differ significantly on the same rows: the record of a comparison, and its verdict."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES
from softcache.pipeline.metrics.significance import Difference, count_right_alone, mcnemar, paired_bootstrap
from softcache.pipeline.metrics.task_significance import bootstrap_task
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER, TASK_FIGURES
from softcache.stages.cli.typed_command import format_resume_command
from softcache.stages.runs.figures import IN_PERCENT, TITLES

from .candidates import Candidate, Predictions, find_differing_options, only_seeds_differ, read_predictions

ALPHA = 0.05  # level of significance, of all comparisons of a command together
SIGNIFICANT, NOT_SIGNIFICANT = "real", "not told apart"  # the values of `verdict` in a record
VERDICT_TEXT = {SIGNIFICANT: "significant difference", NOT_SIGNIFICANT: "no significant difference"}
_ADVANTAGES = {
    "accuracy": "is more accurate",
    "map": "has the higher mAP",
    "rmse": "has the lower RMSE",
    "cosine": "is closer to its teacher",
}
Record = dict[str, Any]


def compare_pairs(pairs: Sequence[tuple[Candidate, Candidate]], on_progress: Callable[[int], object]) -> list[Record]:
    """Compare the two candidates of each pair.

    The level of significance is ALPHA over the number of pairs (Bonferroni), for intervals and p-values. Holm's method
    would have a little more power, but the printed interval would no longer be what decides.

    Args:
        pairs: Of at least one pair.
        on_progress: Called with the number of further resamples that are done.

    Returns:
        A record of each pair:

        - first, second: names; split: on which they were measured.
        - verdict: SIGNIFICANT; NOT_SIGNIFICANT where the difference is not significant, or only seeds differ; None
          where nothing can be computed: then only `words` follows.
        - words: The verdict for a person, or why there is none.
        - rows; seeds: number of seeds of each; level: of the intervals.
        - accuracy, f1_macro: {value, low, high}, second minus first, as shares (-1 … 1); of other tasks the figures
          of `bootstrap_task`, with task, and figure: the main one, by which the verdict is found.
        - mcnemar: see `_test_seeds`; of classes alone.
        - about: "settings", or "students" where one of the two has a single seed. Then McNemar's p of classes must be
          below the level too, and the verdict holds for these trained students only.

    Raises:
        CacheError: A file of logits is damaged.
    """
    candidates = {candidate.name: candidate for pair in pairs for candidate in pair}
    predictions = {name: _read_predictions(candidate) for name, candidate in candidates.items()}
    return [
        _compare_pair(
            first,
            second,
            first_predictions=predictions[first.name],
            second_predictions=predictions[second.name],
            alpha=ALPHA / len(pairs),
            on_progress=on_progress,
        )
        for first, second in pairs
    ]


def get_figures(record: Record) -> list[str]:
    """Return the names of the figures of a record with a verdict, the task's main figure first."""
    if "figure" not in record:
        return ["accuracy", "f1_macro"]
    names = (record["figure"], "f1_macro", "mae")
    return [name for name in names if name in record]


def format_difference(name: str, difference: float) -> str:
    """Format a difference of a figure with its sign: shares in points, others in their units."""
    if name in IN_PERCENT:
        return f"{round(100 * difference, 2) + 0.0:+.2f}"
    return f"{float(f'{difference:.4g}') + 0.0:+.4g}"


def format_interval(record: Record) -> tuple[str, str]:
    """Format the interval of the main figure and the verdict, of a record with a verdict, of one pair.

    Returns:
        Such as "95 % interval -0.60 to +1.30", in points for shares, and "no significant difference between these
        trained students".
    """
    main = get_figures(record)[0]
    low, high = (
        f"{100 * record[main][key]:+.2f}" if main in IN_PERCENT else format_difference(main, record[main][key])
        for key in ("low", "high")
    )
    verdict = VERDICT_TEXT[record["verdict"]]
    if record["about"] == "students":
        verdict += " between these trained students"
    return f"{100 * record['level']:.4g} % interval {low} to {high}", verdict


def _read_predictions(candidate: Candidate) -> Predictions | str:
    """Read the predictions of a candidate, or say why they cannot be compared."""
    try:
        predictions = read_predictions(candidate)
    except UsageError as error:
        command = format_resume_command(
            "student",
            candidate.folder,
            str(candidate.config["arch"]),
            candidate.config.get("loss", ()),
            str(candidate.config.get("data", "")),
        )
        return f"{error}; a finished run of an older version writes it with  {command}"
    if not len(predictions.labels):
        return f"the {candidate.split} rows of '{candidate.name}' have no labels"
    return predictions


def _compare_pair(
    first: Candidate,
    second: Candidate,
    *,
    first_predictions: Predictions | str,
    second_predictions: Predictions | str,
    alpha: float,
    on_progress: Callable[[int], object],
) -> Record:
    """Make the record of a pair, see `compare_pairs`. Predictions that are a str: why there are none."""
    record: Record = {"first": first.name, "second": second.name, "split": second.split, "verdict": None}
    if isinstance(first_predictions, str):
        return record | {"words": first_predictions}
    if isinstance(second_predictions, str):
        return record | {"words": second_predictions}
    labels = first_predictions.labels
    if not first_predictions.has_same_rows(second_predictions):
        return record | {
            "words": f"'{first.name}' and '{second.name}' were not measured on the same rows, labels and classes"
            f" ({first.split} split, {len(labels):,} rows, and {second.split} split,"
            f" {len(second_predictions.labels):,} rows)"
        }
    if not first_predictions.has_same_teacher(second_predictions):
        return record | {
            "words": f"'{first.name}' and '{second.name}' have other teachers, and their figure is the cosine to their"
            " own teacher's embedding"
        }
    task, main = first.task, TASK_FIGURES[first.task].main
    compute_differences = paired_bootstrap if task == CLASSES else partial(bootstrap_task, task)
    differences = compute_differences(
        labels, first_predictions.predictions, second_predictions.predictions, 1 - alpha, on_progress=on_progress
    )
    if main not in differences:
        return record | {"words": f"the {first.split} rows have too few hard targets for {TITLES[main]}"}
    difference, has_several_seeds = differences[main], min(len(first.seeds), len(second.seeds)) > 1
    tests, p = [], 0.0
    if task == CLASSES:
        tests = _test_seeds(first, second, first_predictions, second_predictions)
        p = max(test["p"] for test in tests)
    is_beyond_rows = difference.is_significant and (has_several_seeds or p < alpha)
    is_significant = is_beyond_rows and not only_seeds_differ(find_differing_options(first, second))
    if is_significant:
        is_second_better = (difference.value > 0) != (main in LOWER_IS_BETTER)
        better = second.name if is_second_better else first.name
        explanation = _explain_significant(f"{better} {_ADVANTAGES[main]}", has_several_seeds)
    elif is_beyond_rows:
        explanation = _explain_seeds(has_several_seeds)
    else:
        explanation = _explain_not_significant(difference, p, alpha, has_several_seeds)
    return record | {
        **({} if task == CLASSES else {"task": task, "figure": main}),
        "rows": len(labels),
        "seeds": [len(first.seeds), len(second.seeds)],
        "level": 1 - alpha,
        **{name: asdict(each) for name, each in differences.items()},
        **({"mcnemar": tests} if task == CLASSES else {}),
        "verdict": SIGNIFICANT if is_significant else NOT_SIGNIFICANT,
        "about": "settings" if has_several_seeds else "students",
        "words": explanation,
    }


def _test_seeds(
    first: Candidate, second: Candidate, first_predictions: Predictions, second_predictions: Predictions
) -> list[Record]:
    """Run McNemar's test on pairs of seeds.

    With several seeds of both candidates, the n-th of one with the n-th of the other; else the single seed of one with
    each seed of the other.

    Returns:
        Of each test {seeds: the two seeds, first_alone, second_alone: rows that only that one predicts right, p}.
    """
    labels = first_predictions.labels
    first_seeds = zip(first.seeds, first_predictions.predictions, strict=True)
    second_seeds = zip(second.seeds, second_predictions.predictions, strict=True)
    if min(len(first.seeds), len(second.seeds)) > 1:
        seed_pairs = list(zip(first_seeds, second_seeds, strict=False))
    else:
        seed_pairs = list(product(first_seeds, second_seeds))
    tests = []
    for (first_seed, first_classes), (second_seed, second_classes) in seed_pairs:
        first_alone, second_alone = count_right_alone(labels, first_classes, second_classes)
        tests.append(
            {
                "seeds": [first_seed, second_seed],
                "first_alone": first_alone,
                "second_alone": second_alone,
                "p": mcnemar(first_alone, second_alone),
            }
        )
    return tests


def _explain_significant(advantage: str, has_several_seeds: bool) -> str:
    """Explain a significant difference. advantage: such as "runs/a is more accurate"."""
    text = VERDICT_TEXT[SIGNIFICANT]
    if has_several_seeds:
        return f"{text}: {advantage}, by more than other rows and other seeds can explain"
    return (
        f"{text} between these trained students, on rows like these: {advantage}. It does not yet follow"
        " for their settings: two seeds of the same settings often differ significantly too; train both with --seeds 3"
    )


def _explain_seeds(has_several_seeds: bool) -> str:
    """Explain a difference that is beyond chance of the rows, between candidates with the same settings."""
    advice = "" if has_several_seeds else "; --seeds 3 measures how much seeds vary"
    return (
        f"{VERDICT_TEXT[NOT_SIGNIFICANT]} between settings: other rows cannot explain the difference, but no setting"
        f" differs, so it comes from the seeds{advice}"
    )


def _explain_not_significant(difference: Difference, p: float, alpha: float, has_several_seeds: bool) -> str:
    text = VERDICT_TEXT[NOT_SIGNIFICANT]
    if has_several_seeds:
        return f"{text}: with other rows and other seeds it could be 0"
    reasons = []
    if not difference.is_significant:
        reasons.append("the interval includes 0")
    if p >= alpha:
        reasons.append(f"McNemar's p is {p:.2g}, not below {alpha:.2g}")
    return (
        f"{text}: {' and '.join(reasons)}. This holds for these trained students on these rows, and may not for other"
        " seeds; train both with --seeds 3"
    )
