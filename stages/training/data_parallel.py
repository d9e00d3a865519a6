"""A batch that several ranks share: each sees its own rows, the loss sees them all.

Every rank reads the targets of the whole batch and renders the views of its own rows. What the network says of them
(logits and taps) is gathered from all ranks, the loss is computed of the whole batch on every rank, and its gradient
with respect to this rank's own rows goes back through the network here. DistributedDataParallel takes the mean of
the ranks' gradients, so these are multiplied by the number of ranks: the sum is the gradient that one process has.
So a loss need not be a mean over rows: relations between rows, F1 of a batch and contrast are as right as `kd`.
What the losses own gets its full gradient on every rank.

Not as in one process: dropout, whose mask follows from seed, step and rank; and batch norm on a CPU, where PyTorch has
no SyncBatchNorm: each rank normalises by its own rows, and rank 0's running mean is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from softcache.base import rng
from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, LinearHead, ModelOutputs
from softcache.pipeline.loading.groups import get_rank_rows
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.models.precision import autocast
from softcache.stages.cli.configs import TrainingOptions
from softcache.stages.cli.console import Console
from softcache.stages.distributed.ranks import current_ranks

Features = dict[str, torch.Tensor]


def split_over_ranks(stream: CacheLoader) -> CacheLoader:
    """The same stream, rendering this rank's rows alone."""
    return (
        replace(stream, rank=current_ranks().rank, world=current_ranks().world)
        if current_ranks().world > 1
        else stream
    )


