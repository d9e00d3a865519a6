"""The loader of a cache: one epoch after the other, for anybody's training loop."""

import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from softcache.base.arguments import check_integer
from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch
from softcache.pipeline.taps.statistics import derive_features

from .groups import get_rank_rows
from .stream import BatchStream


class CacheLoader(IterableDataset[Batch]):
    """Batches of one split of a cache, with the teacher's targets for the very pixels that they show.

    Made by `Cache.loader`. One pass is one epoch: of the training split every row once, in the draw of this epoch, in
    a seeded order; of a held-out split every row in the order of the index. Each pass that reaches its last batch is
    followed by the next epoch; one that is left early begins again where it began. `set_epoch` chooses an epoch.
    Batches are prepared ahead by a thread, or by worker processes.

    It is given to a training loop as it is, like a DataLoader. Where one is required:
    `DataLoader(loader, batch_size=None)`. Under `torch.distributed` every batch is divided among the ranks: each gets
    its part of the rows, and all parts together are the batch of one process.

    Args:
        stream: The batches by step number, which the commands train from.
        taps: The features of a batch, derived from those of the stream.

    Attributes:
        stream: As given.
        epoch: The epoch of the next batch, from 0.
    """

    def __init__(self, stream: BatchStream, taps: tuple[str, ...] = ()):
        self.stream, self.taps = stream, taps
        self.epoch = 0
        self._first_step = 0  # with which a pass of this epoch begins; not 0 after load_state_dict
        self._next_step = 0  # of the current pass, the step after the last one that was yielded
        self._streams_of_ranks: dict[tuple[int, int], BatchStream] = {(0, 1): stream}

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return self.stream.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. Where a loaded state is in the middle of it, the pass begins there.

        Args:
            epoch: From 0.

        Raises:
            UsageError: The number is negative.
        """
        epoch = check_integer("epoch", epoch, least=0)
        if epoch != self.epoch:
            self.epoch, self._first_step, self._next_step = epoch, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch.

        Raises:
            CacheError: An image or a target cannot be read, or is damaged; or a view is not the one that the teacher
                saw.
            UsageError: A batch has fewer rows than there are ranks, or a DataLoader with workers iterates over this.
        """
        if get_worker_info() is not None:
            raise UsageError(
                "a DataLoader around a CacheLoader takes num_workers=0: the loader has processes of its own,"
                " cache.loader(…, workers=4)"
            )
        rank, world = _get_rank()
        stream = self._get_stream_of_rank(rank, world)
        epoch, first, steps = self.epoch, self._first_step, len(self)
        with closing(stream.batches(epoch * steps + first, (epoch + 1) * steps)) as batches:
            for step, batch in enumerate(batches, first + 1):
                if step < steps:
                    self.epoch, self._next_step = epoch, step
                else:
                    self.epoch, self._first_step, self._next_step = epoch + 1, 0, 0
                yield self._finish(batch, rank, world)

    def _get_stream_of_rank(self, rank: int, world: int) -> BatchStream:
        if (rank, world) not in self._streams_of_ranks:
            if len(self.stream.rows) // len(self) < world:
                raise UsageError(
                    f"{world} ranks share batches of {len(self.stream.rows) // len(self)} rows: a larger batch_size,"
                    " or fewer ranks"
                )
            self._streams_of_ranks[rank, world] = replace(self.stream, rank=rank, world=world)
        return self._streams_of_ranks[rank, world]

    def _finish(self, batch: Batch, rank: int, world: int) -> Batch:
        """Select this rank's rows, and compute the features that were asked for."""
        if world > 1:  # the views are of this rank's rows already
            first, last = get_rank_rows(len(batch.index), rank, world)
            views = batch.views
            batch = replace(replace(batch, views=batch.index).slice(first, last), views=views)
        if self.taps:
            batch = replace(batch, features=derive_features(batch.features, self.taps))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is: after the batch that was yielded last.

        Returns:
            Plain numbers and texts. `load_state_dict` of a loader with the same settings goes on from there.
        """
        return {"epoch": self.epoch, "step": self._next_step, **self._describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was: the next pass begins with the batch that would have been the next.

        Args:
            state: What `state_dict` returned, of a loader of the same cache and split with the same settings. Workers,
                device and number of ranks may differ.

        Raises:
            UsageError: It is of a loader with other settings.
        """
        if not isinstance(state, dict):
            raise UsageError(f"a {type(state).__name__} is no state of a loader")
        expected = self._describe()
        for name, value in expected.items():
            if state.get(name) != value:
                raise UsageError(f"this is the state of a loader with {name} {state.get(name)}, here it is {value}")
        epoch, step = state.get("epoch"), state.get("step")
        if type(epoch) is not int or type(step) is not int or epoch < 0 or not 0 <= step < len(self):
            raise UsageError(f"epoch {epoch}, step {step} is no place in a loader of {len(self)} batches an epoch")
        self.epoch, self._first_step, self._next_step = epoch, step, step

    def _describe(self) -> dict[str, Any]:
        """Return what decides which rows are in which batch."""
        stream = self.stream
        return {
            "split": stream.name,
            "seed": stream.order_seed,
            "batch_size": stream.batch_size,
            "draws": stream.draws,
            "draws_per_decode": stream.draws_per_decode,
            "sampler": stream.sampler,
            "rows": len(stream.rows),
            "checksum_of_rows": zlib.crc32(stream.rows.tobytes()),
            "checksum_of_labels": zlib.crc32(stream.labels.tobytes()),
            "cache": stream.source.fingerprint if stream.source else "",
        }


def _get_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
