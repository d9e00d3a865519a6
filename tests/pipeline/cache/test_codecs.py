"""Codecs: decoded logits are as near as promised, and what a codec costs is measured correctly."""

import math
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from softcache.data.tasks import CLASSES
from softcache.pipeline.cache.codecs import CODECS, TEMPERATURES, measure_fidelity

Floats = NDArray[np.float32]
HALF_ULP = 2.0**-11  # of float16, as a share of the number


def make_logits(n: int, K: int, seed: int = 0, scale: float = 3.0) -> Floats:
    """Make rows like those of networks: normal, with one class ahead of the others."""
    random = np.random.default_rng(seed)
    z = random.normal(scale=scale, size=(n, K))
    z[np.arange(n), random.integers(0, K, n)] += 2 * scale
    return z.astype(np.float32)


def make_keys(n: int) -> NDArray[np.uint64]:
    """Make the keys of rows, on which a codec that stores all logits does not depend."""
    return np.arange(n, dtype=np.uint64)


def encode_and_decode(codec: str, logits: Floats) -> Floats:
    """Encode logits to bytes and decode them."""
    stored = {
        name: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)
        for name, x in CODECS[codec].encode(logits, make_keys(len(logits))).items()
    }
    decoded = CODECS[codec].decode(stored, logits.shape[1])
    assert decoded.dtype == np.float32
    assert decoded.shape == logits.shape
    return decoded


