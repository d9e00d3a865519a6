"""Data-parallel training: each rank runs the network on its rows of a batch, every rank computes the loss of all rows.

Every rank reads the targets of the whole batch and renders the views of its own rows. The student's outputs (logits
and features) are gathered from all ranks, and the loss is computed for the whole batch on every rank. So a loss need
not be a mean over rows: relations between rows, F1 of a batch and contrastive losses are as exact as `kd`.

The gradient of the loss L with respect to a weight w is the sum over the ranks r of J_r' g_r, with g_r = dL /
d(outputs of the rows of r) and J_r = d(outputs) / dw. Every rank has g_r for its own rows. Gradients are averaged
over the ranks after the backward pass, so `_GatherRows` multiplies g_r by their number: the mean of world * J_r' g_r
is that sum. What the loss reads directly (its own parts, the student's last layer) has its full gradient on every
rank, and the mean leaves it as it is.

DistributedDataParallel is not used: it waits for a gradient of every parameter, and a loss of hidden layers alone has
gradients for some only. The price of one all-reduce of the flat gradients is that it does not overlap with the
backward pass.

Two results differ from those of one process: dropout, whose mask is drawn from seed, step and rank; and batch norm on
a CPU, where PyTorch has no SyncBatchNorm: each rank normalises by its own rows, and the saved running mean is rank
0's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function

from softcache.base import rng
from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.loading.groups import get_rank_rows
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.sync_batch_norm import find_other_batch_norm, has_batch_norm, synchronize_batch_norm
from softcache.stages.cli.console import Console
from softcache.stages.cli.option_groups import TrainingOptions
from softcache.stages.distributed.ranks import current_ranks

from .gradient_norms import flatten_gradients


def split_over_ranks(stream: BatchStream) -> BatchStream:
    """Return the stream that renders the rows of this rank alone."""
    ranks = current_ranks()
    return replace(stream, rank=ranks.rank, world=ranks.world) if ranks.world > 1 else stream


def check_batches_shareable(
    model: nn.Module, stream: BatchStream, device: torch.device, config: TrainingOptions
) -> None:
    """Check, before anything is written, that several ranks can share the batches.

    Raises:
        UsageError: for --compile, or batches with too few rows for each rank.
    """
    if (world := current_ranks().world) == 1:
        return
    if config.compile:
        raise UsageError("--compile is not for several ranks: leave it out, or train in one process")
    if device.type == "cuda" and (name := find_other_batch_norm(model)):
        raise UsageError(
            f"the network has a batch norm of its own, {name}, which cannot normalise over the rows of several ranks:"
            " train in one process, or use torch.nn.BatchNorm2d and a layer for what it does besides"
        )
    rows = _count_rows_of_smallest_batch(stream)
    least = 2 if has_batch_norm(model) and device.type == "cpu" else 1
    if rows // world < least:
        raise UsageError(
            f"{world} ranks share batches of {rows} rows, and each needs {least} of one:"
            " a larger --batch-size, or fewer ranks"
        )


def count_least_rows(stream: BatchStream) -> int:
    """Count the rows of the smallest batch of a training, of those that one rank runs its network on."""
    return max(1, _count_rows_of_smallest_batch(stream) // current_ranks().world)


def _count_rows_of_smallest_batch(stream: BatchStream) -> int:
    k = stream.draws_per_decode
    return k * (len(stream.rows) // (k * stream.steps_per_epoch))


def convert_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace batch norm by SyncBatchNorm on a GPU, which normalises over the rows of all ranks."""
    if current_ranks().world > 1 and device.type == "cuda" and has_batch_norm(model):
        synchronize_batch_norm(model)


def note_batch_norm(model: nn.Module, device: torch.device, console: Console) -> None:
    """Print a note where batch norm differs from that of one process."""
    if current_ranks().world > 1 and device.type == "cpu" and has_batch_norm(model):
        console.print(
            "on a CPU, batch norm normalises over the rows of each rank alone: PyTorch has no SyncBatchNorm there"
        )


