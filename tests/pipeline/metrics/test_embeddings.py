"""Metrics of embeddings against scikit-learn and against the same figure written out in plain float64."""

import math
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from softcache.base import rng
from softcache.base.errors import UsageError
from softcache.data.tasks import EMBEDDING
from softcache.pipeline.metrics import embedding_bank, embeddings, neighbours
from softcache.pipeline.metrics.classification import mean_and_spread
from softcache.pipeline.metrics.embedding_bank import EmbeddingBank
from softcache.pipeline.metrics.embeddings import compute_cka, evaluate_embeddings
from softcache.pipeline.metrics.neighbours import compute_overlap, find_nearest
from softcache.pipeline.metrics.tasks import evaluate_task

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
K, D = 4, 12


def draw_rows(N: int, seed: int) -> tuple[Floats, Labels]:
    """Rows around a mean of their class, N x 12, close enough that some are classified wrongly."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, K, N)
    means = np.random.default_rng(99).normal(size=(K, D))
    return (means[labels] + 1.5 * random.normal(size=(N, D))).astype(np.float32).astype(np.float64), labels


def make_bank(M: int = 300, seed: int = 0) -> EmbeddingBank:
    outputs, labels = draw_rows(M, seed)
    val_outputs, val_labels = draw_rows(90, 7)
    val_labels[::9] = -1
    return EmbeddingBank(outputs.astype(np.float32), labels, val_outputs.astype(np.float32), val_labels)


# kNN


def vote_by_hand(bank: EmbeddingBank, row: Floats, k: int = 20) -> int:
    """The class of one row, with plain sums over the neighbours."""
    norm = math.sqrt(math.fsum(row * row))
    similarities = []
    for place, other in enumerate(bank.outputs.astype(np.float64)):
        other_norm = math.sqrt(math.fsum(other * other))
        similarities.append((-math.fsum(row * other) / norm / other_norm, place))
    votes = [0.0] * K
    for negative, place in sorted(similarities)[:k]:
        votes[bank.labels[place]] += math.exp(-negative / 0.07)
    return votes.index(max(votes))


def test_knn_is_the_vote_of_dinos_evaluation() -> None:
    bank, (outputs, _) = make_bank(), draw_rows(120, 1)
    predictions = bank.predict_by_neighbours(outputs)
    assert predictions.tolist() == [vote_by_hand(bank, row) for row in outputs]
    assert len(set(predictions.tolist())) == K


def test_knn_is_that_of_scikit_learn() -> None:
    bank, (outputs, labels) = make_bank(), draw_rows(200, 2)

    def weigh(distances: Floats) -> Floats:
        return np.asarray(np.exp((1 - distances) / 0.07))

    classifier = KNeighborsClassifier(20, metric="cosine", weights=weigh, algorithm="brute")
    expected = classifier.fit(bank.outputs.astype(np.float64), bank.labels).score(outputs, labels)
    assert 0.4 < expected < 0.95
    assert evaluate_embeddings(outputs, labels, bank=bank)["knn"] == pytest.approx(expected, abs=1e-6)


def test_a_small_bank_has_fewer_neighbours_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, labels = draw_rows(50, 3)
    bank = make_bank(M=7)
    assert bank.predict_by_neighbours(outputs).tolist() == [vote_by_hand(bank, row, k=7) for row in outputs]
    bank = make_bank()
    whole = evaluate_embeddings(outputs, labels, outputs[:, ::-1], bank)
    monkeypatch.setattr(neighbours, "_CHUNK_ENTRIES", 3 * 300)
    monkeypatch.setattr(embeddings, "_CHUNK_ROWS", 7)
    parts = evaluate_embeddings(outputs, labels, outputs[:, ::-1], make_bank())
    assert parts == pytest.approx(whole, abs=1e-12)


def test_equally_near_rows_are_taken_in_their_order() -> None:
    cosines = torch.tensor([[0.5] * 60, [0.1] * 30 + [0.7] * 30], dtype=torch.float64)
    cosines[0, 41] = 0.9
    cosines[1, ::2] += 1e-15  # the last bits of equal rows differ with their place in a product
    values, columns = find_nearest(cosines, 3)
    assert columns.tolist() == [[41, 0, 1], [30, 31, 32]]
    assert values.tolist() == [[0.9, 0.5, 0.5], [0.7, 0.7, 0.7]]


def test_of_equal_votes_the_first_class_is_predicted() -> None:
    bank = EmbeddingBank(np.array([[1, 0], [1, 0], [0, 1]], np.float32), np.array([5, 3, 5]))
    assert bank.predict_by_neighbours(np.array([[1.0, 1.0]])).tolist() == [5]  # two of three
    bank = EmbeddingBank(np.ones((2, 2), np.float32), np.array([5, 3]))
    assert bank.predict_by_neighbours(np.array([[1.0, 1.0]])).tolist() == [3]


# Linear probe


def test_the_probe_is_scikit_learns_with_the_c_that_validation_chooses() -> None:
    bank, (outputs, labels) = make_bank(), draw_rows(400, 4)
    train = bank.outputs.astype(np.float64)
    mean, std = train.mean(0), train.std(0)
    assert bank.val_outputs is not None
    assert bank.val_labels is not None
    is_labelled = bank.val_labels >= 0
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for C in (0.01, 0.1, 1, 10, 100):
            model = LogisticRegression(C=C, max_iter=100).fit((train - mean) / std, bank.labels)
            val = model.score((bank.val_outputs[is_labelled] - mean) / std, bank.val_labels[is_labelled])
            scores.append((val, -C, model.score((outputs - mean) / std, labels)))
    chosen = max(scores)
    assert len({score[2] for score in scores}) > 1, "C matters here"
    assert evaluate_embeddings(outputs, labels, bank=bank)["probe"] == pytest.approx(chosen[2], abs=1e-6)


def test_without_validation_labels_c_is_1() -> None:
    outputs, labels = draw_rows(300, 0)
    held_out, held_out_labels = draw_rows(200, 5)
    bank = EmbeddingBank(outputs.astype(np.float32), labels)
    model = LogisticRegression().fit((outputs - outputs.mean(0)) / outputs.std(0), labels)
    expected = model.score((held_out - outputs.mean(0)) / outputs.std(0), held_out_labels)
    assert evaluate_embeddings(held_out, held_out_labels, bank=bank)["probe"] == pytest.approx(expected, abs=1e-6)


def test_a_probe_is_fitted_to_a_seeded_part_of_many_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, labels = draw_rows(100, 6)
    assert "probe_rows" not in evaluate_embeddings(outputs, labels, bank=make_bank())
    monkeypatch.setattr(embedding_bank, "_PROBE_ROWS", 120)
    first, again = (evaluate_embeddings(outputs, labels, bank=make_bank()) for _ in range(2))
    assert first == again
    assert first["probe_rows"] == 120
    monkeypatch.setattr(embedding_bank, "_PROBE_ENTRIES", 60 * D * K)
    assert evaluate_embeddings(outputs, labels, bank=make_bank())["probe_rows"] == 60


# Nearest centroids


@pytest.mark.parametrize("shots", [1, 5])
def test_a_centroid_is_the_mean_direction_of_drawn_rows(shots: int) -> None:
    bank, (outputs, labels) = make_bank(), draw_rows(150, 8)
    accuracies = []
    for draw in range(10):
        order = rng.permutation((0, 60, draw), len(bank.labels))
        centroids = []
        for c in range(K):
            rows = [bank.outputs[i].astype(np.float64) for i in order if bank.labels[i] == c][:shots]
            assert len(rows) == shots
            centroids.append(np.mean([row / np.linalg.norm(row) for row in rows], 0))
        accuracies.append((pairwise.cosine_similarity(outputs, centroids).argmax(1) == labels).mean())
    assert len(set(accuracies)) > 1
    result = evaluate_embeddings(outputs, labels, bank=bank)
    assert result[f"centroid_{shots}"] == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_a_centroid_is_absent_where_a_class_has_fewer_rows() -> None:
    outputs, labels = draw_rows(40, 9)
    labels[labels == 2] = 1
    labels[:3] = 2
    bank = EmbeddingBank(outputs.astype(np.float32), labels)
    result = evaluate_embeddings(outputs, labels, bank=bank)
    assert "centroid_1" in result
    assert "centroid_5" not in result
    with_unknown_class = np.where(np.arange(40) == 0, 77, labels)
    assert "centroid_1" not in evaluate_embeddings(outputs, with_unknown_class, bank=bank)


# Likeness to the teacher


def cka_by_grams(x: Floats, y: Floats) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the N x N matrices of inner products."""
    N = len(x)
    centring = np.eye(N) - 1 / N
    first, second = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    return float((first * second).sum() / math.sqrt((first * first).sum() * (second * second).sum()))


