"""How many views a second stage one makes, measured on the first ones."""

import time
from collections.abc import Callable

from softcache.pipeline.cache.manifest import Datasets, ShardSpec, count_row_bytes
from softcache.pipeline.cache.plan import choose_shard_rows
from softcache.stages.cli.console import progress_bar
from softcache.stages.teacher_cache.targets import TargetGenerator

_VIEWS = 512  # of the first turn
_SECONDS = 3.0  # of the turns after it
_SLOW = 10.0  # seconds of a first turn after which there is no other


def measure_rate(generator: TargetGenerator, datasets: Datasets) -> tuple[float, int]:
    """Compute the first rows of a shard as stage one does it: views are rendered, the teacher is run, logits encoded.

    A first turn warms everything up. A quick teacher is then timed on more views: the first batch of a shard is
    rendered before the teacher begins, which would count too much among few batches.

    Args:
        generator: Data, views and teacher.
        datasets: {name: (row shape, dtype)} of a row.

    Returns:
        Views a second, and the number of views that were timed.
    """
    shard_rows = choose_shard_rows(count_row_bytes(datasets), generator.config.shard_rows)
    rows = min(len(generator.transfer_set.splits["train"]), shard_rows)
    views = min(rows, _VIEWS)
    with progress_bar(views, "timing the teacher", "views") as bar:

        def count(done: int) -> None:
            bar.update(done)

        seconds = _time_turn(generator, datasets, views, count)
    if seconds > _SLOW:
        return views / seconds, views
    views = min(rows, max(views, int(_SECONDS * views / seconds)))
    total, turns = 0.0, 0
    while total < _SECONDS:
        total += _time_turn(generator, datasets, views, _ignore)
        turns += 1
    return turns * views / total, turns * views


def _ignore(_done: int) -> None:
    """Count nothing."""


def _time_turn(
    generator: TargetGenerator, datasets: Datasets, views: int, on_progress: Callable[[int], None]
) -> float:
    """Compute so many rows once, and return the seconds that it took."""
    start = time.perf_counter()
    generator.compute_shard(ShardSpec("", "train", 0, 0, views, datasets), on_progress)
    return time.perf_counter() - start
