"""Codecs: what comes back is as near as promised, and what that costs is measured rightly."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from softcache.pipeline.cache.codecs import CODECS, TEMPERATURES, measure_fidelity

Floats = NDArray[np.float32]
HALF_ULP = 2.0**-11  # of float16, as a share of the number


def logits_of(n: int, K: int, seed: int = 0, scale: float = 3.0) -> Floats:
    """Rows as networks give them: normal, one class ahead."""
    random = np.random.default_rng(seed)
    z = random.normal(scale=scale, size=(n, K))
    z[np.arange(n), random.integers(0, K, n)] += 2 * scale
    return z.astype(np.float32)


def back(codec: str, logits: Floats) -> Floats:
    """Through the bytes and back."""
    stored = {
        name: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape) for name, x in CODECS[codec].encode(logits).items()
    }
    decoded = CODECS[codec].decode(stored)
    assert decoded.dtype == np.float32
    assert decoded.shape == logits.shape
    return decoded


def test_half_precision_comes_back_as_numpy_would_widen_it() -> None:
    """Every float16 there is, in an array of two pieces and of another layout."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for stored in (halves.reshape(2, -1), halves.reshape(-1, 256).T, halves[:0].reshape(0, 10)):
        np.testing.assert_array_equal(CODECS["float16"].decode({"logits": stored}), stored.astype(np.float32))


# What is stored


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("K", [2, 10, 1000])
def test_what_is_encoded_has_the_types_and_shapes_that_were_announced(codec: str, K: int) -> None:
    encoded = CODECS[codec].encode(logits_of(5, K))
    announced = CODECS[codec].datasets(K)
    assert {name: (x.shape[1:], x.dtype.str) for name, x in encoded.items()} == announced
    assert all(len(x) == 5 for x in encoded.values())
    assert "logits" in announced, "the manifest reads the number of classes from it"