def test_float16_is_decoded_to_the_float32_that_numpy_converts_it_to() -> None:
    """Every float16 there is, in arrays of two chunks and of other layouts."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for stored in (halves.reshape(2, -1), halves.reshape(-1, 256).T, halves[:0].reshape(0, 10)):
        np.testing.assert_array_equal(
            CODECS["float16"].decode({"logits": stored}, stored.shape[1]), stored.astype(np.float32)
        )


# What is stored


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("K", [2, 10, 1000])
def test_encoded_arrays_have_the_shapes_and_dtypes_that_the_codec_lists(codec: str, K: int) -> None:
    encoded = CODECS[codec].encode(make_logits(5, K), make_keys(5))
    datasets = CODECS[codec].datasets(K)
    assert {name: (x.shape[1:], x.dtype.str) for name, x in encoded.items()} == datasets
    assert all(len(x) == 5 for x in encoded.values())
    assert "logits" in datasets, "readers look for this dataset"


@pytest.mark.parametrize(("codec", "bytes_per_row"), [("float16", 2 * 100), ("float32", 4 * 100), ("sqrt8", 100 + 4)])
def test_the_bytes_of_a_row_of_100_classes(codec: str, bytes_per_row: int) -> None:
    assert sum(x.nbytes for x in CODECS[codec].encode(make_logits(7, 100), make_keys(7)).values()) == 7 * bytes_per_row


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_does_not_change_the_logits_and_rows_are_independent(codec: str) -> None:
    logits = make_logits(6, 5)
    before = logits.copy()
    decoded = encode_and_decode(codec, logits)
    assert np.array_equal(logits, before)
    for i in range(6):
        assert np.array_equal(encode_and_decode(codec, logits[i : i + 1])[0], decoded[i])


@pytest.mark.parametrize("codec", CODECS)
def test_no_rows_are_encoded_and_decoded_to_no_rows(codec: str) -> None:
    assert encode_and_decode(codec, np.zeros((0, 4), np.float32)).shape == (0, 4)


# How near decoded logits are


def test_float32_is_exact_to_the_bit() -> None:
    logits = np.concatenate([make_logits(50, 10), np.float32([[3.4e38, -3.4e38, 1e-45, -0.0, 0, 1, 2, 3, 4, 5]])])
    assert encode_and_decode("float32", logits).tobytes() == logits.tobytes()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_float16_is_within_half_a_unit_in_the_last_place(scale: float) -> None:
    logits = np.clip(make_logits(200, 20, scale=scale), -65504, 65504)
    error = np.abs(encode_and_decode("float16", logits).astype(np.float64) - logits)
    assert (error <= np.maximum(HALF_ULP * np.abs(logits), 2.0**-25)).all()
    assert error.max() > 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("K", [2, 10, 1000])
def test_sqrt8_is_within_half_a_step_of_its_square_root_scale(K: int, scale: float) -> None:
    logits = make_logits(100, K, scale=scale)
    decoded = encode_and_decode("sqrt8", logits).astype(np.float64)
    top, span = (
        logits.max(1, keepdims=True).astype(np.float64),
        np.ptp(logits, axis=1, keepdims=True).astype(np.float64),
    )
    depth = top - logits
    step = span / 255 * (np.sqrt(depth / span) + 0.25 / 255) * (1 + HALF_ULP)
    below_the_top = np.abs((decoded.max(1, keepdims=True) - decoded) - depth)
    assert (below_the_top <= step + HALF_ULP * span + 1e-6 * np.abs(top)).all()
    assert (np.abs(decoded - logits) <= step + HALF_ULP * span + HALF_ULP * np.abs(top) + 1e-6 * np.abs(top)).all()


def test_sqrt8_is_finer_near_the_top() -> None:
    """The error of the classes just below the largest logit is smaller than that of the last ones."""
    logits = np.linspace(0, 10, 1001, dtype=np.float32)[None]
    error = np.abs(encode_and_decode("sqrt8", logits) - logits)[0]
    assert error[901:].max() < error[:500].max() / 2


def test_sqrt8_stores_the_maximum_as_float16() -> None:
    logits = make_logits(300, 10)
    assert np.array_equal(
        encode_and_decode("sqrt8", logits).max(1), logits.max(1).astype(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("K", [2, 10, 100])
def test_sqrt8_keeps_the_top_1_class(K: int, scale: float) -> None:
    logits = np.clip(make_logits(2000, K, scale=scale), -30000, 30000)
    top_2 = np.sort(logits, axis=1)[:, -2:]
    clear = top_2[:, 1] - top_2[:, 0] > 1e-5 * np.ptp(logits, axis=1)
    assert clear.mean() > 0.95
    assert np.array_equal(encode_and_decode("sqrt8", logits).argmax(1)[clear], logits.argmax(1)[clear])


@pytest.mark.parametrize("first", [10.003, 10.006, 100.03, 20000.5])
def test_sqrt8_keeps_the_top_1_class_where_two_logits_are_the_same_float16(first: float) -> None:
    logits = np.float32([[0.0, first * (1 - 1e-4), first, 0.5 * first]])
    assert np.float16(logits[0, 1]) == np.float16(logits[0, 2])
    assert encode_and_decode("sqrt8", logits).argmax(1) == 2


@pytest.mark.parametrize("codec", CODECS)
def test_equal_logits_stay_equal_so_that_the_first_of_them_is_the_top_1_class(codec: str) -> None:
    logits = np.float32([[0, 3, 1, 3, 3], [7, 7, 7, 7, 7]])
    assert encode_and_decode(codec, logits).argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if CLASSES in codec.tasks])
@pytest.mark.parametrize("value", [0.0, 1.5, -1000.0])
def test_a_row_of_equal_logits_is_exact(codec: str, value: float) -> None:
    logits = np.full((3, 10), value, np.float32)
    assert np.array_equal(encode_and_decode(codec, logits), logits)


def test_sqrt8_resolves_a_row_whose_differences_are_tiny() -> None:
    logits = np.float32([[0, 1e-4, 2e-4, 1e-3]])
    assert np.abs(encode_and_decode("sqrt8", logits) - logits).max() <= 1e-5


@pytest.mark.parametrize("codec", CODECS)
def test_logits_up_to_the_largest_value_are_decoded_finite_and_in_order(codec: str) -> None:
    largest = CODECS[codec].max_value
    logits = np.float32([[largest, -largest, 0.0], [-largest, -largest, largest / 2]])
    decoded = encode_and_decode(codec, logits)
    assert np.isfinite(decoded).all()
    assert np.argsort(decoded[0]).tolist() == [1, 2, 0]
    assert decoded[1].argmax() == 2
    np.testing.assert_allclose(decoded, logits, rtol=2 * HALF_ULP, atol=largest / 200)


# What a codec costs


def compute_fidelity_by_loops(logits: Floats, decoded: Floats) -> dict[str, float]:
    """Compute the same as measure_fidelity with Python's floats, row by row."""

    def log_softmax(row: list[float], T: float) -> list[float]:
        top = max(row)
        total = math.log(math.fsum(math.exp((x - top) / T) for x in row))
        return [(x - top) / T - total for x in row]

    sums: dict[str, float] = {"rows": len(logits), "flips": 0}
    sums["flips"] = sum(
        a.index(max(a)) != b.index(max(b)) for a, b in zip(logits.tolist(), decoded.tolist(), strict=True)
    )
    for T in (1, 2, 4, 8):
        rows = []
        for a, b in zip(logits.tolist(), decoded.tolist(), strict=True):
            p, q = log_softmax(a, T), log_softmax(b, T)
            rows.append(math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)))
        sums[f"kl_{T}"] = math.fsum(rows)
    return sums


