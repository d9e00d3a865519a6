"""Random numbers without a generator: a pure function of the numbers that name what they are for.

There is no state, so batch size, order, workers, processes and devices cannot change a view, and no seed has to be
stored. The mixing step is the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on 64-bit integers,
so the result is the same on every machine.

In all functions, the key says what the numbers are for, such as (seed, draw, purpose), and the counters say for which
row. A part of the key may also be int64 of the shape of the counters: a part for each counter.
"""

import numpy as np
from numpy.typing import NDArray

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_BUCKET, _CHUNK = 1 << 16, 1 << 18  # numbers sorted, and distributed, at once: they fit in a processor's cache
Key = tuple[int | NDArray[np.int64], ...]


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(key: Key, counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return 64 random bits for each counter.

    Args:
        key: What the bits are for.
        counters: Integers of any shape.

    Returns:
        uint64 of the shape of the counters; each number depends on the key and its counter alone.
    """
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for part in key:
            part64 = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & 0xFFFFFFFFFFFFFFFF)
            state = _mix(state + part64 + _WEYL)
        return _mix(state + (counters.astype(np.uint64) + np.uint64(1)) * _WEYL)


def integers(key: Key, counters: NDArray[np.integer], below: int) -> NDArray[np.int64]:
    """Return a uniform integer in [0, below) for each counter, int64; 1 <= below < 2**31, with a bias below 2**-32."""
    high = bits(key, counters) >> np.uint64(32)
    return ((high * np.uint64(below)) >> np.uint64(32)).astype(np.int64)


def uniform(key: Key, counters: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return a uniform number in [0, 1) for each counter, float64, a multiple of 2**-53."""
    return (bits(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: tuple[int, ...], n: int) -> NDArray[np.int64]:
    """Return the numbers 0 … n-1 in random order, int64 [n]. Ties, one in 2**64 pairs, stay in ascending order."""
    if n <= _BUCKET:
        return np.argsort(bits(key, np.arange(n)), kind="stable")
    return compact_permutation(key, n).astype(np.int64)


def compact_permutation(key: tuple[int, ...], n: int) -> NDArray[np.uint32]:
    """Return the same as `permutation`, in half the memory: uint32 [n], n up to 2**32.

    The numbers are distributed to buckets by the highest bits of their random number, then each bucket is sorted: for
    14 million 6 bytes a number in all, where sorting them at once takes 24, and no more time.
    """
    bucket_bits = max(1, (n // _BUCKET).bit_length())
    shift = np.uint64(64 - bucket_bits)
    bucket_of = np.empty(n, np.uint16)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        bucket_of[start:stop] = bits(key, np.arange(start, stop)) >> shift
    ends = np.cumsum(np.bincount(bucket_of, minlength=1 << bucket_bits))
    starts = np.concatenate([[0], ends[:-1]])
    order = np.empty(n, np.uint32)
    free = starts.copy()  # the next place in each bucket
    for start in range(0, n, _CHUNK):
        chunk = bucket_of[start : start + _CHUNK]
        counts = np.bincount(chunk, minlength=1 << bucket_bits)
        by_bucket = np.argsort(chunk, kind="stable")
        order[np.repeat(free - np.cumsum(counts) + counts, counts) + np.arange(len(chunk))] = by_bucket + start
        free += counts
    for start, stop in zip(starts.tolist(), ends.tolist(), strict=True):
        bucket = order[start:stop]
        bucket[:] = bucket[np.argsort(bits(key, bucket), kind="stable")]
    return order
