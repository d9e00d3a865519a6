"""Asking the teacher: views in, rows of a shard out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data.errors import Refused, WrongCommand
from data.transfer_set import TransferSet
from data.views import ViewPolicy
from pipeline.cache import row_order
from pipeline.codec import CODECS, fidelity
from pipeline.manifest import Piece
from pipeline.models.prepared import Prepared
from pipeline.proof import crc32
from pipeline.records import Outputs
from pipeline.shards import Arrays
from pipeline.stream import render_in_order
from pipeline.taps import tapped

from .held_out import autocast
from .settings import CacheSettings


@dataclass
class Ask:
    """The teacher, and the views it is asked about. classes and shapes: K, and {tap: row shape}, seen on two views.

    Of settings it reads seed, codec, precision, batch_size and workers.
    """

    transfer_set: TransferSet
    views: ViewPolicy
    teacher: Prepared
    taps: tuple[str, ...]
    settings: CacheSettings

    def __post_init__(self) -> None:
        index = np.arange(min(2, len(self.transfer_set.splits["train"])))
        said = next(self._answers("train", 0, index))[1]
        self.classes = said.logits.shape[1]
        self.shapes = {tap: list(x.shape[1:]) for tap, x in said.features.items()}
        if self.transfer_set.classes and self.classes != len(self.transfer_set.classes):
            raise WrongCommand(
                f"the teacher knows {self.classes} classes, the data have {len(self.transfer_set.classes)}"
            )

    def piece(self, piece: Piece, shown: Callable[[int], None]) -> tuple[Arrays, dict[str, float]]:
        """The rows of a shard, those datasets that it is to hold, and what its codec cost where it holds logits."""
        order = row_order(self.settings.seed, piece.split, len(self.transfer_set.splits[piece.split]))
        index = order[piece.start : piece.start + piece.rows]
        logits = np.empty((piece.rows, self.classes), np.float32)
        features = {
            tap: np.empty((piece.rows, *shape), np.float16)
            for tap, shape in self.shapes.items()
            if f"features/{tap}" in piece.datasets
        }
        crcs, at = np.empty(piece.rows, np.uint32), 0
        for views, said in self._answers(piece.split, piece.draw, index):
            rows = slice(at, at := at + len(views))
            crcs[rows], logits[rows] = crc32(views), said.logits.numpy()
            self._finite(piece, index[rows], logits[rows], "output", CODECS[self.settings.codec].largest)
            for tap, kept in features.items():
                values = said.features[tap]
                self._finite(piece, index[rows], values.flatten(1).numpy(), f"tap '{tap}'", 65504.0)
                kept[rows] = values.numpy()
            shown(len(views))
        labels = self.transfer_set.splits[piece.split].labels[index]
        keys = {"index": index.astype("<u4"), "label": labels.astype("<i4"), "view_crc32": crcs.astype("<u4")}
        arrays: Arrays = {**{f"features/{tap}": x for tap, x in features.items()}, **keys}
        if "logits" not in piece.datasets:
            return arrays, {}
        codec = CODECS[self.settings.codec]
        stored = codec.encode(logits)
        decoded = codec.decode(stored)
        hits = int((decoded.argmax(1) == labels).sum())
        return {**stored, **arrays}, {"correct": hits, **fidelity(logits, decoded)}

    def rows(
        self, split: str, draw: int, index: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """logits [n, K] and features {tap: [n, …]} of a few rows, as they are before the codec."""
        said = [said for _, said in self._answers(split, draw, index)]
        features = {tap: torch.cat([one.features[tap] for one in said]).numpy() for tap in self.taps}
        return torch.cat([one.logits for one in said]).numpy(), features

    def _answers(self, split: str, draw: int, index: NDArray[np.int64]) -> Iterator[tuple[torch.Tensor, Outputs]]:
        """Batches of views, and what the teacher says about them, on the CPU in float32."""
        policy = self.views if split == "train" else self.views.plain()
        size, s = self.settings.batch_size, self.settings
        device = self.teacher.scale.device
        batches = [index[i : i + size] for i in range(0, len(index), size)]
        pictures = self.transfer_set.splits[split].pictures
        with torch.inference_mode(), tapped(self.teacher.network, self.taps) as kept:
            for views in render_in_order(pictures, policy, s.seed, batches, draw, s.workers):
                with autocast(device, s.precision):
                    logits = self.teacher(views.to(device, non_blocking=True))
                if logits.ndim != 2:
                    raise WrongCommand(f"the teacher gives {list(logits.shape)} for {len(views)} views, not [B, K]")
                yield views, Outputs(logits.float().cpu(), {tap: x.float().cpu() for tap, x in kept.items()})

    def _finite(
        self, piece: Piece, index: NDArray[np.int64], values: NDArray[np.float32], what: str, largest: float
    ) -> None:
        bad = np.flatnonzero(~(np.abs(values) <= largest).all(1))
        if len(bad):
            worst = values[bad[0]][~(np.abs(values[bad[0]]) <= largest)][0]
            raise Refused(
                f"the teacher's {what} for {piece.split} index {index[bad[0]]}, draw {piece.draw} is {worst}:"
                f" it cannot be kept (largest {largest:g})"
            )