def check_batches_shareable(
    model: nn.Module, stream: CacheLoader, device: torch.device, config: TrainingOptions
) -> None:
    """Raise UsageError for a training that several ranks cannot share, before anything is written."""
    if (world := current_ranks().world) == 1:
        return
    if config.compile:
        raise UsageError("--compile is not for several ranks: leave it out, or train in one process")
    k = stream.draws_per_decode
    rows = k * (len(stream.rows) // (k * stream.steps_per_epoch))  # of the smallest batch
    least = 2 if has_batch_norm(model) and device.type == "cpu" else 1
    if rows // world < least:
        raise UsageError(
            f"{world} ranks share batches of {rows} rows, and each needs {least} of one:"
            " a larger --batch-size, or fewer ranks"
        )


def convert_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Batch norm over all ranks, on a GPU."""
    if current_ranks().world > 1 and device.type == "cuda" and has_batch_norm(model):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether what it says of a row depends on the others of the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def note_batch_norm(model: nn.Module, device: torch.device, console: Console) -> None:
    """Say so, once, where batches are not normalised as in one process."""
    if current_ranks().world > 1 and device.type == "cpu" and has_batch_norm(model):
        console.print(
            "batch norm on a CPU is each rank's own, over its rows of a batch: PyTorch has no SyncBatchNorm there"
        )


@dataclass
class DataParallelStep:
    """One rank's side of a training. model: views -> logits; kept: its taps, as it runs; modules: the losses' own;
    head(K): its last layer, where a loss asks for it, else None; seed: of dropout."""

    model: nn.Module
    features: Features
    modules: dict[str, nn.Module]
    head: Callable[[int], LinearHead | None]
    device: torch.device
    precision: str
    seed: int

    def __post_init__(self) -> None:
        self._network: DistributedDataParallel | None = None
        self._row_outputs = 0  # how many of these are of the batch's rows: all but the last layer's weight and bias
        self._local: list[torch.Tensor] = []
        self._leaves: list[torch.Tensor] = []
        self._unused: dict[tuple[bool, ...], list[nn.Parameter]] = {}
        self._trained = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        for module in self.modules.values():
            for value in module.state_dict().values():
                dist.broadcast(value, 0)

    def gather_outputs(self, batch: Batch, step: int) -> tuple[ModelOutputs, Batch]:
        """What all ranks say of the whole batch, of which a gradient comes back for this rank's rows; and the batch,
        without views. batch: parted, on the device; step: of the training, for dropout."""
        if self._network is None:
            self._network = self._wrap_model(batch.views[:2])
        rows = len(batch.index)
        with self._fork_rng(step), autocast(self.device, self.precision):
            logits, features = self._network(batch.views)
        self._local = [logits, *(x.float() for x in features.values())]
        self._row_outputs = len(self._local)
        if (head := self.head(logits.shape[1])) is not None:
            self._local += [head.weight, head.bias]
        self._leaves = [x.detach().requires_grad_(x.requires_grad) for x in self._local]
        whole = _gather_rows(self._leaves[: self._row_outputs], rows)
        head = LinearHead(*self._leaves[self._row_outputs :]) if head is not None else None
        # No loss looks at a view; rows of a batch are chosen from all that it has.
        return ModelOutputs(whole[0], dict(zip(features, whole[1:], strict=True)), head), replace(
            batch, views=batch.views.new_empty(rows, 0)
        )

    def backward(self, loss: torch.Tensor) -> None:
        """The gradient of the loss of the whole batch, summed over ranks, in every parameter."""
        loss.backward()  # type: ignore[no-untyped-call]
        used = tuple(own.grad is not None for own in self._leaves)
        unused = self._find_unused(used)
        torch.autograd.backward(*self._backward_inputs([own.grad for own in self._leaves]))
        for parameter in unused:
            parameter.grad = None  # as in one process: weight decay does not touch it
        _average_gradients([p.grad for p in self._trained if p.grad is not None])
        self._local, self._leaves = [], []

    def measure_gradient(self, term: torch.Tensor, weights: Sequence[nn.Parameter]) -> torch.Tensor:
        """Of one term of the whole batch with respect to all weights, as one vector, summed over ranks. The graph
        stays for backward, and nothing is accumulated."""
        read = [x for x in (*self._leaves, *self._trained) if x.requires_grad]
        found = dict(zip(read, torch.autograd.grad(term, read, retain_graph=True, allow_unused=True), strict=True))
        roots, onward = self._backward_inputs([found.get(own) for own in self._leaves])
        network = [weight for weight in weights if weight not in found]
        through = torch.autograd.grad(roots, network, onward, retain_graph=True, allow_unused=True)
        found |= zip(network, through, strict=True)
        whole = flatten_gradients([found[weight] for weight in weights], weights)
        dist.all_reduce(whole)
        return whole / current_ranks().world

    def _backward_inputs(
        self, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the network said here, and the gradient with which each goes back. gradients: of each of _own."""
        roots, onward = [], []
        for i, (live, own) in enumerate(zip(self._local, gradients, strict=True)):
            if not live.requires_grad or (i >= self._row_outputs and own is None):
                continue
            # Rows are this rank's alone, and are summed; the last layer has its full gradient on every rank. What the
            # loss does not read gets zeros: DistributedDataParallel waits for every parameter.
            gradient = torch.zeros_like(live) if own is None else own
            roots.append(live)
            onward.append(gradient * current_ranks().world if i < self._row_outputs else gradient)
        return roots, onward

    def _wrap_model(self, views: torch.Tensor) -> DistributedDataParallel:
        """The network under DistributedDataParallel, which gives every rank the weights of rank 0."""
        was_training = self.model.training
        self.model.eval()  # nothing is counted, nothing drawn
        with autocast(self.device, self.precision):
            logits = self.model(views)
        reached = _find_reached([logits, *self.features.values()])
        self.model.train(was_training)
        every = {p for p in self.model.parameters() if p.requires_grad}
        return DistributedDataParallel(
            _WithTaps(self.model, self.features), find_unused_parameters=not every <= reached
        )

    def _find_unused(self, used: tuple[bool, ...]) -> list[nn.Parameter]:
        """The parameters from which no way leads to the outputs that the loss reads."""
        if used not in self._unused:
            reached = _find_reached([live for live, is_used in zip(self._local, used, strict=True) if is_used])
            self._unused[used] = [p for p in self.model.parameters() if p.requires_grad and p not in reached]
        return self._unused[used]

    @contextmanager
    def _fork_rng(self, step: int) -> Iterator[None]:
        """Dropout of this rank and step; losses go on drawing what every rank draws."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(rng.integers((self.seed, 43, step), np.array([current_ranks().rank]), 2**31 - 1)[0]))
            yield


class _WithTaps(nn.Module):
    """views -> (logits, taps): all that a gradient comes back to is among its outputs."""

    def __init__(self, model: nn.Module, kept: Features):
        super().__init__()
        self.model, self.kept = model, kept

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, Features]:
        logits = self.model(views)
        return logits, dict(self.kept)


def _gather_rows(own: Sequence[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """Each tensor [n, …] of this rank's rows as [rows, …] of all ranks', its own part live. One collective."""
    rank, world = current_ranks().rank, current_ranks().world
    flatten_gradients = torch.cat([x.detach().flatten(1).float() for x in own], 1)
    cuts = [get_rank_rows(rows, r, world) for r in range(world)]
    sent = flatten_gradients.new_zeros(
        max(stop - first for first, stop in cuts), flatten_gradients.shape[1]
    )  # all must send as many rows
    sent[: len(flatten_gradients)] = flatten_gradients
    received = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(received, sent)
    whole, widths = [], [x[0].numel() for x in own]
    for i, columns in enumerate(zip(*(torch.split(r, widths, 1) for r in received), strict=True)):
        parts = [c[: stop - first].view(-1, *own[i].shape[1:]) for c, (first, stop) in zip(columns, cuts, strict=True)]
        whole.append(torch.cat([*parts[:rank], own[i], *parts[rank + 1 :]]))
    return whole


def flatten_gradients(
    gradients: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor], keep: int = 0
) -> torch.Tensor:
    """The gradients as one vector, of which there are as many as the first `keep` dimensions of the weights say; zeros
    where a weight has none."""
    each = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
    return torch.cat([g.reshape(*g.shape[:keep], -1) for g in each], keep)


def _average_gradients(gradients: Sequence[torch.Tensor]) -> None:
    """The mean over ranks, in place, of what is equal but for kernels that add in no fixed order."""
    if not gradients:
        return
    flatten_gradients = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flatten_gradients)
    means = torch.split(flatten_gradients / current_ranks().world, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def _find_reached(outputs: Sequence[torch.Tensor]) -> set[torch.Tensor]:
    """The parameters to which a gradient of these comes back."""
    found = {x for x in outputs if x.requires_grad and x.is_leaf}
    nodes, seen = [x.grad_fn for x in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # torch's AccumulateGrad
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found
