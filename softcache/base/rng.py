"""Random numbers without a generator: a pure function of the numbers that name what they are for.

No state means that batch size, order, workers, processes and devices cannot change a view, and that
no seed has to be stored. The mixing step is the output function of SplitMix64 (Steele, Lea and
Flood, OOPSLA 2014); 64-bit integers only, so the result is the same on every machine.
"""

import numpy as np
from numpy.typing import NDArray

_WEYL = np.uint64(0x9E3779B97F4A7C15)
Key = tuple[int | NDArray[np.int64], ...]  # arrays: a part of its own for each counter


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(key: Key, counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 random bits for each counter. key: what they are for, such as (seed, draw, purpose).

    counters: integers of any shape; the result has that shape and depends on nothing but the two.
    """
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for part in key:
            whole = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & 0xFFFFFFFFFFFFFFFF)
            state = _mix(state + whole + _WEYL)
        return _mix(state + (counters.astype(np.uint64) + np.uint64(1)) * _WEYL)


def integers(key: Key, counters: NDArray[np.integer], below: int) -> NDArray[np.int64]:
    """Uniform integers in [0, below), 1 <= below < 2**31, one for each counter (bias below 2**-32)."""
    high = bits(key, counters) >> np.uint64(32)
    return ((high * np.uint64(below)) >> np.uint64(32)).astype(np.int64)


def uniform(key: Key, counters: NDArray[np.integer]) -> NDArray[np.float64]:
    """Uniform float64 in [0, 1), multiples of 2**-53, one for each counter."""
    return (bits(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: tuple[int, ...], n: int) -> NDArray[np.int64]:
    """A random order of 0 … n-1. Ties (one in 2**64 a pair) fall back to the index order."""
    return np.argsort(bits(key, np.arange(n)), kind="stable")
