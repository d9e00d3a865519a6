"""The reproducibility check: does the teacher still output what a cache holds of it?"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import softmax

from softcache.base.errors import CacheError
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.codecs import DENSE
from softcache.pipeline.cache.reader import CacheReader
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.copied_commands import read_cache_config
from softcache.stages.teacher_cache.teachers.cache_teacher import load_cache_teacher
from softcache.stages.teacher_cache.teachers.class_maps import restore_class_map
from softcache.stages.teacher_cache.teachers.file_teachers import (
    is_file_arch,
    load_cached_file_teacher,
    select_teacher_device,
)

from .encoding import make_row_keys
from .inference import LOGITS, restore_inference
from .targets import TargetGenerator

_ROWS, _MAX_SHARDS = 256, 16
# {precision: share of a row's range}. float16 and sqrt8 cost 0.4 % at most, the rounding of another processor less;
# rows of two different images differ by 40 % and more.
_TOLERANCE = {"float32": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True)
class ReproducibilityReport:
    """How far the teacher's outputs are from those in a cache.

    Attributes:
        rows: Rows that were compared.
        absolute: Largest difference of a logit; with a sparse codec, of a probability at temperature 1.
        relative: Largest difference of a logit, as a share of the range of its row; with a sparse codec, the total
            variation distance of the rows' distributions, the mean over the rows of a shard.
        features: {tap: largest difference, as a share of the largest value}.
        tolerance: Share up to which outputs count as equal.
        is_sparse: Whether the codec is a sparse one.
    """

    rows: int
    absolute: float
    relative: float
    features: dict[str, float]
    tolerance: float
    is_sparse: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "rows": self.rows,
            "logits": self.absolute,
            "share": self.relative,
            "features": self.features,
            "most": self.tolerance,
        }

    def describe(self) -> str:
        """Describe the report in one line."""
        taps = "".join(f", {tap} by {share:.2%} of the largest value" for tap, share in self.features.items())
        if self.is_sparse:
            return (
                f"the teacher was run again on {self.rows} rows: probabilities differ by {self.absolute:.3g} at most,"
                f" {self.relative:.3%} of a row's sum{taps}"
            )
        return (
            f"the teacher was run again on {self.rows} rows: logits differ by {self.absolute:.3g} at most,"
            f" {self.relative:.3%} of their row's range{taps}"
        )

    def raise_if_different(self) -> None:
        """Check that the outputs are equal within the tolerance.

        Raises:
            CacheError: They are not, or they are NaN.
        """
        for name, share in {"probabilities" if self.is_sparse else "logits": self.relative, **self.features}.items():
            if not share <= self.tolerance:
                raise CacheError(
                    f"the teacher's outputs have changed: {name} differ by {share:.2%},"
                    f" more than {self.tolerance:.0%}: its code or a library changed"
                )


def make_target_generator(cache: CacheReader, transfer_set: TransferSet, config: CheckConfig) -> TargetGenerator:
    """Load the teacher of a cache, to be run as when the cache was written.

    Args:
        cache: The cache.
        transfer_set: Its images.
        config: Options of the command; weights, teacher, device and workers are read.

    Raises:
        CacheError: The weights are not those of the cache, or the outputs have other shapes.
        UsageError: There are no such weights, or they do not fit the arch.
    """
    if is_file_arch(cache.teacher):
        teacher = load_cached_file_teacher(cache, transfer_set, config)
    else:
        teacher = load_cache_teacher(cache, config)
    teacher = teacher.to(select_teacher_device(teacher, config.device))
    if columns := cache.manifest.identity["teacher"].get("class_map"):
        teacher.class_map = restore_class_map(columns, cache.classes, str(cache.folder))
    identity, precision_record = cache.manifest.identity, cache.manifest.arithmetic
    outputs = identity["teacher"].get("outputs", LOGITS)
    cache_config = replace(
        read_cache_config(cache),
        seed=cache.seed,
        codec=identity["codec"],
        precision=identity["precision"],
        workers=config.workers,
        outputs=outputs,
        teacher_size=identity["teacher"].get("view_size", 0),
    )
    fold = precision_record is not None and precision_record.folded
    taps = tuple(cache.manifest.taps)
    inference = restore_inference(teacher, taps, identity["precision"], fold, outputs, cache.task)
    generator = TargetGenerator(transfer_set, cache.views, inference, cache_config)
    if (generator.classes, generator.shapes) != (cache.classes, cache.manifest.taps):
        raise CacheError(
            f"the teacher outputs {generator.classes} classes and features {generator.shapes}, the cache has"
            f" {cache.classes} and {cache.manifest.taps}: its code or a library changed"
        )
    return generator


def check_reproducibility(
    cache: CacheReader, generator: TargetGenerator, bad: Collection[str] = ()
) -> ReproducibilityReport:
    """Run the teacher again on some rows, and compare its outputs with those in the cache.

    Args:
        cache: The cache.
        generator: Its teacher, see `make_target_generator`.
        bad: Paths of shards that are damaged. They are not read.
    """
    manifest = cache.manifest
    records = [record for record in manifest.shards if record.has_logits and record.path not in bad]
    damaged = {(r.split, r.draw, name) for r in manifest.shards if r.path in bad for name in r.datasets}
    if len(records) > _MAX_SHARDS:
        records = [records[i * len(records) // _MAX_SHARDS] for i in range(_MAX_SHARDS)]
    rows, absolute, relative = 0, 0.0, 0.0
    features = dict.fromkeys(manifest.taps, 0.0)
    for record in records:
        count = min(record.rows, -(-_ROWS // len(records)))
        positions = record.start + np.arange(count) * record.rows // count
        taps = tuple(tap for tap in features if (record.split, record.draw, f"features/{tap}") not in damaged)
        stored_logits, stored_features = cache.read_stored(record.split, record.draw, positions, taps)
        index = cache.index_at(record.split, positions)
        new_logits, new_features = generator.compute_rows(record.split, record.draw, index)
        if cache.codec.kind == DENSE:
            difference = np.abs(stored_logits.numpy() - new_logits).max(1)
            absolute = _max_with_nan(absolute, difference)
            relative = _max_with_nan(relative, difference / np.maximum(np.ptp(new_logits, 1), 1e-3))
        else:
            keys = make_row_keys(cache.seed, record.split, record.draw, index)
            again = cache.codec.decode(cache.codec.encode(new_logits, keys), cache.classes)
            distance = torch.abs(softmax(stored_logits, 1) - softmax(torch.from_numpy(again), 1))
            absolute = _max_with_nan(absolute, distance.amax(1).numpy())
            relative = _max_with_nan(relative, distance.sum(1).mean(0, keepdim=True).numpy() / 2)
        for tap in taps:
            largest = max(float(np.abs(new_features[tap]).max()), 1e-3)
            difference = np.abs(stored_features[tap].numpy() - new_features[tap])
            features[tap] = _max_with_nan(features[tap], difference / largest)
        rows += count
    tolerance = _TOLERANCE[manifest.identity["precision"]]
    return ReproducibilityReport(rows, absolute, relative, features, tolerance, cache.codec.kind != DENSE)


def _max_with_nan(largest: float, values: NDArray[np.floating]) -> float:
    """Return the largest of all these; NaN where one is, which `max` would pass over."""
    return float(np.max([largest, values.max()]))
