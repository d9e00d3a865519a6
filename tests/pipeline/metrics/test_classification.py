"""Metrics: every figure of a result against the same figure counted in plain Python."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.pipeline.metrics.classification import evaluate, log_softmax, mean_and_spread, rank_labels, summarize

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def drawn(N: int, K: int, seed: int = 0, right: float = 1.0) -> tuple[Floats, Labels]:
    """Logits with some idea of the labels, and labels in which every class occurs."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(K), random.integers(0, K, N - K)])
    random.shuffle(labels)
    return random.normal(size=(N, K)) + right * np.eye(K)[labels], labels


# The figures once more, by counting


def softmax_by_hand(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / math.fsum(powers) for p in powers]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def scores_by_hand(guess: list[int], labels: list[int], K: int) -> list[tuple[float, float, float, int]]:
    """(precision, recall, F1, support) of each class, 0 where there is nothing to divide by."""
    found = []
    for c in range(K):
        hits = sum(g == c and y == c for g, y in zip(guess, labels, strict=True))
        said, there = guess.count(c), labels.count(c)
        precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        found.append((precision, recall, f1, there))
    return found


def auroc_by_hand(p: list[list[float]], labels: list[int], K: int) -> float:
    """The share of pairs (a row of the class, a row of another) in the right order, ties counting half."""
    areas = []
    for c in range(K):
        own = [row[c] for row, y in zip(p, labels, strict=True) if y == c]
        rest = [row[c] for row, y in zip(p, labels, strict=True) if y != c]
        areas.append(mean([float(a > b) + 0.5 * (a == b) for a in own for b in rest]))
    return mean(areas)


def ece_by_hand(p: list[list[float]], labels: list[int]) -> float:
    total = 0.0
    for b in range(15):
        rows = [i for i, row in enumerate(p) if b / 15 < max(row) <= (b + 1) / 15]
        if rows:
            accuracy = mean([float(p[i].index(max(p[i])) == labels[i]) for i in rows])
            confidence = mean([max(p[i]) for i in rows])
            total += len(rows) / len(p) * abs(accuracy - confidence)
    return total


def figures_by_hand(logits: Floats, labels_array: Labels) -> dict[str, Any]:
    K, labels = logits.shape[1], labels_array.tolist()
    p = [softmax_by_hand(row) for row in logits.tolist()]
    guess = [row.index(max(row)) for row in p]
    scores = scores_by_hand(guess, labels, K)
    present = [s for s in scores if s[3]]
    best = [sorted(range(K), key=lambda c, row=row: -row[c])[:5] for row in p]  # type: ignore[misc]
    return {
        "rows": len(labels),
        "labelled": len(labels),
        "accuracy": mean([float(g == y) for g, y in zip(guess, labels, strict=True)]),
        "top5": mean([float(y in five) for y, five in zip(labels, best, strict=True)]) if K > 5 else None,
        "nll": mean([-math.log(row[y]) for row, y in zip(p, labels, strict=True)]),
        "brier": mean([sum((x - (c == y)) ** 2 for c, x in enumerate(row)) for row, y in zip(p, labels, strict=True)]),
        "ece": ece_by_hand(p, labels),
        "precision_macro": mean([s[0] for s in present]),
        "recall_macro": mean([s[1] for s in present]),
        "f1_macro": mean([s[2] for s in present]),
        "f1_weighted": math.fsum(s[2] * s[3] for s in scores) / len(labels),
        "auroc_macro": auroc_by_hand(p, labels, K) if len(present) == K else None,
        "per_class": {
            **{name: [s[i] if s[3] else None for s in scores] for i, name in enumerate(("precision", "recall", "f1"))},
            "support": [s[3] for s in scores],
        },
        "confusion": [[sum(p == (a, b) for p in zip(labels, guess, strict=True)) for b in range(K)] for a in range(K)],
        "recall_head": None,
        "recall_medium": None,
        "recall_tail": None,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        elif value is None:
            assert found[key] is None, key
        elif key == "confusion":
            assert found[key] == value
        elif isinstance(value, list) and None in value:
            assert [x is None for x in found[key]] == [x is None for x in value], key
            assert [x for x in found[key] if x is not None] == pytest.approx([x for x in value if x is not None])
        else:
            assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


# Against labels


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("N", "K"), [(40, 2), (60, 3), (50, 5), (70, 6), (150, 10)])
def test_every_figure_is_what_counting_gives(N: int, K: int, seed: int) -> None:
    logits, labels = drawn(N, K, seed)
    assert_same(evaluate(logits, labels), figures_by_hand(logits, labels))


