"""Asking the teacher again about rows that are in a cache: is it still the one that was asked?"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.reader import Cache
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.copied_commands import read_cache_config
from softcache.stages.runs.environment import select_device

from .inference import restore_inference
from .targets import TargetGenerator
from .teacher_source import load_cache_teacher

_ROWS, _SHARDS = 256, 16
# Of a row's range. float16 and sqrt8 cost 0.4 % at most, another processor's arithmetic less; rows of two other
# images differ by 40 % and more.
_MAX_DIFFERENCE = {"float32": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True)
class ReproducibilityReport:
    """What came out. rows: how many were asked; logits: the largest difference of one; share: of its row's range;
    features: per tap, the largest difference as a share of the largest value; most: what is taken for the same."""

    rows: int
    absolute: float
    relative: float
    features: dict[str, float]
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "rows": self.rows,
            "logits": self.absolute,
            "share": self.relative,
            "features": self.features,
            "most": self.tolerance,
        }

    def describe(self) -> str:
        """A line for people."""
        taps = "".join(f", {tap} by {share:.2%} of the largest" for tap, share in self.features.items())
        return (
            f"the teacher was asked again about {self.rows} rows: logits differ by {self.absolute:.3g} at most,"
            f" {self.relative:.3%} of their row's range{taps}"
        )

    def raise_if_different(self) -> None:
        """Raises CacheError when this is not the teacher's rounding any more."""
        for name, share in {"logits": self.relative, **self.features}.items():
            if not share <= self.tolerance:
                raise CacheError(
                    f"the teacher now says something else: {name} differ by {share:.2%},"
                    f" more than {self.tolerance:.0%}: its code or a library changed"
                )


def make_target_generator(cache: Cache, transfer_set: TransferSet, config: CheckConfig) -> TargetGenerator:
    """The cache's teacher, ready to be asked what stage one asked it. Raises CacheError for other weights."""
    teacher = load_cache_teacher(cache, config.weights, config.teacher).to(select_device(config.device))
    identity = cache.manifest.identity
    asked = replace(
        read_cache_config(cache),
        seed=cache.seed,
        codec=identity["codec"],
        precision=identity["precision"],
        workers=config.workers,
    )
    arithmetic = cache.manifest.arithmetic
    fold = arithmetic is not None and arithmetic.folded
    answering = restore_inference(teacher, tuple(cache.manifest.taps), identity["precision"], fold)
    ask = TargetGenerator(transfer_set, cache.views, answering, asked)
    if (ask.classes, ask.shapes) != (cache.classes, cache.manifest.taps):
        raise CacheError(f"the teacher's outputs are {ask.classes}, {ask.shapes} here, others in the cache")
    return ask


def check_reproducibility(cache: Cache, ask: TargetGenerator, bad: Collection[str] = ()) -> ReproducibilityReport:
    """Ask the teacher about some rows of the shards that are not bad, and compare with what they hold."""
    records = [r for r in cache.manifest.shards if r.correct is not None and r.path not in bad]
    damaged = {(r.split, r.draw, name) for r in cache.manifest.shards if r.path in bad for name in r.datasets}
    some = [records[i * len(records) // _SHARDS] for i in range(_SHARDS)] if len(records) > _SHARDS else records
    count, logits, share = 0, 0.0, 0.0
    features = dict.fromkeys(cache.manifest.taps, 0.0)
    for record in some:
        n = min(record.rows, -(-_ROWS // len(some)))
        positions = record.start + np.arange(n) * record.rows // n
        good = tuple(t for t in features if (record.split, record.draw, f"features/{t}") not in damaged)
        stored, kept = cache.read_stored(record.split, record.draw, positions, good)
        said, tapped = ask.compute_rows(record.split, record.draw, cache.index_at(record.split, positions))
        gap = np.abs(stored.numpy() - said).max(1)
        logits = _max_with_nan(logits, gap)
        share = _max_with_nan(share, gap / np.maximum(np.ptp(said, 1), 1e-3))
        for tap in good:
            largest = max(float(np.abs(tapped[tap]).max()), 1e-3)
            features[tap] = _max_with_nan(features[tap], np.abs(kept[tap].numpy() - tapped[tap]) / largest)
        count += n
    return ReproducibilityReport(count, logits, share, features, _MAX_DIFFERENCE[cache.manifest.identity["precision"]])


def _max_with_nan(most: float, values: NDArray[np.floating]) -> float:
    """The largest of all; NaN where one is, which `max` would pass over."""
    return float(np.max([most, values.max()]))
