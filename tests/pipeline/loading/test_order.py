"""The order of a pass over rows on disk: it is computed in parts, which change nothing of it."""

import itertools
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softcache.base import rng
from softcache.pipeline.loading import order as order_module
from softcache.pipeline.loading.order import EpochOrder, ShuffledBlocks


@dataclass(frozen=True)
class OnDisk:
    """A cache whose draws do not fit in memory."""

    def fits_in_memory(self, *_: object) -> bool:
        return False

    def index_at(self, _split: str, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return positions


def make_order(rows: NDArray[np.int64], batch_size: int, draws_per_decode: int = 1) -> EpochOrder:
    cache: Any = OnDisk()
    labels = np.arange(rows.max() + 1) % 3
    return EpochOrder(7, rows, labels, batch_size, 4, draws_per_decode, "", cache)


def shuffle_at_once(key: tuple[int, ...], rows: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The whole order of a pass, with all its blocks and windows in memory."""
    blocks = np.array_split(np.sort(rows), -(-len(rows) // 64))
    shuffled = [blocks[b] for b in rng.permutation(key, len(blocks))]
    windows = [np.concatenate(shuffled[w : w + width]) for w in range(0, len(shuffled), width)]
    return np.concatenate([window[rng.permutation((*key, i), len(window))] for i, window in enumerate(windows)])


@pytest.mark.parametrize("count", [1, 63, 64, 65, 4096, 4097, 9_999])
@pytest.mark.parametrize("width", [1, 3, 64])
def test_a_slice_of_the_order_is_that_of_the_whole(count: int, width: int) -> None:
    rows = np.flatnonzero(rng.bits((1,), np.arange(3 * count)) % np.uint64(3) > 0)[:count][::-1]
    expected = shuffle_at_once((5, 2), rows, width)
    blocks = ShuffledBlocks((5, 2), rows, width)
    np.testing.assert_array_equal(blocks[:], expected)
    bounds = sorted({0, 1, count // 3, count // 2, count - 1, count})
    for start, stop in itertools.combinations_with_replacement(bounds, 2):
        np.testing.assert_array_equal(blocks[start:stop], expected[start:stop])


@pytest.mark.parametrize("draws_per_decode", [1, 2])
def test_parts_change_no_batch(draws_per_decode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(5000)[::2]
    order = make_order(rows, 32, draws_per_decode)
    steps = 2 * draws_per_decode * order.steps_per_epoch + 5
    at_once = [(draws, batch) for draws, batches in order.batches(3, steps) for batch in batches]
    monkeypatch.setattr(order_module, "_PART_ROWS", 700)
    parts = list(order.batches(3, steps))
    in_parts = [(draws, batch) for draws, batches in parts for batch in batches]
    assert len(parts) > 6
    assert [draws for draws, _ in in_parts] == [draws for draws, _ in at_once]
    assert len(in_parts) == steps - 3
    for (_, batch), (_, expected) in zip(in_parts, at_once, strict=True):
        np.testing.assert_array_equal(batch, expected)
    whole = np.array_split(order.shuffle_rows(0), draws_per_decode * order.steps_per_epoch)
    for batch, expected in zip((batch for _, batch in at_once), whole[3:], strict=False):
        np.testing.assert_array_equal(batch, expected)


def test_the_first_batch_of_a_long_pass_takes_little_memory() -> None:
    rows = np.arange(3_000_000)
    order = make_order(rows, 256)
    tracemalloc.start()
    try:
        _, batches = next(order.batches(0, order.steps_per_epoch))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(batches[0]) == 256
    assert peak < 4 * len(rows)  # the whole order of the pass takes 16 bytes a row
