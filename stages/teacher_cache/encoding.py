"""Encoding the logits of a shard, in blocks: with a sparse codec a shard of many classes is too large in float32."""

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.tasks import CLASSES, HardTargets
from softcache.pipeline.cache.codecs import SAMPLE, Codec, RowKeys, measure_fidelity, measure_sample
from softcache.pipeline.cache.manifest import SPLITS
from softcache.pipeline.cache.shards import Arrays
from softcache.pipeline.cache.sizes import BLOCK_NUMBERS

_ENCODED_NUMBERS = 1 << 18  # that are encoded at once: top:100 of 21,841 classes takes 0.6 ms a row, all at once 4.5


def make_row_keys(seed: int, split: str, draw: int, index: NDArray[np.int64]) -> RowKeys:
    """Make the random numbers on which a codec's choices for rows depend: of the view alone, uint64 [n]."""
    return rng.bits((seed, 40 + SPLITS.index(split), draw), index)


def encode_targets(
    codec: Codec, logits: NDArray[np.float32], keys: RowKeys, labels: HardTargets, task: str
) -> tuple[Arrays, dict[str, float]]:
    """Encode logits, and measure what that costs.

    Args:
        codec: Of the cache.
        logits: float32 [n, K].
        keys: Of the rows, see `make_row_keys`.
        labels: Hard targets of the rows.
        task: See data/tasks.py.

    Returns:
        {dataset: rows}; and the sums of `measure_fidelity` or `measure_sample`, of the task "classes" with `correct`,
        the rows whose label is the top-1 class.
    """
    n, K = logits.shape
    rows = max(1, _ENCODED_NUMBERS // K)
    parts = [codec.encode(logits[i : i + rows], keys[i : i + rows]) for i in range(0, max(n, 1), rows)]
    encoded = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    decoded = codec.decode(encoded, K)
    correct = {"correct": int((decoded.argmax(1) == labels).sum())} if task == CLASSES else {}
    if codec.kind == SAMPLE:
        return encoded, {**correct, **measure_sample(logits, decoded)}
    return encoded, {**correct, **measure_fidelity(logits, decoded, task)}


class ShardEncoder:
    """Encodes the logits of a shard block by block, while they are computed.

    Args:
        codec: Of the cache.
        classes: K.
        batch_rows: Rows of a batch of the teacher; only the last one may have fewer.
        keys: Of the rows of the shard, see `make_row_keys`.
        labels: Hard targets of the rows of the shard.
        task: See data/tasks.py.
    """

    def __init__(self, codec: Codec, classes: int, batch_rows: int, keys: RowKeys, labels: HardTargets, task: str):
        self.codec, self.keys, self.labels, self.task = codec, keys, labels, task
        block = max(1, BLOCK_NUMBERS // (classes * batch_rows)) * batch_rows
        self._logits = np.empty((min(block, len(keys)), classes), np.float32)
        self._filled = 0  # rows of the block
        self._parts: list[tuple[Arrays, dict[str, float]]] = []
        self._encoded_rows = 0

    def next_rows(self, n: int) -> NDArray[np.float32]:
        """Return the place of the next n rows, float32 [n, K], which the caller fills."""
        if self._filled + n > len(self._logits):
            self._encode_block()
        self._filled += n
        return self._logits[self._filled - n : self._filled]

    def finish(self) -> tuple[Arrays, dict[str, float]]:
        """Return the encoded rows and the sums of `encode_targets`, of the whole shard."""
        self._encode_block()
        arrays = {name: np.concatenate([part[name] for part, _ in self._parts]) for name in self._parts[0][0]}
        return arrays, {name: sum(sums[name] for _, sums in self._parts) for name in self._parts[0][1]}

    def _encode_block(self) -> None:
        rows = slice(self._encoded_rows, self._encoded_rows + self._filled)
        logits = self._logits[: self._filled]
        self._parts.append(encode_targets(self.codec, logits, self.keys[rows], self.labels[rows], self.task))
        self._encoded_rows, self._filled = rows.stop, 0
