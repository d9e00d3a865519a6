"""Stratified subsets, and epochs in which rare classes come more often."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcache.data.sampling import draw_stratified, resample_rows
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages

SMALL = ("--arch", "mlp:8", "--epochs", 2)

# --- stratified subsets -------------------------------------------------------------------------------------------

LABELS = st.lists(st.integers(-1, 6), min_size=1, max_size=200)


@settings(deadline=None, max_examples=300)
@given(labels=LABELS, fraction=st.fractions(0, 1), key=st.tuples(st.integers(0, 2**32), st.integers(0, 99)))
def test_stratified_rows_are_distinct_sorted_and_in_proportion(
    labels: list[int], fraction: Fraction, key: tuple[int, int]
) -> None:
    n, array = round(fraction * len(labels)), np.array(labels, np.int64)
    rows = draw_stratified(array, n, key)
    assert len(rows) == n
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert set(rows.tolist()) <= set(range(len(labels)))
    for label, count in Counter(labels).items():
        share = Fraction(count * n, len(labels))
        assert abs(int((array[rows] == label).sum()) - share) < 1
    assert np.array_equal(draw_stratified(array, n, key), rows)


@settings(deadline=None)
@given(half=LABELS, key=st.tuples(st.integers(0, 2**32)))
def test_stratified_rows_do_not_depend_on_how_classes_are_numbered(half: list[int], key: tuple[int]) -> None:
    labels = np.array(half + half, np.int64)  # half of every class is a whole number: no tie that goes by number
    assert np.array_equal(draw_stratified(labels, len(half), key), draw_stratified(5 - labels, len(half), key))


def test_stratified_draws_are_fair_and_depend_on_the_key() -> None:
    labels = np.repeat([0, 1], [300, 100])
    times_drawn = np.zeros(400, int)
    for seed in range(200):
        times_drawn[draw_stratified(labels, 40, (seed, 10))] += 1
    # Each row is drawn with probability 1/10: mean 20 of 200, standard deviation 4.2; five of them.
    assert times_drawn.min() >= 1
    assert times_drawn.max() <= 42
    assert not np.array_equal(draw_stratified(labels, 40, (0, 10)), draw_stratified(labels, 40, (0, 11)))


def test_stratified_rows_are_pinned() -> None:
    assert draw_stratified(np.arange(20) % 3, 6, (0, 10)).tolist() == [7, 9, 12, 14, 16, 17]


# --- epochs -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_each_class_is_drawn_in_proportion_to_a_power_of_its_rows(labels: list[int], power: float, key: int) -> None:
    drawn = resample_rows(np.array(labels), power, (key,))
    drawn_counts, counts = Counter(np.array(labels)[drawn].tolist()), Counter(labels)
    total = sum(n**power for n in counts.values())
    assert len(drawn) == len(labels)
    for c, n in counts.items():
        assert abs(drawn_counts[c] - len(labels) * n**power / total) < 1
        rows = Counter(int(i) for i in drawn if labels[i] == c)
        assert max(rows.values(), default=0) - min(rows.get(i, 0) for i, y in enumerate(labels) if y == c) <= 1


def test_at_power_one_every_row_comes_once() -> None:
    assert sorted(resample_rows(np.arange(30) % 4, 1.0, (0,)).tolist()) == list(range(30))


@pytest.mark.parametrize("resident", [True, False])
def test_a_balanced_epoch_has_every_class_equally_often_and_the_targets_of_its_rows(
    tiny: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.pipeline.loading.stream import BatchStream

    cache = CacheReader(tiny / "cache")
    rows = cache.load_transfer_set("digits", Path(), lambda items, total, what: items).splits["train"]
    monkeypatch.setattr(CacheReader, "fits_in_memory", lambda *_: resident)
    positions = np.flatnonzero(rows.labels[cache.row_order("train")] < 3)[:-40]  # three classes, of unequal size
    stream = BatchStream(rows, cache.views, cache.seed, 3, 10, rows.labels, positions, 3, cache, sampler="balanced")
    batches = list(stream.batches(0, 2 * stream.steps_per_epoch))
    for half in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        counts = Counter(int(y) for batch in half for y in batch.labels)
        assert sum(counts.values()) == len(positions)
        assert max(counts.values()) - min(counts.values()) <= 1
    position_of = {int(i): position for position, i in enumerate(cache.row_order("train"))}
    for batch in batches:
        expected = cache.read_stored("train", batch.draw, np.array([position_of[int(i)] for i in batch.index]))[0]
        assert batch.logits is not None
        assert (batch.logits == expected).all()


def test_a_sampler_changes_the_training_of_students_and_teachers(tiny: Path, stages: Stages) -> None:
    student = ("student", "--cache", tiny / "cache", *SMALL)
    plain, balanced = stages(*student, "--out", "p"), stages(*student, "--sampler", "balanced", "--out", "b")
    assert plain["student"]["val"]["nll"] != balanced["student"]["val"]["nll"]
    teacher = stages("teacher", "--imbalance", "10", "--head-size", 50, *SMALL, "--sampler", "sqrt", "--out", "t")
    assert teacher["settings"]["sampler"] == "sqrt"


def test_a_sampler_needs_all_labels(tiny: Path, stages: Stages) -> None:
    message = stages.fails(2, "student", "--cache", tiny / "cache", *SMALL, "--sampler", "sqrt", "--labelled", 20)
    assert "--sampler needs the labels of all rows, --labelled hides some" in message
