"""Several teachers as one: each way to combine equals its formula, and the fitted blend is the best."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.pipeline.teachers.combine import Combination, confidence_weights, fit_combination, parse_combination

Floats = NDArray[np.float64]


def make_logits(rows: int = 50, classes: int = 4, seed: int = 0) -> torch.Tensor:
    """Logits [N, 3, K] of teachers that differ in scale."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.normal(size=(rows, 3, classes)) * np.array([1.0, 3.0, 5.0])[:, None])


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def combine_by_hand(name: str, row: list[list[float]], weights: list[float]) -> list[float]:
    """The distribution of one row, from its formula."""
    K, M = len(row[0]), len(row)
    p = [softmax(z) for z in row]
    mean = [math.fsum(w * q[c] for w, q in zip(weights, p, strict=True)) for c in range(K)]
    if name in ("mean_probability", "weighted", "per_teacher", "ca_mkd"):
        return mean
    if name == "mean_logit":
        return softmax([math.fsum(z[c] for z in row) / M for c in range(K)])
    if name == "geometric":
        product = [math.prod(q[c] for q in p) ** (1 / M) for c in range(K)]
        return [x / math.fsum(product) for x in product]
    votes = [sum(z.index(max(z)) == c for z in row) / M for c in range(K)]
    return [0.999 * v + 0.001 * m for v, m in zip(votes, mean, strict=True)]


@pytest.mark.parametrize(
    "spec",
    [
        "mean_probability",
        "mean_logit",
        "geometric",
        "weighted:0.5,0.3,0.2",
        "weighted:0,0,1",
        "vote",
        "per_teacher",
        "ca_mkd",
    ],
)
def test_every_way_to_combine_equals_its_formula(spec: str) -> None:
    logits, combine = make_logits(), parse_combination(spec, 3)
    weights = [float(w) for w in spec.partition(":")[2].split(",")] if ":" in spec else [1 / 3] * 3
    probabilities = F.softmax(combine(logits), 1).tolist()
    for row, p in zip(logits.tolist(), probabilities, strict=True):
        assert p == pytest.approx(combine_by_hand(combine.name, row, weights), rel=1e-9, abs=1e-15)
    assert Combination.from_json(combine.to_json()) == combine


def test_mean_logit_and_geometric_are_one_distribution_at_every_temperature() -> None:
    logits = make_logits()
    for T in (1.0, 4.0):
        mean_logit, geometric = (parse_combination(name, 3)(logits) for name in ("mean_logit", "geometric"))
        torch.testing.assert_close(F.softmax(mean_logit / T, 1), F.softmax(geometric / T, 1))


def test_a_tie_of_votes_goes_to_the_larger_mean_probability() -> None:
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
    assert parse_combination("vote", 2)(logits).argmax(1).tolist() == [1]


def test_float32_logits_are_combined_to_finite_float32() -> None:
    logits = torch.tensor([[[1000.0, -1000.0], [-1000.0, 1000.0]]])
    for name in ("mean_probability", "mean_logit", "geometric", "vote", "per_teacher"):
        combined = parse_combination(name, 2)(logits)
        assert combined.dtype == torch.float32
        assert combined.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mean", "no way to combine 'mean'"),
        ("weighted", "--combine weighted: it needs a weight for each cache, such as weighted:0.7,0.3"),
        ("vote:0.5,0.5", "--combine vote:0.5,0.5: vote takes no parameters"),
        ("weighted:0.7,0.2", "weights are from 0 to 1 and add up to 1, these to 0.9"),
        ("weighted:1.5,-0.5", "weights are from 0 to 1 and add up to 1, these to 1"),
        ("weighted:0.5,0.25,0.25", "3 weights for 2 caches"),
        ("weighted:a,b", "a,b are not numbers"),
        ("weighted:nan,1", "add up to 1, these to nan"),
    ],
)
def test_a_wrong_combination_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_combination(spec, 2)
    assert message in str(error.value)


# The fitted blend


def nll(logits: torch.Tensor, labels: NDArray[np.int64]) -> float:
    return float(F.cross_entropy(logits.double(), torch.from_numpy(labels)))