def test_cka_is_that_of_the_gram_matrices() -> None:
    x, _ = draw_rows(80, 10)
    y = np.tanh(x @ np.random.default_rng(0).normal(size=(D, 5))) + 3
    assert 0.2 < cka_by_grams(x, y) < 0.99
    assert compute_cka(x, y) == pytest.approx(cka_by_grams(x, y), abs=1e-9)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    assert compute_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-9)
    assert compute_cka(x, np.full((80, 3), 0.1)) is None


def test_overlap_is_that_of_scikit_learns_neighbours() -> None:
    x, _ = draw_rows(90, 11)
    y = (x + 0.5 * np.random.default_rng(2).normal(size=x.shape))[:, :8]
    sets = []
    for z in (x, y):
        nearest = NearestNeighbors(n_neighbors=11, metric="cosine", algorithm="brute").fit(z).kneighbors(z)[1]
        sets.append([set(row.tolist()) - {i} for i, row in enumerate(nearest)])
    expected = float(np.mean([len(a & b) / 10 for a, b in zip(*sets, strict=True)]))
    assert 0.2 < expected < 0.9
    assert compute_overlap(x, y) == pytest.approx(expected, abs=1e-9)
    assert compute_overlap(x, 2 * x) == 1
    assert compute_overlap(x[:11], y[:11]) is None
    assert compute_overlap(x[:12], y[:12]) is not None