@pytest.mark.parametrize("K", [2, 4, 8])
def test_a_class_that_does_not_occur_counts_for_nothing_in_macro_figures(K: int) -> None:
    logits, labels = drawn(60, K, right=0.0)
    keep = labels != K - 1
    logits, labels = logits[keep], labels[keep]
    assert (logits.argmax(1) == K - 1).any(), "the absent class is guessed, which must not count as a class"
    found = evaluate(logits, labels)
    assert_same(found, figures_by_hand(logits, labels))
    assert found["auroc_macro"] is None
    assert found["per_class"]["support"][K - 1] == 0
    assert found["per_class"]["recall"][K - 1] is None
    assert found["per_class"]["recall"][0] is not None


def test_recall_of_head_medium_and_tail_is_the_mean_of_their_classes_that_occur() -> None:
    logits, labels = drawn(200, 7)
    counts = np.array([5, 100, 50, 20, 10, 10, 1])
    recall = evaluate(logits, labels)["per_class"]["recall"]
    found = evaluate(logits, labels, counts=counts)
    assert found["recall_head"] == pytest.approx(mean([recall[1], recall[2]]))
    assert found["recall_medium"] == pytest.approx(mean([recall[3], recall[4], recall[5]]))
    assert found["recall_tail"] == pytest.approx(mean([recall[0], recall[6]]))
    without = evaluate(logits[labels != 6], labels[labels != 6], counts=counts)
    assert without["recall_tail"] == without["per_class"]["recall"][0]
    neither = (labels != 6) & (labels != 0)
    assert evaluate(logits[neither], labels[neither], counts=counts)["recall_tail"] is None


@pytest.mark.parametrize(("counts", "tail"), [([9, 5], False), ([10, 5], True), ([9, 6, 5], False)])
def test_training_rows_that_are_about_balanced_have_no_tail(counts: list[int], tail: bool) -> None:
    logits, labels = drawn(60, len(counts))
    assert (evaluate(logits, labels, counts=np.array(counts))["recall_tail"] is not None) is tail


def test_two_classes_have_a_head_and_a_tail_and_no_middle() -> None:
    found = evaluate(np.eye(2)[[0, 1, 0, 0]], np.array([0, 1, 1, 1]), counts=np.array([3, 30]))
    assert (found["recall_head"], found["recall_medium"], found["recall_tail"]) == (pytest.approx(1 / 3), None, 1.0)
    assert found["confusion"] == [[1, 0], [2, 1]]


def test_over_a_hundred_classes_have_no_confusion_matrix() -> None:
    assert evaluate(np.eye(101), np.arange(101))["confusion"] is None
    assert evaluate(np.eye(100), np.arange(100))["confusion"] == np.eye(100).tolist()


def test_a_single_row_has_figures() -> None:
    logits, labels = np.array([[0.0, 2.0, 1.0]]), np.array([1])
    assert_same(evaluate(logits, labels), figures_by_hand(logits, labels))


def test_data_of_one_class_have_figures_but_no_area_under_a_curve() -> None:
    logits, labels = np.array([[0.5], [2.0]]), np.array([0, 0])
    found = evaluate(logits, labels)
    assert found["auroc_macro"] is None
    assert (found["accuracy"], found["nll"], found["brier"]) == (1, 0, 0)


def test_rows_without_a_label_count_for_nothing_against_labels() -> None:
    logits, labels = drawn(80, 6)
    some = labels.copy()
    some[::3] = -1
    found, expected = evaluate(logits, some), figures_by_hand(logits[some >= 0], some[some >= 0])
    assert_same(found, expected | {"rows": 80, "labelled": int((some >= 0).sum())})


