"""Metrics of several labels are those of scikit-learn, of known labels alone; thresholds are the best ones for F1."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sk

from softcache.base.errors import UsageError
from softcache.pipeline.metrics.labels import evaluate_labels
from softcache.pipeline.metrics.thresholds import choose_thresholds, evaluate_at_thresholds, to_probabilities

N, K = 60, 5
AVERAGES = ("macro", "micro", "weighted", "samples")
Logits = NDArray[np.float32]
Several = NDArray[np.int8]


def draw(seed: int, unknown: float = 0.0, rows: int = N) -> tuple[Logits, Several]:
    """Draw logits, with ties, and labels, of which some are unknown."""
    random = np.random.default_rng(seed)
    labels = (random.random((rows, K)) < [0.1, 0.3, 0.5, 0.7, 0.4]).astype(np.int8)
    logits = np.round(2 * labels - 1 + 2 * random.normal(size=(rows, K)), 1).astype(np.float32)
    labels[random.random((rows, K)) < unknown] = -1
    return logits, labels


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_known_labels_equal_those_of_scikit_learn(seed: int) -> None:
    logits, labels = draw(seed)
    figures, predicted = evaluate_labels(logits, labels), (logits > 0).astype(int)
    for average in AVERAGES:
        assert figures[f"f1_{average}"] == close(sk.f1_score(labels, predicted, average=average, zero_division=0))
    assert figures["precision_macro"] == close(sk.precision_score(labels, predicted, average="macro", zero_division=0))
    assert figures["recall_macro"] == close(sk.recall_score(labels, predicted, average="macro"))
    assert figures["map"] == close(sk.average_precision_score(labels, logits, average="macro"))
    assert figures["auroc_macro"] == close(sk.roc_auc_score(labels, logits, average="macro"))
    columns = sk.precision_recall_fscore_support(labels, predicted, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert figures["per_label"][name] == close(list(values))
    assert figures["per_label"]["auroc"] == close(list(sk.roc_auc_score(labels, logits, average=None)))
    assert figures["nll"] == close(
        np.mean([sk.log_loss(y, p) for y, p in zip(labels.T, probabilities(logits).T, strict=True)])
    )


def probabilities(logits: Logits) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_partly_known_labels_are_of_the_known_ones(seed: int) -> None:
    """Per label scikit-learn sees its known rows; of the averages over pairs, the known pairs."""
    logits, labels = draw(seed, unknown=0.3)
    labels[7] = -1
    figures, known = evaluate_labels(logits, labels), labels >= 0
    assert (figures["rows"], figures["labelled"]) == (N, int(known.any(1).sum()))
    columns = [(labels[known[:, k], k], logits[known[:, k], k]) for k in range(K)]
    f1 = [sk.f1_score(y, z > 0, zero_division=0) for y, z in columns]
    support = [int((y == 1).sum()) for y, _ in columns]
    per_label = figures["per_label"]
    assert per_label["f1"] == close(f1)
    assert per_label["precision"] == close([sk.precision_score(y, z > 0, zero_division=0) for y, z in columns])
    assert per_label["recall"] == close([sk.recall_score(y, z > 0) for y, z in columns])
    assert per_label["average_precision"] == close([sk.average_precision_score(y, z) for y, z in columns])
    assert per_label["auroc"] == close([sk.roc_auc_score(y, z) for y, z in columns])
    assert per_label["support"] == support
    assert figures["map"] == close(np.mean(per_label["average_precision"]))
    assert figures["auroc_macro"] == close(np.mean(per_label["auroc"]))
    assert figures["f1_macro"] == close(np.mean(f1))
    assert figures["f1_weighted"] == close(np.average(f1, weights=support))
    assert figures["f1_micro"] == close(sk.f1_score(labels[known], logits[known] > 0))
    rows = [i for i in range(N) if known[i].any()]
    of_rows = [sk.f1_score(labels[i, known[i]], logits[i, known[i]] > 0, zero_division=0) for i in rows]
    assert figures["f1_samples"] == close(np.mean(of_rows))


def test_a_label_without_a_positive_row_has_no_figures_and_is_left_out_of_means() -> None:
    """scikit-learn counts such a label as 0 in its macro mean, or leaves it out of `labels`, as here."""
    logits, labels = draw(1)
    labels[:, 2] = 0
    figures, predicted, others = evaluate_labels(logits, labels), (logits > 0).astype(int), [0, 1, 3, 4]
    per_label = figures["per_label"]
    assert [per_label[name][2] for name in ("precision", "recall", "f1", "average_precision", "auroc")] == [None] * 5
    assert per_label["support"][2] == 0
    of_others = sk.f1_score(labels, predicted, average="macro", labels=others)
    assert figures["f1_macro"] == close(of_others)
    assert sk.f1_score(labels, predicted, average="macro", zero_division=0) == close(of_others * 4 / 5)
    assert figures["map"] == close(sk.average_precision_score(labels[:, others], logits[:, others]))
    assert figures["f1_micro"] == close(sk.f1_score(labels, predicted, average="micro")), "its claims are wrong ones"


def test_a_label_of_positive_rows_alone_has_no_auroc() -> None:
    logits, labels = draw(1)
    labels[:, 2] = 1
    figures = evaluate_labels(logits, labels)
    assert figures["per_label"]["auroc"][2] is None
    assert figures["per_label"]["average_precision"][2] == 1
    others = [0, 1, 3, 4]
    assert figures["auroc_macro"] == close(sk.roc_auc_score(labels[:, others], logits[:, others]))


def test_what_cannot_be_computed_is_absent_and_not_zero() -> None:
    logits, labels = draw(1)
    nothing = evaluate_labels(logits, np.full_like(labels, -1), logits)
    assert nothing == {"rows": N, "labelled": 0, "agreement": 1.0, "kl_to_teacher": 0.0}
    only_negative = evaluate_labels(logits, np.zeros_like(labels))
    for name in ("map", "f1_macro", "f1_micro", "f1_weighted", "f1_samples", "auroc_macro", "recall_macro"):
        assert only_negative[name] is None, name
    assert only_negative["nll"] > 0


def test_agreement_and_kl_to_the_teacher_are_of_all_pairs() -> None:
    logits, labels = draw(1)
    teacher, _ = draw(2)
    figures = evaluate_labels(logits, labels, teacher)
    p, q = probabilities(teacher), probabilities(logits)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert figures["kl_to_teacher"] == close(kl.mean())
    assert figures["agreement"] == close(((p > 0.5) == (q > 0.5)).mean())


@pytest.mark.parametrize(
    ("labels", "words"),
    [(np.full((N, K), 2), "not 0, 1, or -1"), (np.zeros(N, int), "are not \\[N, K\\] both")],
)
def test_wrong_labels_are_refused(labels: NDArray[Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate_labels(draw(1)[0], labels)


# Thresholds


def find_best_f1(logits: Logits, labels: Several, k: int) -> float:
    """The best F1 of a label over every threshold that separates two rows."""
    known = labels[:, k] >= 0
    y, p = labels[known, k] == 1, to_probabilities(logits[known, k])
    cuts = [0.0, *np.unique(p)]
    return max(float(2 * (y & (p > cut)).sum() / ((p > cut).sum() + y.sum())) for cut in cuts)


@pytest.mark.parametrize("unknown", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed: int, unknown: float) -> None:
    logits, labels = draw(seed, unknown)
    thresholds = choose_thresholds(logits, labels)
    at = to_probabilities(logits) > thresholds
    for k in range(K):
        known = labels[:, k] >= 0
        assert sk.f1_score(labels[known, k], at[known, k]) == close(find_best_f1(logits, labels, k))
    figures = evaluate_at_thresholds(logits, labels, thresholds)
    assert figures is not None
    assert figures["f1_macro"] >= evaluate_labels(logits, labels)["f1_macro"]
    if not unknown:
        for average in AVERAGES:
            assert figures[f"f1_{average}"] == close(sk.f1_score(labels, at, average=average, zero_division=0))
        assert figures["precision_macro"] == close(sk.precision_score(labels, at, average="macro"))
        assert figures["recall_macro"] == close(sk.recall_score(labels, at, average="macro"))


def choose_one(scores: list[float], labels: list[int]) -> float:
    z = np.log(np.array(scores) / (1 - np.array(scores)))
    return float(choose_thresholds(z[:, None], np.array(labels, np.int8)[:, None])[0])


def test_a_threshold_lies_halfway_between_neighbouring_probabilities() -> None:
    assert choose_one([0.1, 0.2, 0.4, 0.3], [0, 0, 1, 1]) == close(0.25)
    assert choose_one([0.8, 0.6, 0.9, 0.95], [0, 0, 1, 1]) == close(0.85)
    assert choose_one([0.4, 0.3, 0.2], [0, 0, 1]) == close(0.1), "all rows: halfway to 0"
    assert choose_one([0.4, 0.4, 0.2], [0, 1, 0]) == close(0.3), "equal probabilities go together"


def test_of_equally_good_thresholds_the_one_nearest_to_one_half_is_chosen() -> None:
    assert choose_one([0.99, 0.8, 0.6, 0.4], [1, 0, 0, 1]) == close(0.2), "F1 is 2/3 at 0.2 and at 0.895"
    assert choose_one([0.9, 0.6, 0.5, 0.4], [1, 0, 0, 1]) == close(0.75), "0.75 is nearer than 0.2"


def test_a_label_without_a_positive_row_has_the_threshold_one_half() -> None:
    logits, labels = draw(3)
    labels[:, 1] = np.where(labels[:, 1] == 1, -1, labels[:, 1])
    assert choose_thresholds(logits, labels)[1] == 0.5
    assert evaluate_at_thresholds(logits, np.zeros_like(labels), np.full(K, 0.5)) is None


def test_thresholds_separate_probabilities_that_are_neighbouring_floats() -> None:
    z = np.array([[40.0], [36.0], [36.5], [-800.0]])
    labels = np.array([[1], [0], [1], [0]], np.int8)
    threshold = choose_thresholds(z, labels)
    assert (to_probabilities(z) > threshold)[:, 0].tolist() == [True, False, True, False]
    assert 0 < threshold[0] < 1


def test_a_probability_that_is_rounded_to_zero_is_never_predicted() -> None:
    z, labels = np.array([[-800.0], [-900.0], [-3.0]]), np.array([[1], [1], [0]], np.int8)
    assert choose_thresholds(z, labels)[0] == 0.5