class DataParallelStep:
    """One rank's part of each step of a training.

    Args:
        model: uint8 views -> logits; rank 0's weights are sent to every rank.
        criterion: attached to the model; rank 0's trainable parts are sent to every rank.
        device: where the model is.
        precision: of the forward pass.
        seed: seed of dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: DistillationLoss,
        device: torch.device,
        precision: str,
        seed: int,
    ):
        self._model, self._criterion = model, criterion
        self._device, self._precision, self._seed = device, precision, seed
        for module in (model, criterion.parts):
            for value in module.state_dict().values():
                dist.broadcast(value, 0)

    def forward(self, batch: Batch, step: int) -> tuple[ModelOutputs, Batch]:
        """Run the model on this rank's rows and gather the outputs of all ranks.

        Args:
            batch: targets of all rows, views of this rank's rows, on the device.
            step: of the training, for dropout.

        Returns:
            The outputs for all rows, with gradients for this rank's rows; and the batch without views, which no loss
            reads.
        """
        rows = len(batch.index)
        with self._fork_rng(step), autocast(self._device, self._precision):
            logits = self._model(batch.views)
        local = self._criterion.collect_outputs(logits)
        logits, *features = gather_rows([local.logits, *local.features.values()], rows)
        outputs = ModelOutputs(logits, dict(zip(local.features, features, strict=True)), local.head)
        return outputs, replace(batch, views=batch.views.new_empty(rows, 0))

    @contextmanager
    def _fork_rng(self, step: int) -> Iterator[None]:
        """Seed dropout for this rank and step. The random numbers of losses stay the same on every rank."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            rank = np.array([current_ranks().rank])
            torch.manual_seed(int(rng.integers((self._seed, 43, step), rank, 2**31 - 1)[0]))
            yield


def gather_rows(local: Sequence[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """Gather the rows of all ranks by one collective.

    Gradients flow to this rank's rows alone, multiplied by the number of ranks; see the module's docstring. A tensor
    that no loss reads gets no gradient, as in one process: a gradient of zeros would let weight decay change the
    layers behind it.

    Args:
        local: tensors [n, …] of this rank's rows.
        rows: rows of the whole batch.

    Returns:
        Tensors float32 [rows, …] of all ranks' rows.
    """
    flat = _GatherRows.apply(rows, *(x.flatten(1).float() for x in local))
    return [x.reshape(rows, *like.shape[1:]) for x, like in zip(flat, local, strict=True)]


class _GatherRows(Function):
    """Tensors [n, D] of this rank -> [rows, D] of all ranks; backward, world * the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: int, *local: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ranks = current_ranks()
        ranges = [get_rank_rows(rows, rank, ranks.world) for rank in range(ranks.world)]
        ctx.rows, ctx.world = slice(*ranges[ranks.rank]), ranks.world
        columns = [x.shape[1] for x in local]
        most_rows = max(stop - start for start, stop in ranges)
        padded = local[0].new_zeros(most_rows, sum(columns))  # all_gather needs equal shapes
        padded[: len(local[0])] = torch.cat(local, 1)
        received = [torch.empty_like(padded) for _ in ranges]
        dist.all_gather(received, padded)
        gathered = torch.cat([part[: stop - start] for part, (start, stop) in zip(received, ranges, strict=True)])
        return tuple(x.contiguous() for x in torch.split(gathered, columns, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *(None if g is None else g[ctx.rows] * ctx.world for g in gradients)


def average_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, by one collective.

    A weight without a gradient on any rank keeps none, as in one process. Where only some ranks have a gradient, as in
    a network that skips layers at random, it counts as zero on the others.

    Args:
        weights: all trained weights.
    """
    present = torch.tensor([weight.grad is not None for weight in weights], device=weights[0].device)
    flat = average(torch.cat([flatten_gradients([weight.grad for weight in weights], weights), present.float()]))
    *means, shares = torch.split(flat, [*(weight.numel() for weight in weights), len(weights)])
    for weight, mean, share in zip(weights, means, shares.tolist(), strict=True):
        if share > 0:
            # In the memory layout of the weight (such as channels last), which the fused optimisers assume.
            weight.grad = torch.empty_like(weight) if weight.grad is None else weight.grad
            weight.grad.copy_(mean.view_as(weight))


def average(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over the ranks."""
    dist.all_reduce(x)
    return x / current_ranks().world
