"""Asking the teacher: views in, rows of a shard out."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy
from softcache.pipeline.cache.codecs import CODECS, measure_fidelity
from softcache.pipeline.cache.manifest import ShardSpec
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.cache.shards import Arrays
from softcache.pipeline.loading.rendering import render_with_checksums
from softcache.stages.cli.configs import CacheConfig

from .inference import TeacherInference, TeacherOutputs

_HALF = 65504.0  # the largest float16
InferredBatch = tuple[NDArray[np.uint32], torch.Tensor, dict[str, torch.Tensor]]


@dataclass
class TargetGenerator:
    """The teacher, and the views it is asked about. classes and shapes: K, and {tap: row shape}, seen on two views.

    Of settings it reads seed, codec, batch_size and workers.
    """

    transfer_set: TransferSet
    views: ViewPolicy
    inference: TeacherInference
    config: CacheConfig

    def __post_init__(self) -> None:
        self.teacher, self.taps = self.inference.teacher, self.inference.taps
        index = np.arange(min(2, len(self.transfer_set.splits["train"])))
        _, logits, features = next(self._infer_batches("train", 0, index))
        self.classes = logits.shape[1]
        self.shapes = {tap: list(x.shape[1:]) for tap, x in features.items()}
        if self.transfer_set.classes and self.classes != len(self.transfer_set.classes):
            raise UsageError(
                f"the teacher knows {self.classes} classes, the data have {len(self.transfer_set.classes)}"
            )

    def compute_shard(self, piece: ShardSpec, shown: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """The rows of a shard, those datasets that it is to hold, and what its codec cost where it holds logits."""
        order = make_row_order(self.config.seed, piece.split, len(self.transfer_set.splits[piece.split]))
        index = order[piece.start : piece.start + piece.rows]
        logits = np.empty((piece.rows, self.classes), np.float32)
        features = {
            tap: np.empty((piece.rows, *shape), np.float16)
            for tap, shape in self.shapes.items()
            if f"features/{tap}" in piece.datasets
        }
        codec = CODECS[self.config.codec]
        crcs, at = np.empty(piece.rows, np.uint32), 0
        for crc, said, tapped in self._infer_batches(piece.split, piece.draw, index):
            rows = slice(at, at := at + len(crc))
            crcs[rows] = crc
            _store_batch(said, logits[rows], codec.max_value, piece, index[rows], "output")
            for tap, kept in features.items():
                _store_batch(tapped[tap], kept[rows], _HALF, piece, index[rows], f"tap '{tap}'")
            shown(len(crc))
        labels = self.transfer_set.splits[piece.split].labels[index]
        keys = {"index": index.astype("<u4"), "label": labels.astype("<i4"), "view_crc32": crcs.astype("<u4")}
        arrays: Arrays = {**{f"features/{tap}": x for tap, x in features.items()}, **keys}
        if "logits" not in piece.datasets:
            return arrays, {}
        stored = codec.encode(logits)
        decoded = codec.decode(stored)
        hits = int((decoded.argmax(1) == labels).sum())
        return {**stored, **arrays}, {"correct": hits, **measure_fidelity(logits, decoded)}

    def compute_rows(
        self, split: str, draw: int, index: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """logits [n, K] and features {tap: [n, …]} of a few rows, as they are before the codec."""
        said = [(logits, features) for _, logits, features in self._infer_batches(split, draw, index)]
        features = {tap: torch.cat([one[1][tap] for one in said]).float().numpy() for tap in self.taps}
        return torch.cat([one[0] for one in said]).numpy(), features

    def _infer_batches(self, split: str, draw: int, index: NDArray[np.int64]) -> Iterator[InferredBatch]:
        """CRC-32 [B] of batches of views, and what the teacher says about them: logits float32 [B, K] and features
        {tap: [B, …]} in the dtype that they were computed in, on the CPU."""
        policy = self.views if split == "train" else self.views.without_augmentation()
        size, s, device = self.config.batch_size, self.config, self.inference.device
        batches = [index[i : i + size] for i in range(0, len(index), size)]
        images = self.transfer_set.splits[split].images
        rendered = render_with_checksums(
            images, policy, s.seed, batches, draw, s.workers, pinned=device.type == "cuda"
        )
        with self.inference.open() as answer, closing(rendered):
            for views, crc in rendered:
                said = answer(views.to(device, non_blocking=True))
                if said[0].ndim != 2:
                    raise UsageError(f"the teacher gives {list(said[0].shape)} for {len(views)} views, not [B, K]")
                yield crc, *_copy_to_cpu(said)


def _copy_to_cpu(said: TeacherOutputs) -> TeacherOutputs:
    """The same on the CPU. From a GPU all copies are under way before the first is waited for."""
    logits, features = said
    if logits.device.type == "cpu":
        return logits, dict(features)
    here = logits.to("cpu", non_blocking=True), {tap: x.to("cpu", non_blocking=True) for tap, x in features.items()}
    if logits.device.type == "cuda":
        torch.cuda.current_stream(logits.device).synchronize()
    return here


def _store_batch(
    values: torch.Tensor,
    rows: NDArray[np.floating],
    largest: float,
    piece: ShardSpec,
    index: NDArray[np.int64],
    what: str,
) -> None:
    """Write a batch [B, …] into the rows of a shard, in their dtype: the one copy that is made.

    Raises CacheError for a value that cannot be kept. What is looked at first is the extremes of what was written, one
    pass over half the bytes; only where they are at the end of the range are the values themselves.
    """
    kept = torch.from_numpy(rows)
    kept.copy_(values)
    low, high = torch.aminmax(kept)
    if -largest < float(low) and float(high) < largest:  # NaN is neither
        return
    exact = values.float().flatten(1).numpy()
    bad = np.flatnonzero(~(np.abs(exact) <= largest).all(1))
    if len(bad):
        worst = exact[bad[0]][~(np.abs(exact[bad[0]]) <= largest)][0]
        raise CacheError(
            f"the teacher's {what} for {piece.split} index {index[bad[0]]}, draw {piece.draw} is {worst}:"
            f" it cannot be kept (largest {largest:g})"
        )
