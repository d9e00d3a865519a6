"""Whether two trained students are told apart by what they say of the same rows, in figures and in plain words."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from shlex import quote
from typing import Any

from softcache.base.errors import UsageError
from softcache.pipeline.metrics.significance import Difference, count_right_alone, mcnemar, paired_bootstrap
from softcache.stages.cli.copied_commands import program_name

from .candidates import Candidate, Predictions, find_differing_options, only_seeds_differ, read_predictions

ALPHA = 0.05  # that what is no difference is called one, in all comparisons of a command together
SIGNIFICANT, NOT_SIGNIFICANT = "real", "not told apart"
Record = dict[str, Any]


def compare_pairs(pairs: Sequence[tuple[Candidate, Candidate]], done: Callable[[int], object]) -> list[Record]:
    """A record of each pair, see `_record`. done: told of every so many resamples.

    Intervals and p are held to CHANCE over the number of pairs (Bonferroni). Holm's steps would gain a little power,
    and the interval that is printed would no longer be what decides. Raises CacheError for damaged logits.
    """
    sides = {side.name: side for pair in pairs for side in pair}
    said = {name: _read_predictions(side) for name, side in sides.items()}
    return [_record(*pair, said[pair[0].name], said[pair[1].name], ALPHA / len(pairs), done) for pair in pairs]


def _read_predictions(side: Candidate) -> Predictions | str:
    """What a side says, or why nothing is known of it."""
    try:
        said = read_predictions(side)
    except UsageError as error:
        again = f"{program_name()} student --resume --out {quote(str(side.folder))}"
        return f"{error}; of an older run it is written by  {again}"
    return said if len(said.labels) else f"the {side.split} rows of '{side.name}' have no labels"


def _record(
    first: Candidate,
    second: Candidate,
    a: Predictions | str,
    b: Predictions | str,
    chance: float,
    done: Callable[[int], object],
) -> Record:
    """What is known of the second against the first.

    accuracy, f1_macro: {value, low, high}, second less first, as shares; level: of the intervals; mcnemar: see
    `_tests`; verdict: real, not told apart (within chance, or nothing but seeds differs), or None where nothing is
    known; about: settings, or students where one of the two has a single seed: then McNemar's p must be below chance
    too; words: the verdict, or why there is none.
    """
    record: Record = {"first": first.name, "second": second.name, "split": second.split, "verdict": None}
    if isinstance(a, str) or isinstance(b, str):
        return record | {"words": a if isinstance(a, str) else b}
    if not a.has_same_rows(b):
        rows = f"{first.split} split, {len(a.labels):,} rows, and {second.split} split, {len(b.labels):,} rows"
        names = f"'{first.name}' and '{second.name}'"
        return record | {"words": f"{names} were not measured on the same rows, labels and classes ({rows})"}
    found = paired_bootstrap(a.labels, a.predictions, b.predictions, 1 - chance, done=done)
    several = min(len(first.seeds), len(second.seeds)) > 1
    tests = _tests(first, second, a, b, several)
    accuracy, p = found["accuracy"], max(test["p"] for test in tests)
    beyond = accuracy.is_significant and (several or p < chance)
    real = beyond and not only_seeds_differ(find_differing_options(first, second))
    words = _explain_seeds(several)
    if real:
        words = _explain_significant(first, second, accuracy, several)
    elif not beyond:
        words = _explain_not_significant(accuracy, p, chance, several)
    return record | {
        "rows": len(a.labels),
        "seeds": [len(first.seeds), len(second.seeds)],
        "level": 1 - chance,
        **{name: asdict(one) for name, one in found.items()},
        "mcnemar": tests,
        "verdict": SIGNIFICANT if real else NOT_SIGNIFICANT,
        "about": "settings" if several else "students",
        "words": words,
    }


def _tests(first: Candidate, second: Candidate, a: Predictions, b: Predictions, several: bool) -> list[Record]:
    """McNemar's test of seed after seed; where a side has one seed, of that one with each of the other's."""
    ones, others = (
        list(zip(first.seeds, a.predictions, strict=True)),
        list(zip(second.seeds, b.predictions, strict=True)),
    )
    tests = []
    for (one, guess), (other, against) in zip(ones, others, strict=False) if several else product(ones, others):
        alone = count_right_alone(a.labels, guess, against)
        tests.append({"seeds": [one, other], "first_alone": alone[0], "second_alone": alone[1], "p": mcnemar(*alone)})
    return tests


def _explain_significant(first: Candidate, second: Candidate, accuracy: Difference, several: bool) -> str:
    better = second.name if accuracy.value > 0 else first.name
    if several:
        words = f"{SIGNIFICANT}: {better} is the more accurate, beyond what other rows and other seeds make of it"
    else:
        words = (
            f"{SIGNIFICANT} for these trained students, on rows such as these: {better} is the more accurate."
            " Not yet for their settings: two seeds of the same settings are often told apart like this;"
            " --seeds 3 of both tells"
        )
    return words


def _explain_seeds(several: bool) -> str:
    """A difference beyond other rows (and seeds) where there is nothing but seeds that it could come from."""
    tells = "" if several else "; --seeds 3 shows how far seeds go"
    return f"{NOT_SIGNIFICANT}: other rows do not explain it, but no setting differs: it is chance of the seeds{tells}"


def _explain_not_significant(accuracy: Difference, p: float, chance: float, several: bool) -> str:
    if several:
        return f"{NOT_SIGNIFICANT}: other rows and other seeds could as well have made the difference 0"
    why = [] if accuracy.is_significant else ["the interval includes 0"]
    why += [f"McNemar's p is {p:.2g}, not below {chance:.2g}"] if p >= chance else []
    about = "That is of these trained students on these rows; another seed could give another answer"
    return f"{NOT_SIGNIFICANT}: {' and '.join(why)}. {about}; --seeds 3 of both tells"