def test_a_large_split_is_compared_by_a_seeded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = draw_rows(60, 12)
    teacher = x @ np.random.default_rng(3).normal(size=(D, 9))
    complete = evaluate_embeddings(x, labels, teacher)
    assert not {"cka_rows", "overlap_rows"} & set(complete)
    monkeypatch.setattr(embeddings, "_SAMPLE_ROWS", 40)
    sampled = evaluate_embeddings(x, labels, teacher)
    rows = np.sort(rng.permutation((0, 62), 60)[:40])
    assert sampled["cka"] == pytest.approx(cka_by_grams(x[rows], teacher[rows]), abs=1e-9)
    assert (sampled["cka_rows"], sampled["overlap_rows"]) == (40, 40)


# What is absent


def test_what_is_not_defined_is_absent() -> None:
    outputs, labels = draw_rows(30, 13)
    assert evaluate_task(EMBEDDING, outputs, labels) == {"rows": 30, "labelled": 30}
    unknown = np.full(30, -1)
    figures = evaluate_task(EMBEDDING, outputs, unknown, outputs[:, :5], bank=make_bank())
    assert set(figures) == {"rows", "labelled", "cosine", "cka", "overlap"}
    assert figures["cosine"] is None
    cosines = pairwise.paired_cosine_distances(outputs, outputs[::-1])
    figures = evaluate_task(EMBEDDING, torch.from_numpy(outputs), labels, outputs[::-1].copy(), bank=make_bank())
    assert figures["cosine"] == pytest.approx(1 - cosines.mean(), abs=1e-9)
    assert {"knn", "probe", "centroid_1", "centroid_5"} < set(figures)
    one_class = EmbeddingBank(outputs.astype(np.float32), np.zeros(30, np.int64), available_rows=500)
    figures = evaluate_task(EMBEDDING, outputs, np.zeros(30, np.int64), bank=one_class)
    assert (figures["probe"], figures["knn"], figures["bank_rows"]) == (None, 1.0, 30)


def test_hidden_labels_are_left_out() -> None:
    outputs, labels = draw_rows(100, 14)
    hidden = labels.copy()
    hidden[60:] = -1
    figures = evaluate_embeddings(outputs, hidden, bank=make_bank())
    assert figures["labelled"] == 60
    assert figures["knn"] == evaluate_embeddings(outputs[:60], labels[:60], bank=make_bank())["knn"]


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    assert mean_and_spread([{"cka": 0.5}, {"cka": None}]) == ({"cka": None}, {"cka": None})


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, np.int64), "labels [2]"),
        (np.zeros((0, 2)), np.zeros(0, np.int64), "at least one row"),
        (np.zeros((2, 2)), np.array([0, -1]), "the label -1"),
        (np.array([[0.0, np.nan]]), np.array([0]), "not finite in 1 of 1 rows"),
    ],
)
def test_a_wrong_bank_is_refused(outputs: Floats, labels: Labels, message: str) -> None:
    with pytest.raises(UsageError) as error:
        EmbeddingBank(outputs.astype(np.float32), labels)
    assert message in str(error.value)


def test_other_widths_and_rows_are_refused() -> None:
    outputs, labels = draw_rows(20, 15)
    with pytest.raises(UsageError, match="differ in width"):
        evaluate_embeddings(outputs[:, :3], labels, bank=make_bank())
    with pytest.raises(UsageError, match="differ in rows"):
        evaluate_embeddings(outputs, labels, outputs[:7])