def test_float32_and_float16_logits_are_measured_in_float64() -> None:
    logits, labels = drawn(60, 6)
    for dtype in (np.float32, np.float16):
        stored = logits.astype(dtype)
        assert_same(evaluate(stored, labels), figures_by_hand(stored.astype(np.float64), labels))


def test_perfect_predictions_are_perfect() -> None:
    _, labels = drawn(50, 6)
    found = evaluate(200 * np.eye(6)[labels], labels)
    ones = ("accuracy", "top5", "precision_macro", "recall_macro", "f1_macro", "f1_weighted", "auroc_macro")
    assert {key: found[key] for key in ones} == dict.fromkeys(ones, 1.0)
    assert [found[key] for key in ("nll", "brier", "ece")] == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize("K", [2, 3, 10])
def test_equal_logits_for_all_classes_are_a_blind_guess(K: int) -> None:
    _, labels = drawn(120, K)
    found = evaluate(np.full((120, K), 7.0), labels)
    first = float((labels == 0).mean())
    assert found["accuracy"] == pytest.approx(first, rel=1e-12)
    assert found["nll"] == pytest.approx(math.log(K), rel=1e-12)
    assert found["brier"] == pytest.approx(1 - 1 / K, rel=1e-12)
    assert found["ece"] == pytest.approx(abs(first - 1 / K), rel=1e-9, abs=1e-12)
    assert found["auroc_macro"] == pytest.approx(0.5, rel=1e-12)


def test_random_predictions_are_right_once_in_k() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(20_000, 10)), random.integers(0, 10, 20_000)
    found = evaluate(logits, labels)
    assert found["accuracy"] == pytest.approx(0.1, abs=0.01)
    assert found["top5"] == pytest.approx(0.5, abs=0.015)
    assert found["auroc_macro"] == pytest.approx(0.5, abs=0.01)


def test_a_confidence_on_the_edge_of_a_bin_belongs_to_the_bin_below() -> None:
    """Two rows of confidence 1/3 and a little more: one bin below the edge, one above, so nothing cancels."""
    more = math.log(1.0001)
    logits, labels = np.array([[0.0, 0.0, 0.0], [more, 0.0, 0.0]]), np.array([0, 1])
    low, high = 1 / 3, 1.0001 / 3.0001
    assert evaluate(logits, labels)["ece"] == pytest.approx(((1 - low) + high) / 2, rel=1e-9)


def test_logits_of_any_size_give_finite_figures() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 3e4]])
    found = evaluate(logits, np.array([0, 0, 2]), teacher_logits=-logits)
    assert found["nll"] == pytest.approx(2e4 / 3, rel=1e-9)
    assert all(math.isfinite(v) for v in found.values() if isinstance(v, float))


# Against the teacher