@pytest.mark.parametrize("noise", [0.01, 1.0, 5.0])
def test_fidelity_equals_a_computation_by_loops(noise: float) -> None:
    logits = make_logits(40, 12)
    decoded = (logits + noise * np.random.default_rng(1).normal(size=logits.shape)).astype(np.float32)
    sums, expected = measure_fidelity(logits, decoded), compute_fidelity_by_loops(logits, decoded)
    assert sums.keys() == expected.keys()
    assert (sums["rows"], sums["flips"]) == (expected["rows"], expected["flips"])
    assert expected["flips"] > 0 or noise < 1
    for T in (1, 2, 4, 8):
        assert sums[f"kl_{T}"] == pytest.approx(expected[f"kl_{T}"], rel=1e-9)


def test_fidelity_is_measured_at_temperatures_1_2_4_and_8() -> None:
    assert TEMPERATURES == (1, 2, 4, 8)


def test_equal_rows_cost_nothing() -> None:
    logits = make_logits(20, 10)
    assert measure_fidelity(logits, logits) == {"rows": 20, "flips": 0, "kl_1": 0, "kl_2": 0, "kl_4": 0, "kl_8": 0}


def test_sums_of_parts_add_up_to_those_of_all_rows() -> None:
    logits = make_logits(60, 10)
    decoded = encode_and_decode("sqrt8", logits)
    sums = measure_fidelity(logits, decoded)
    parts = [measure_fidelity(logits[s], decoded[s]) for s in (slice(0, 20), slice(20, 60))]
    for key, value in sums.items():
        assert parts[0][key] + parts[1][key] == pytest.approx(value, rel=1e-9)


def test_fidelity_of_impossible_classes_is_finite() -> None:
    logits = np.float32([[0, -30000, 30000]])
    sums = measure_fidelity(logits, np.float32([[0, 30000, -30000]]))
    assert all(math.isfinite(value) for value in sums.values())
    assert sums["kl_1"] == pytest.approx(60000, rel=1e-9)


@pytest.mark.parametrize(("codec", "nats"), [("float32", 0.0), ("float16", 2e-6), ("sqrt8", 1e-3)])
@pytest.mark.parametrize("K", [10, 100, 1000])
def test_the_cost_of_ordinary_logits_is_bounded(codec: str, nats: float, K: int) -> None:
    logits = make_logits(500, K)
    sums = measure_fidelity(logits, encode_and_decode(codec, logits))
    for T in (1, 2, 4, 8):
        assert 0 <= sums[f"kl_{T}"] / 500 <= nats


@pytest.mark.parametrize(("n", "K"), [(700, 1000), (3, 300_000)])
def test_the_cost_of_many_logits_is_measured_in_little_memory(n: int, K: int) -> None:
    logits = make_logits(n, K, seed=5)
    decoded = logits.astype(np.float16).astype(np.float32)
    tracemalloc.start()
    try:
        sums = measure_fidelity(logits, decoded)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    parts = [measure_fidelity(logits[i : i + 1], decoded[i : i + 1]) for i in range(n)]
    for name, value in sums.items():
        assert value == pytest.approx(sum(part[name] for part in parts), rel=1e-9)
    assert peak < 64 * max(K, 1 << 18)