def teachers_and_labels(seed: int, scales: tuple[float, ...], rows: int = 3000) -> tuple[Floats, NDArray[np.int64]]:
    """Logits [N, M, K] and labels [N]: each teacher's are the true ones with independent noise, times its scale."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=(rows, 5)) * 2
    labels = (truth - np.log(-np.log(random.random(truth.shape)))).argmax(1)
    logits = [scale * (truth + random.normal(size=truth.shape)) for scale in scales]
    return np.stack(logits, 1), labels


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 0.5), (8.0, 1.0, 2.0), (0.2, 0.2, 0.2, 5.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_learned_blend_is_no_worse_than_any_member_and_any_mean(seed: int, scales: tuple[float, ...]) -> None:
    logits, labels = teachers_and_labels(seed, scales)
    learned = fit_combination(logits, labels)
    z, M = torch.from_numpy(logits), len(scales)
    nll_learned = nll(learned(z), labels)
    assert sum(learned.weights) == pytest.approx(1)
    for k in range(M):
        assert nll_learned <= nll(z[:, k], labels)
    assert nll_learned <= nll(parse_combination("mean_probability", M)(z), labels)
    for w in np.random.default_rng(seed).dirichlet(np.ones(M), 20):
        assert nll_learned <= nll(Combination("weighted", tuple(w.tolist()), (1.0,) * M)(z), labels)
    new_logits, new_labels = teachers_and_labels(seed + 100, scales)
    new_z = torch.from_numpy(new_logits)
    assert nll(learned(new_z), new_labels) < nll(parse_combination("mean_probability", M)(new_z), new_labels)


@pytest.mark.parametrize("scale", [0.05, 0.1, 0.2])
def test_the_best_teacher_gets_weight_even_when_badly_calibrated(scale: float) -> None:
    logits, labels = teachers_and_labels(0, (1.0, 1.0), rows=1000)
    logits[:, 1] += np.random.default_rng(7).normal(size=logits[:, 1].shape)
    nll_alone = min(nll(torch.from_numpy(logits[:, 0] / t), labels) for t in np.geomspace(0.3, 3, 50))
    logits *= np.array([scale, 0.5])[:, None]
    learned = fit_combination(logits, labels)
    assert nll(learned(torch.from_numpy(logits)), labels) < nll_alone
    assert learned.weights[0] > 0.5


def test_a_random_teacher_gets_no_weight() -> None:
    logits, labels = teachers_and_labels(0, (1.0, 1.0))
    logits[:, 1] = np.random.default_rng(5).normal(size=logits[:, 1].shape) * 4
    learned = fit_combination(logits, labels)
    assert learned.weights[0] > 0.97


def test_the_temperatures_correct_over_confidence() -> None:
    logits, labels = teachers_and_labels(0, (4.0, 1.0), rows=20_000)
    learned = fit_combination(logits, labels)
    assert learned.temperatures[0] / learned.temperatures[1] == pytest.approx(4, rel=0.15)


def test_learned_needs_labels() -> None:
    with pytest.raises(UsageError, match="--combine learned is fitted to validation labels"):
        fit_combination(np.zeros((3, 2, 4)), np.full(3, -1))


def test_confidence_weights_equal_their_formula_and_add_up_to_one() -> None:
    terms = torch.tensor([[0.1, 2.0, 0.5], [1.0, 1.0, 1.0], [0.3, 0.2, 9.0]], dtype=torch.float64)
    weights = confidence_weights(terms, torch.tensor([True, True, False])).tolist()
    for row, of_row in list(zip(terms.tolist(), weights, strict=True))[:2]:
        p = softmax(row)
        assert of_row == pytest.approx([(1 - x) / 2 for x in p], rel=1e-12)
        assert sum(of_row) == pytest.approx(1, rel=1e-12)
    assert weights[2] == pytest.approx([1 / 3] * 3)
    order: Any = sorted(range(3), key=lambda k: -weights[0][k])
    assert order == [0, 2, 1], "the smaller its cross entropy, the larger its weight"