def test_agreement_and_kl_to_the_teacher_are_what_counting_gives() -> None:
    (student, labels), (teacher, _) = drawn(50, 7, seed=1), drawn(50, 7, seed=2)
    found = evaluate(student, labels, teacher)
    kl = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax_by_hand(s), softmax_by_hand(t)
        kl.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    same = [float(s.index(max(s)) == t.index(max(t))) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert found["kl_to_teacher"] == pytest.approx(mean(kl), rel=1e-9)
    assert found["agreement"] == pytest.approx(mean(same), rel=1e-12)
    assert 0 < mean(same) < 1


def test_a_student_that_is_its_teacher_agrees_and_costs_nothing() -> None:
    logits, labels = drawn(30, 4)
    found = evaluate(logits + 5, labels, logits)
    assert found["agreement"] == 1
    assert found["kl_to_teacher"] == pytest.approx(0, abs=1e-12)


def test_without_labels_the_teacher_is_all_there_is_to_compare_with() -> None:
    (student, labels), (teacher, _) = drawn(30, 4, seed=1), drawn(30, 4, seed=2)
    none = np.full(30, -1)
    with_labels, without = evaluate(student, labels, teacher), evaluate(student, none, teacher)
    assert set(without) == {"rows", "labelled", "agreement", "kl_to_teacher"}
    assert (without["rows"], without["labelled"]) == (30, 0)
    assert [without[k] for k in ("agreement", "kl_to_teacher")] == [
        with_labels[k] for k in ("agreement", "kl_to_teacher")
    ]
    assert evaluate(student, none) == {"rows": 30, "labelled": 0}


def test_rows_without_a_label_are_compared_with_the_teacher() -> None:
    (student, labels), (teacher, _) = drawn(30, 4, seed=1), drawn(30, 4, seed=2)
    some = np.where(np.arange(30) % 2 == 0, labels, -1)
    all_rows, half = evaluate(student, labels, teacher), evaluate(student, some, teacher)
    assert half["agreement"] == all_rows["agreement"]
    assert half["kl_to_teacher"] == all_rows["kl_to_teacher"]


# During training


@pytest.mark.parametrize("absent", [False, True])
def test_what_is_watched_during_training_is_what_the_result_will_say(absent: bool) -> None:
    logits, labels = drawn(60, 4, right=0.0)
    labels[::7] = -1
    if absent:
        labels[labels == 3] = -1
    found, whole = summarize(logits, labels), evaluate(logits, labels)
    assert found == {key: pytest.approx(whole[key], rel=1e-12) for key in ("accuracy", "f1_macro", "nll")}


def test_nothing_is_watched_without_labels() -> None:
    assert summarize(np.zeros((3, 2)), np.full(3, -1)) == {}


def test_log_softmax_is_that_of_float64_and_survives_hopeless_classes() -> None:
    z = np.array([[1.0, 2.0, -1000.0]], np.float32)
    total = math.log(math.exp(1) + math.exp(2))
    found = log_softmax(z)
    assert found.dtype == np.float64
    assert found.tolist()[0] == pytest.approx([1 - total, 2 - total, -1000 - total], rel=1e-14)


# Several seeds


def test_mean_and_spread_of_nested_results() -> None:
    accuracy, recall = [0.5, 0.75, 0.9], [[0.1, 0.2], [0.3, 0.2], [0.8, 0.2]]
    results = [
        {"test": {"accuracy": a, "top5": None, "per_class": {"recall": r}}, "arch": "cnn", "rows": 10}
        for a, r in zip(accuracy, recall, strict=True)
    ]
    centre, spread = mean_and_spread(results)
    assert centre["test"]["accuracy"] == pytest.approx(statistics.mean(accuracy), rel=1e-12)
    assert spread["test"]["accuracy"] == pytest.approx(statistics.stdev(accuracy), rel=1e-12)
    assert centre["test"]["per_class"]["recall"] == pytest.approx([0.4, 0.2], rel=1e-12)
    assert spread["test"]["per_class"]["recall"] == pytest.approx([statistics.stdev([0.1, 0.3, 0.8]), 0], abs=1e-12)
    assert (centre["test"]["top5"], spread["test"]["top5"]) == (None, None)
    assert (centre["arch"], centre["rows"], spread["rows"]) == ("cnn", 10, 0)


def test_one_result_is_its_own_mean_and_spreads_by_nothing() -> None:
    logits, labels = drawn(40, 3)
    result = evaluate(logits, labels)
    centre, spread = mean_and_spread([result])
    assert_same(centre, result)
    assert spread["accuracy"] == 0
    assert spread["per_class"]["f1"] == [0, 0, 0]
    assert spread["top5"] is None


def test_a_place_of_a_list_that_one_result_lacks_has_no_mean() -> None:
    centre, spread = mean_and_spread([{"r": [0.5, None]}, {"r": [1.0, None]}])
    assert (centre, spread) == ({"r": [0.75, None]}, {"r": [pytest.approx(0.5**1.5), None]})


def test_means_of_real_results_keep_every_key() -> None:
    results = [evaluate(*drawn(40, 6, seed), teacher_logits=drawn(40, 6, seed + 9)[0]) for seed in range(3)]
    centre, spread = mean_and_spread(results)
    assert centre.keys() == spread.keys() == results[0].keys()
    assert centre["nll"] == pytest.approx(statistics.mean(r["nll"] for r in results), rel=1e-12)
    assert spread["kl_to_teacher"] == pytest.approx(statistics.stdev(r["kl_to_teacher"] for r in results), rel=1e-12)


def test_training_rows_without_labels_make_no_groups() -> None:
    logits, labels = np.eye(4, dtype=np.float32), np.arange(4)
    found = evaluate(logits, labels, counts=np.zeros(4, np.int64))
    assert (found["recall_head"], found["recall_medium"], found["recall_tail"]) == (None, None, None)


# Ties


def test_of_equal_logits_the_first_class_comes_first_for_every_figure() -> None:
    zeros, labels = np.zeros((400, 10), np.float32), np.zeros(400, np.int64)
    result = evaluate(zeros, labels, zeros)
    assert (result["accuracy"], result["top5"], result["agreement"]) == (1, 1, 1)
    result = evaluate(zeros, labels + 5)
    assert (result["accuracy"], result["top5"]) == (0, 0)
    assert evaluate(zeros, labels + 4)["top5"] == 1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(6, 40), steps=st.sampled_from([0.5, 1, 2, 50]))
