"""Mean, standard deviation and principal axes of an embedding, which losses standardise with."""

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .manifest import Datasets, ShardRecord, make_layout
from .shards import Arrays, Shard

_LEAST_SPREAD = 0.02  # as a share of the largest standard deviation


def measure_outputs(
    folder: Path, shards: Sequence[ShardRecord], datasets: Datasets, codec: Codec, with_axes: bool
) -> Arrays:
    """Measure the logits of the training rows in the first draw, in float64.

    Args:
        folder: Of the cache.
        shards: All of its shards.
        datasets: {name: (row shape, dtype)} of the cache.
        codec: Of the logits.
        with_axes: Whether principal axes are computed.

    Returns:
        `mean` and `std` float32 [D], the standard deviation of all rows; the largest one where it is below a fiftieth
        of that, so that dimensions that hardly vary do not dominate what is divided by it. With axes also `axes`
        float32 [D, D], orthonormal columns, the eigenvectors of the covariance, the largest variance first, the
        largest entry of each positive; and `axis_std` float32 [D], the standard deviation along each.
    """
    records = [shard for shard in shards if shard.split == "train" and shard.draw == 0 and shard.has_logits]
    rows = sum(record.rows for record in records)
    mean = np.sum([_read(folder, record, datasets, codec).sum(0) for record in records], 0) / rows
    products: NDArray[np.float64] = np.zeros((len(mean), len(mean)) if with_axes else len(mean))
    for record in records:
        centred = _read(folder, record, datasets, codec) - mean
        products += centred.T @ centred if with_axes else np.square(centred).sum(0)
    variance = (np.diagonal(products) if with_axes else products) / rows
    arrays: Arrays = {"mean": mean.astype("<f4"), "std": _limit_spread(np.sqrt(variance)).astype("<f4")}
    if with_axes:
        variances, vectors = np.linalg.eigh(products / rows)
        axes = vectors[:, ::-1]
        arrays["axis_std"] = _limit_spread(np.sqrt(np.maximum(variances[::-1], 0))).astype("<f4")
        largest = axes[np.abs(axes).argmax(0), np.arange(len(mean))]
        arrays["axes"] = np.ascontiguousarray(axes * np.sign(largest), "<f4")
    return arrays


def _limit_spread(spread: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return standard deviations in which those of dimensions that hardly vary are the largest one, and 1 for none."""
    largest = float(spread.max()) or 1.0
    return np.where(spread < _LEAST_SPREAD * largest, largest, spread)


def _read(folder: Path, record: ShardRecord, datasets: Datasets, codec: Codec) -> NDArray[np.float64]:
    """Read the logits of a shard, float64 [rows, D]."""
    layout = make_layout(record.rows, {name: datasets[name] for name in record.datasets})
    names = [name for name in record.datasets if name.startswith("logits")]
    with closing(Shard(folder, record.path, layout, record.bytes, record.checksum)) as shard:
        return codec.decode({name: shard.read(name) for name in names}, math.prod(datasets["logits"][0])).astype(
            np.float64
        )