@pytest.mark.parametrize(("codec", "bytes_per_row"), [("float16", 2 * 100), ("float32", 4 * 100), ("sqrt8", 100 + 4)])
def test_a_row_of_100_classes_takes_so_many_bytes(codec: str, bytes_per_row: int) -> None:
    assert sum(x.nbytes for x in CODECS[codec].encode(logits_of(7, 100)).values()) == 7 * bytes_per_row


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_leaves_the_logits_as_they_were_and_rows_do_not_depend_on_each_other(codec: str) -> None:
    logits = logits_of(6, 5)
    before = logits.copy()
    whole = back(codec, logits)
    assert np.array_equal(logits, before)
    for i in range(6):
        assert np.array_equal(back(codec, logits[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("codec", CODECS)
def test_no_rows_are_no_rows(codec: str) -> None:
    assert back(codec, np.zeros((0, 4), np.float32)).shape == (0, 4)


# How near it comes back


def test_float32_comes_back_to_the_bit() -> None:
    logits = np.concatenate([logits_of(50, 10), np.float32([[3.4e38, -3.4e38, 1e-45, -0.0, 0, 1, 2, 3, 4, 5]])])
    assert back("float32", logits).tobytes() == logits.tobytes()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_float16_comes_back_within_half_a_unit_in_the_last_place(scale: float) -> None:
    logits = np.clip(logits_of(200, 20, scale=scale), -65504, 65504)
    error = np.abs(back("float16", logits).astype(np.float64) - logits)
    assert (error <= np.maximum(HALF_ULP * np.abs(logits), 2.0**-25)).all()
    assert error.max() > 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("K", [2, 10, 1000])
def test_sqrt8_comes_back_within_half_a_step_of_its_square_root_scale(K: int, scale: float) -> None:
    logits = logits_of(100, K, scale=scale)
    decoded = back("sqrt8", logits).astype(np.float64)
    top, span = (
        logits.max(1, keepdims=True).astype(np.float64),
        np.ptp(logits, axis=1, keepdims=True).astype(np.float64),
    )
    depth = top - logits
    step = span / 255 * (np.sqrt(depth / span) + 0.25 / 255) * (1 + HALF_ULP)
    below_the_top = np.abs((decoded.max(1, keepdims=True) - decoded) - depth)
    assert (below_the_top <= step + HALF_ULP * span + 1e-6 * np.abs(top)).all()
    assert (np.abs(decoded - logits) <= step + HALF_ULP * span + HALF_ULP * np.abs(top) + 1e-6 * np.abs(top)).all()


def test_sqrt8_spends_its_steps_near_the_top() -> None:
    """A class just below the first comes back closer than the last one does."""
    logits = np.linspace(0, 10, 1001, dtype=np.float32)[None]
    error = np.abs(back("sqrt8", logits) - logits)[0]
    assert error[901:].max() < error[:500].max() / 2


def test_sqrt8_keeps_the_maximum_to_float16() -> None:
    logits = logits_of(300, 10)
    assert np.array_equal(back("sqrt8", logits).max(1), logits.max(1).astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("K", [2, 10, 100])
def test_sqrt8_keeps_the_first_class(K: int, scale: float) -> None:
    logits = np.clip(logits_of(2000, K, scale=scale), -30000, 30000)
    two = np.sort(logits, axis=1)[:, -2:]
    clear = two[:, 1] - two[:, 0] > 1e-5 * np.ptp(logits, axis=1)
    assert clear.mean() > 0.95
    assert np.array_equal(back("sqrt8", logits).argmax(1)[clear], logits.argmax(1)[clear])


@pytest.mark.parametrize("first", [10.003, 10.006, 100.03, 20000.5])
def test_sqrt8_keeps_the_first_class_where_float16_would_not_tell_it_from_the_second(first: float) -> None:
    logits = np.float32([[0.0, first * (1 - 1e-4), first, 0.5 * first]])
    assert np.float16(logits[0, 1]) == np.float16(logits[0, 2])
    assert back("sqrt8", logits).argmax(1) == 2


@pytest.mark.parametrize("codec", CODECS)
def test_the_order_of_equal_logits_stays_so_that_the_first_of_them_is_first(codec: str) -> None:
    logits = np.float32([[0, 3, 1, 3, 3], [7, 7, 7, 7, 7]])
    assert back(codec, logits).argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [0.0, 1.5, -1000.0])
def test_a_row_of_equal_logits_stays_one(codec: str, value: float) -> None:
    logits = np.full((3, 10), value, np.float32)
    assert np.array_equal(back(codec, logits), logits)


def test_sqrt8_keeps_a_row_whose_differences_are_tiny() -> None:
    logits = np.float32([[0, 1e-4, 2e-4, 1e-3]])
    assert np.abs(back("sqrt8", logits) - logits).max() <= 1e-5


@pytest.mark.parametrize("codec", CODECS)
def test_logits_up_to_the_largest_come_back_finite_and_in_order(codec: str) -> None:
    largest = CODECS[codec].max_value
    logits = np.float32([[largest, -largest, 0.0], [-largest, -largest, largest / 2]])
    decoded = back(codec, logits)
    assert np.isfinite(decoded).all()
    assert np.argsort(decoded[0]).tolist() == [1, 2, 0]
    assert decoded[1].argmax() == 2
    np.testing.assert_allclose(decoded, logits, rtol=2 * HALF_ULP, atol=largest / 200)


# What it costs


def fidelity_by_hand(logits: Floats, decoded: Floats) -> dict[str, float]:
    def log_softmax(row: list[float], T: float) -> list[float]:
        top = max(row)
        total = math.log(math.fsum(math.exp((x - top) / T) for x in row))
        return [(x - top) / T - total for x in row]

    found: dict[str, float] = {"rows": len(logits), "flips": 0}
    found["flips"] = sum(
        a.index(max(a)) != b.index(max(b)) for a, b in zip(logits.tolist(), decoded.tolist(), strict=True)
    )
    for T in (1, 2, 4, 8):
        rows = []
        for a, b in zip(logits.tolist(), decoded.tolist(), strict=True):
            p, q = log_softmax(a, T), log_softmax(b, T)
            rows.append(math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)))
        found[f"kl_{T}"] = math.fsum(rows)
    return found


@pytest.mark.parametrize("noise", [0.01, 1.0, 5.0])
def test_fidelity_is_what_counting_gives(noise: float) -> None:
    logits = logits_of(40, 12)
    decoded = (logits + noise * np.random.default_rng(1).normal(size=logits.shape)).astype(np.float32)
    found, expected = measure_fidelity(logits, decoded), fidelity_by_hand(logits, decoded)
    assert found.keys() == expected.keys()
    assert (found["rows"], found["flips"]) == (expected["rows"], expected["flips"])
    assert expected["flips"] > 0 or noise < 1
    for T in (1, 2, 4, 8):
        assert found[f"kl_{T}"] == pytest.approx(expected[f"kl_{T}"], rel=1e-9)


def test_fidelity_measures_at_the_temperatures_that_are_published() -> None:
    assert TEMPERATURES == (1, 2, 4, 8)


def test_fidelity_of_the_rows_themselves_is_free() -> None:
    logits = logits_of(20, 10)
    assert measure_fidelity(logits, logits) == {"rows": 20, "flips": 0, "kl_1": 0, "kl_2": 0, "kl_4": 0, "kl_8": 0}


def test_fidelities_of_shards_add_up_to_that_of_the_whole() -> None:
    logits = logits_of(60, 10)
    decoded = back("sqrt8", logits)
    whole, parts = (
        measure_fidelity(logits, decoded),
        [measure_fidelity(logits[s], decoded[s]) for s in (slice(0, 20), slice(20, 60))],
    )
    for key, value in whole.items():
        assert parts[0][key] + parts[1][key] == pytest.approx(value, rel=1e-9)


def test_fidelity_of_hopeless_classes_is_finite() -> None:
    logits = np.float32([[0, -30000, 30000]])
    found = measure_fidelity(logits, np.float32([[0, 30000, -30000]]))
    assert all(math.isfinite(value) for value in found.values())
    assert found["kl_1"] == pytest.approx(60000, rel=1e-9)


@pytest.mark.parametrize(("codec", "most"), [("float32", 0.0), ("float16", 2e-6), ("sqrt8", 1e-3)])
@pytest.mark.parametrize("K", [10, 100, 1000])
def test_a_row_of_usual_logits_costs_at_most_so_many_nats(codec: str, most: float, K: int) -> None:
    logits = logits_of(500, K)
    found = measure_fidelity(logits, back(codec, logits))
    for T in (1, 2, 4, 8):
        assert 0 <= found[f"kl_{T}"] / 500 <= most