def test_top5_contains_top1_for_coarse_logits(seed: int, classes: int, steps: float) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, 60)
    logits = np.round(random.normal(size=(60, classes)) * steps).astype(np.float32) / 4
    places = rank_labels(logits, labels)
    for row, label, place in zip(logits.tolist(), labels.tolist(), places.tolist(), strict=True):
        order = sorted(range(classes), key=lambda c: (-row[c], c))
        assert order.index(label) == place
    assert ((places == 0) == (logits.argmax(1) == labels)).all()
    result = evaluate(logits, labels)
    assert result["accuracy"] == pytest.approx((places == 0).mean())
    assert result["top5"] == pytest.approx((places < 5).mean())
    assert result["top5"] >= result["accuracy"]
    hits = [r * n for r, n in zip(result["per_class"]["recall"], result["per_class"]["support"], strict=True) if n]
    assert sum(hits) == pytest.approx((places == 0).sum())


def test_logits_that_differ_by_less_than_the_rounding_of_their_probabilities_are_no_tie() -> None:
    logits, labels = np.array([[1e-20, 2e-20, 0.0]]), np.array([1])
    result = evaluate(logits, labels, np.array([[0.0, 1.0, 0.0]]))
    assert (result["accuracy"], result["agreement"]) == (1, 1)
    assert summarize(logits, labels)["accuracy"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[np.nan, 1.0], [0.0, 1.0]], [0, 1]), "the student's logits are not finite in 1 of 2 rows"),
        (([[-np.inf, 1.0], [0.0, np.inf]], [0, 1]), "the student's logits are not finite in 2 of 2 rows"),
        ((np.eye(2), [0, 1], np.full((2, 2), np.nan)), "the teacher's logits are not finite in 2 of 2 rows"),
        ((np.eye(2), [0.0, 1.0]), "labels are float64: expected whole numbers"),
        ((np.eye(2), torch.tensor([True, False])), "labels are bool: expected whole numbers"),
        ((np.eye(2), ["a", "b"]), "labels=.* is a list, not an array or a tensor of numbers"),
        ((np.eye(2), None), "labels is None, not an array"),
        ((np.eye(2), [0, 1, 1]), r"logits \[2, 2\] and labels \[3\] are not"),
        ((np.zeros((2, 0)), [0, 1]), r"logits \[2, 0\] and labels"),
        ((np.eye(2), [0, 1], np.eye(3)), r"the teacher's \[3, 3\] differ in their shape"),
        ((np.eye(2), [0, 2]), "label 2 is not below the 2 classes"),
        ((np.eye(2), [0, 1], None, [1, 2, 3]), r"counts are int64 \[3\]: expected whole numbers \[2\]"),
    ],
)
def test_what_has_no_metrics_is_refused_in_one_line(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        evaluate(*arguments)
    assert "\n" not in str(caught.value)
