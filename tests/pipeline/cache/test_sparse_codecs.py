"""Sparse codecs: the classes of a row that are stored are the right ones, with the right probabilities."""

import hashlib
import re

import numpy as np
import pytest
from numpy.typing import NDArray

from softcache.base import rng
from softcache.pipeline.cache.codec_choice import find_codec
from softcache.pipeline.cache.codecs import measure_sample
from tests.pipeline.cache.test_codecs import Floats, make_logits


def make_keys(n: int, draw: int = 0) -> NDArray[np.uint64]:
    """Make the random numbers of some rows."""
    return rng.bits((7, draw), np.arange(n))


def softmax(z: NDArray[np.floating]) -> NDArray[np.float64]:
    """The probabilities of each row in float64."""
    p = np.exp(z.astype(np.float64) - z.max(1, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True))


def decode(name: str, logits: Floats, draw: int = 0) -> Floats:
    """Encode logits and decode them."""
    codec = find_codec(name)
    return codec.decode(codec.encode(logits, make_keys(len(logits), draw)), logits.shape[1])


@pytest.mark.parametrize(
    ("name", "K", "row_bytes"),
    [
        ("top:20", 1000, 84),
        ("top:100", 21_841, 404),
        ("sample:50", 1000, 100),
        ("top:3", 70_000, 22),
        ("sample:3", 70_000, 12),
    ],
)
def test_the_bytes_of_a_row(name: str, K: int, row_bytes: int) -> None:
    codec = find_codec(name)
    encoded = codec.encode(make_logits(3, K), make_keys(3))
    assert {name: (x.shape[1:], x.dtype.str) for name, x in encoded.items()} == codec.datasets(K)
    assert sum(x.nbytes for x in encoded.values()) == 3 * row_bytes


@pytest.mark.parametrize("K", [21, 1000])
def test_top_keeps_the_probabilities_of_the_largest_logits_and_the_sum_of_the_others(K: int) -> None:
    logits = make_logits(50, K)
    p, q = softmax(logits), softmax(decode("top:20", logits))
    order = np.argsort(-logits, axis=1, kind="stable")
    top, others = order[:, :20], order[:, 20:]
    # float16 rounds a depth below the maximum, up to 32, by 2**-7 at most: a share of 0.8 % of the probability.
    np.testing.assert_allclose(np.take_along_axis(q, top, 1), np.take_along_axis(p, top, 1), rtol=0.01)
    rest = np.take_along_axis(q, others, 1)
    np.testing.assert_allclose(rest.sum(1), np.take_along_axis(p, others, 1).sum(1), rtol=1e-5)
    assert (rest == rest[:, :1]).all(), "the others are equally likely"


def test_the_rest_of_top_is_exact_where_the_depths_are() -> None:
    logits = np.zeros((1, 100), np.float32)
    logits[0, :4] = [8, 7, 6.5, 6]
    expected = softmax(logits)
    np.testing.assert_allclose(softmax(decode("top:4", logits)), expected, rtol=1e-6)


def test_of_equal_logits_top_stores_the_first_classes() -> None:
    logits = np.float32([[1, 5, 3, 3, 3], [2, 2, 2, 2, 2]])
    stored = find_codec("top:3").encode(logits, make_keys(2))
    assert stored["logits_class"].tolist() == [[1, 2, 3], [0, 1, 2]]


def test_the_mean_of_samples_is_the_distribution() -> None:
    """Each mean of 2,000 samples is within 5 standard errors; an independent draw would have the variance p / n."""
    logits, draws, n = make_logits(4, 30), 2000, 10
    p = softmax(logits)
    mean = sum(softmax(decode(f"sample:{n}", logits, draw)) for draw in range(draws)) / draws
    np.testing.assert_array_less(np.abs(mean - p), 5 * np.sqrt(p / n / draws) + 1e-9)


@pytest.mark.parametrize("n", [1, 50, 300])
def test_a_sample_counts_every_class_within_one_of_its_expectation(n: int) -> None:
    logits = make_logits(40, 200)
    stored = find_codec(f"sample:{n}").encode(logits, make_keys(40))
    counts = np.zeros((40, 200))
    np.add.at(counts, (np.arange(40)[:, None], stored["logits"].astype(int)), 1)
    assert np.abs(counts - n * softmax(logits)).max() < 1 + 1e-9
    assert np.allclose(softmax(decode(f"sample:{n}", logits)), counts / n, atol=1e-6)


def test_a_class_that_was_not_drawn_has_no_probability_at_all() -> None:
    z = decode("sample:2", make_logits(5, 40))
    assert np.isfinite(z).all()
    assert ((softmax(z) == 0).sum(1) >= 38).all()


@pytest.mark.parametrize("name", ["top:5", "sample:7"])
def test_a_row_is_encoded_alone_as_among_others(name: str) -> None:
    codec, logits, keys = find_codec(name), make_logits(9, 50), make_keys(9)
    together = codec.encode(logits, keys)
    for i in range(9):
        alone = codec.encode(logits[i : i + 1], keys[i : i + 1])
        assert all(np.array_equal(alone[part][0], together[part][i]) for part in together)


@pytest.mark.parametrize(
    ("name", "sha256"),
    [("top:5", "cc2cd0e8a58eb0f4"), ("sample:7", "e2e2830e664a4c14")],
)
def test_the_bytes_of_a_format_never_change(name: str, sha256: str) -> None:
    """All but the sum of the rest, whose last bit is that of a library's exponential."""
    logits = ((np.arange(40) * 7919 % 97).reshape(4, 10) / 16).astype(np.float32)
    encoded = find_codec(name).encode(logits, make_keys(4))
    digest = hashlib.sha256(
        b"".join(encoded[part].tobytes() for part in sorted(encoded) if part != "logits_rest")
    ).hexdigest()
    assert digest[:16] == sha256


@pytest.mark.parametrize("name", ["top:3", "sample:4"])
def test_a_class_that_does_not_exist_is_refused(name: str) -> None:
    codec = find_codec(name)
    stored = codec.encode(make_logits(2, 9), make_keys(2))
    classes = stored.get("logits_class", stored["logits"])
    classes[1, -1] = 9
    with pytest.raises(ValueError, match=re.escape("a stored class is 9, and there are 9")):
        codec.decode(stored, 9)
    classes[1, :2] = 8, 7
    classes[1, -1] = 8
    with pytest.raises(ValueError, match="not in ascending order"):
        codec.decode(stored, 9)


def test_what_a_sample_costs_is_measured_as_the_divergence_from_the_teacher() -> None:
    logits = make_logits(30, 20)
    decoded = decode("sample:5", logits)
    p, q = softmax(logits), softmax(decoded)
    terms = np.where(q > 0, q * (np.log(np.maximum(q, 1e-300)) - np.log(p)), 0.0)
    sums = measure_sample(logits, decoded)
    assert sums["reverse_kl_1"] == pytest.approx(terms.sum(), rel=1e-6)
    assert sums["flips"] == (logits.argmax(1) != decoded.argmax(1)).sum()


@pytest.mark.parametrize(
    "name", ["top", "top:", "top:0", "top:-1", "top:1.5", "top:x", "sample:0", "sample:70000", "best:3"]
)
def test_other_names_are_no_codec(name: str) -> None:
    with pytest.raises(KeyError):
        find_codec(name)
