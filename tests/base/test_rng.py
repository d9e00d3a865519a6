"""Random numbers are a pure function of key and counter, pinned to the bit."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from softcache.base import rng

KEYS = st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4).map(tuple)


def counters(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def test_the_bits_are_those_of_splitmix64() -> None:
    # The published sequence of SplitMix64 from seed 0, which an empty key leaves unchanged.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert rng.bits((), np.arange(5)).tolist() == published


def test_numbers_are_pinned() -> None:
    assert rng.bits((1, 2, 3), counters(0, 1, 2**40)).tolist() == [
        0x214D4C07ECFEAAC5,
        0x6FF419CB83DFE1E6,
        0x8B20A75BB0E65277,
    ]
    assert rng.bits((-1,), counters(5)).tolist() == [0x276EBC0E52F41C24]
    assert rng.bits((2**64 - 1,), counters(5)).tolist() == [0x276EBC0E52F41C24]
    assert rng.integers((7,), np.arange(12), 9).tolist() == [6, 5, 4, 5, 3, 1, 8, 8, 7, 1, 8, 3]
    assert rng.uniform((0, 5), np.arange(3)).tolist() == [
        0.05805669817305514,
        0.7108318915884554,
        0.34717590356492045,
    ]
    assert rng.permutation((4, 1), 10).tolist() == [1, 0, 6, 7, 9, 4, 2, 8, 5, 3]


def bits_in_plain_python(key: tuple[int, ...], counter: int) -> int:
    """The same function on Python's integers of any length."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    state, weyl = 0, 0x9E3779B97F4A7C15
    for part in key:
        state = mix((state + part + weyl) % 2**64)
    return mix((state + (counter + 1) * weyl) % 2**64)


@settings(deadline=None)
@given(KEYS, st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.integers(1, 2**31 - 1))
def test_numbers_agree_with_plain_python(key: tuple[int, ...], values: list[int], below: int) -> None:
    expected = [bits_in_plain_python(key, value) for value in values]
    assert rng.bits(key, counters(*values)).tolist() == expected
    assert rng.integers(key, counters(*values), below).tolist() == [(x >> 32) * below >> 32 for x in expected]
    assert rng.uniform(key, counters(*values)).tolist() == [(x >> 11) / 2**53 for x in expected]


def test_a_part_of_the_key_may_differ_from_counter_to_counter() -> None:
    draws = counters(3, 0, 3)
    together = rng.bits((7, draws, 1), counters(5, 5, 6)).tolist()
    assert together == [int(rng.bits((7, int(d), 1), counters(c))[0]) for d, c in zip(draws, (5, 5, 6), strict=True)]


@settings(deadline=None)
@given(KEYS, st.integers(0, 300))
def test_a_permutation_has_every_number_once(key: tuple[int, ...], n: int) -> None:
    assert sorted(rng.permutation(key, n).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [0, 1, 65_537, 300_000, 1_000_003])
def test_a_long_permutation_is_that_of_one_stable_sort(n: int) -> None:
    expected = np.argsort(rng.bits((3, 1), np.arange(n)), kind="stable")
    for order in (rng.permutation((3, 1), n), rng.compact_permutation((3, 1), n)):
        np.testing.assert_array_equal(order, expected)
    assert rng.permutation((3, 1), n).dtype == np.int64


def test_ties_stay_in_ascending_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers of four bits, so that most are equal to another one."""
    bits = rng.bits
    monkeypatch.setattr(rng, "bits", lambda key, counters: bits(key, counters) & np.uint64(0xF << 60))
    expected = np.argsort(rng.bits((3,), np.arange(200_000)), kind="stable")
    np.testing.assert_array_equal(rng.permutation((3,), 200_000), expected)


def test_a_long_order_takes_little_memory() -> None:
    n = 2_000_000
    tracemalloc.start()
    try:
        order = rng.compact_permutation((3, 1), n)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert order.nbytes == 4 * n
    assert peak < 6 * n + (24 << 20)  # 48 MB where all numbers are sorted at once
