"""Students of one arch as one vectorised model (torch.func): one step moves all, of different seeds or loss weights.

Small students leave most of a processor idle: what a step of one costs is calls, and 32 of them take no more calls
than one. Batched products add in another order: the weights are those of a student alone but for rounding.
"""

import copy
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, stack_module_state

from softcache.base.errors import CacheError, TrainingStopped, UsageError
from softcache.base.files import make_folder, publish_text, remove_stale_files
from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.losses import Loss, at_epoch
from softcache.pipeline.losses.base import resolved
from softcache.pipeline.metrics.classification import summarize
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.console import Console

from .checkpoint import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    VECTORIZED_FOLDER,
    FinishedTraining,
    TrainState,
    format_epoch_lines,
    read_finished,
)
from .data_parallel import flatten_gradients
from .epoch_line import make_epoch_line
from .loop import divergence_error, save_weights, train_several, write_event_file
from .progress import show_progress
from .step import TrainingRun, term_names
from .validation import HeldOutSplit

_MEMBERS = "members.txt"


class VectorizedModel(nn.Module):
    """S models of one arch as one: uint8 views [B, C, H, W] -> float32 logits [B, S, K]."""

    def __init__(self, models: Sequence[PreparedModel]):
        super().__init__()
        weights, buffers = stack_module_state([model.network for model in models])
        self._names, self._buffer_names = list(weights), list(buffers)
        trained = {name: p.requires_grad for name, p in models[0].network.named_parameters()}
        self.stacked = nn.ParameterList(nn.Parameter(x.detach(), trained[name]) for name, x in weights.items())
        for i, value in enumerate(buffers.values()):
            self.register_buffer(f"buffer{i}", value)
        self._plain = [copy.deepcopy(models[0])]  # in a list: its own weights are not trained

    def train(self, mode: bool = True) -> "VectorizedModel":
        """Of the networks as well: dropout, batch norm."""
        self._plain[0].train(mode)
        super().train(mode)
        return self

    def state_of(self, i: int) -> dict[str, torch.Tensor]:
        """The network's state dict of one of them."""
        weights = zip(self._names, self.stacked, strict=True)
        return {name: x[i].detach().clone() for name, x in (*weights, *self._buffers_by_name().items())}

    def _buffers_by_name(self) -> dict[str, torch.Tensor]:
        return {name: self.get_buffer(f"buffer{i}") for i, name in enumerate(self._buffer_names)}

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        plain = self._plain[0]
        x = plain.prepare_input(views)
        weights = dict(zip(self._names, self.stacked, strict=True))

        def one(weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
            logits: torch.Tensor = functional_call(plain.network, (weights, buffers), (x,))
            return logits

        each = torch.vmap(one, randomness="different")(weights, self._buffers_by_name())
        return each.float().movedim(0, 1)


def check_vectorizable(jobs: Sequence[TrainingRun]) -> None:
    """Raise UsageError for trainings that cannot be one vectorised model."""
    first = jobs[0]
    for job in jobs:
        config = job.config
        if any(_reads_features(loss) for loss in job.losses):
            raise UsageError(
                "--vectorize takes losses that read logits and labels alone and have no part of their own, not"
                f" {', '.join(term_names(job.losses))}: leave it out"
            )
        if config.select != "last" or config.ema or config.keep_every or config.compile:
            raise UsageError("--vectorize takes no --select, --ema, --keep-every or --compile: leave it out")
        if [_without_weight(loss) for loss in job.losses] != [_without_weight(loss) for loss in first.losses]:
            raise UsageError(
                f"--vectorize takes losses that differ in their weights alone, not in '{first.folder}' and"
                f" '{job.folder}': leave it out"
            )
    network = first.model.network
    kept = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    if kept != set(network.state_dict()):
        raise UsageError(
            "--vectorize cannot take a network with tied weights or buffers that are not kept: leave it out"
        )
    try:
        views = next(first.stream.batches(0, 1)).slice(0, 2).to(first.device).views
        with torch.no_grad():
            VectorizedModel([job.model for job in jobs[:2]]).to(first.device).eval()(views)
    except RuntimeError as error:
        why = str(error).splitlines()[0][:120]
        raise UsageError(f"--vectorize cannot take this network ({why}): leave it out") from None


def _reads_features(loss: Loss) -> bool:
    has_part = type(loss).build_module is not Loss.build_module
    return bool(loss.student_taps() or loss.teacher_taps() or loss.needs_head or has_part)


def _without_weight(loss: Loss) -> Loss:
    return replace(loss, weight=0.0)  # type: ignore[type-var]


def train_vectorized(
    jobs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """As training.fit_together, as one model of those that are not finished.

    What it keeps while it runs lies in a folder of the first one's; with other students it starts over.
    """
    left = _find_unfinished(jobs)
    for job in jobs:
        make_folder(job.folder)
        if (job.folder / CHECKPOINT_FILE).is_file():
            raise CacheError(
                f"'{job.folder}' was begun without --vectorize: go on without it, or choose another --out"
            )
        if (job.folder / VECTORIZED_FOLDER).is_dir() and (
            len(left) < 2 or job is not left[0] or _members(job) != _names(left)
        ):
            console.print(f"'{job.folder / VECTORIZED_FOLDER}' is of other students together: these start over")
            shutil.rmtree(job.folder / VECTORIZED_FOLDER)
    ended: dict[str, FinishedTraining | TrainingStopped] = {}
    if len(left) > 1:
        ended = dict(zip(_names(left), _train_as_one(left, held_out, console), strict=True))
    if rest := [job for job in jobs if str(job.folder) not in ended]:  # finished, or alone
        ended |= dict(zip(_names(rest), train_several(rest, held_out, console), strict=True))
    return [ended[name] for name in _names(jobs)]


def _find_unfinished(jobs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """Those that one model is, or was begun to be, also where it was stopped while it published their weights."""
    for job in jobs:
        begun = [other for other in jobs if str(other.folder) in _members(job)]
        if begun and _names(begun) == _members(job):
            return begun
    return [job for job in jobs if not (job.folder / f"{job.name}.pt").is_file()]


def _names(jobs: Sequence[TrainingRun]) -> list[str]:
    return [str(job.folder) for job in jobs]


def _members(job: TrainingRun) -> list[str]:
    """Of the model that was begun in a student's folder."""
    path = job.folder / VECTORIZED_FOLDER / _MEMBERS
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _train_as_one(
    jobs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    first, folder = jobs[0], jobs[0].folder / VECTORIZED_FOLDER
    for job in jobs:
        remove_stale_files(job.folder, (METRICS_FILE, f"{job.name}.pt"))
    make_folder(folder)
    publish_text(folder / _MEMBERS, "".join(f"{name}\n" for name in _names(jobs)))
    stack = VectorizedModel([job.model for job in jobs]).to(first.device)
    with first.rng_state:
        state = TrainState.create(stack, {}, first.config, first.learning_rate_factor)
        begin = state.restore(folder, first.device)
    _run_epochs(jobs, stack, state, begin, held_out, console)
    ended = [_finish(job, stack, state, i) for i, job in enumerate(jobs)]
    shutil.rmtree(folder)
    return ended


def _run_epochs(
    jobs: Sequence[TrainingRun],
    stack: VectorizedModel,
    state: TrainState,
    begin: int,
    held_out: HeldOutSplit,
    console: Console,
) -> None:
    job, total = jobs[0], jobs[0].epochs * jobs[0].steps
    batches = job.stream.batches(begin * job.steps, total)
    sums = torch.zeros_like(_weights(jobs, begin))
    with show_progress(jobs, begin, lambda i: sums[:, i], f"{len(jobs)} of {job.name} as one", console) as shown:
        for epoch in range(begin, job.epochs):
            begun = time.perf_counter()
            losses = [at_epoch(loss, epoch, job.epochs) for loss in job.losses]
            weights = _weights(jobs, epoch)
            sums, norms = torch.zeros_like(weights), torch.zeros_like(weights)
            stack.train()
            for number in range(1, job.steps + 1):
                batch = next(batches).to(job.device)
                with job.rng_state:
                    sums += _step(job, stack, state, batch, losses, weights, norms if number == job.steps else None)
                shown.step(len(batch.index))
            line = _measured(jobs, sums / job.steps, norms, held_out.logits(stack), held_out, epoch)
            share = round((time.perf_counter() - begun) / len(jobs), 6)
            with job.rng_state:
                state.save(job.folder / VECTORIZED_FOLDER, line | {"share": share}, "last")
            shown.epoch(line["students"])


def _weights(jobs: Sequence[TrainingRun], epoch: int) -> torch.Tensor:
    """float32 [terms, S]: what each term weighs in each student."""
    each = [[resolved(at_epoch(loss, epoch, job.epochs).weight) for loss in job.losses] for job in jobs]
    return torch.tensor(each, device=jobs[0].device).T.contiguous()


def _step(
    job: TrainingRun,
    stack: VectorizedModel,
    state: TrainState,
    batch: Batch,
    losses: list[Loss],
    weights: torch.Tensor,
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of all; their weighted terms [terms, S], detached. norms [terms, S]: as job.step has it."""
    with autocast(job.device, job.config.precision):
        logits = stack(batch.views)

    def of_one(loss: Loss) -> Any:
        return lambda z: job.multi_teacher(loss, ModelOutputs(z), batch, None)

    each = [torch.vmap(of_one(loss), in_dims=1, randomness="different")(logits) for loss in losses]
    terms = weights * torch.stack(each)
    if norms is not None:
        largest = int(terms.detach().abs().sum(1).argmax())
        others = sum(_measure_gradient(state, each[i], weights[i], norms[i]) for i in range(len(each)) if i != largest)
    for weight in state.weights:
        weight.grad = None
    terms.sum().backward()  # type: ignore[no-untyped-call]
    if norms is not None:
        whole = flatten_gradients([weight.grad for weight in state.weights], state.weights, keep=1)
        norms[largest] = (whole - others).norm(dim=1)
    if job.config.clip_norm:
        _clip_gradients(state.weights, job.config.clip_norm)
    state.optimizer.step()
    state.schedule.step()
    return terms.detach()


def _measure_gradient(
    state: TrainState, term: torch.Tensor, weight: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    """The gradient of one term [S] with its weights, [S, weights of a student]; its norms are noted."""
    found = flatten_gradients(
        torch.autograd.grad(term, state.weights, weight, retain_graph=True, allow_unused=True), state.weights, keep=1
    )
    norms.copy_(found.norm(dim=1))
    return found


def _clip_gradients(weights: list[nn.Parameter], most: float) -> None:
    """Clip each student's gradient to a norm of its own, as torch.nn.utils.clip_grad_norm_ does with one."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    share = (most / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(share.view(-1, *[1] * (g.ndim - 1)))


def _measured(
    jobs: Sequence[TrainingRun],
    means: torch.Tensor,
    norms: torch.Tensor,
    logits: NDArray[np.float32],
    held_out: HeldOutSplit,
    epoch: int,
) -> dict[str, Any]:
    """The line of an epoch, with one for each student. means: of its terms [terms, S], norms: of their gradients;
    logits [N, S, K] of validation. A student that has diverged has None."""
    finite = np.isfinite(logits).all((0, 2)) & np.isfinite(means.cpu().numpy()).all(0)
    lines: list[dict[str, Any] | None] = []
    for i, job in enumerate(jobs):
        if not finite[i]:
            lines.append(None)
            continue
        seen = summarize(logits[:, i], held_out.labels)
        lines.append(make_epoch_line(job, epoch, means[:, i].tolist(), norms[:, i].tolist(), seen))
    return {"epoch": epoch + 1, "students": lines}


def _finish(job: TrainingRun, stack: VectorizedModel, state: TrainState, i: int) -> FinishedTraining | TrainingStopped:
    """Publish the weights and lines of one student, or say how it diverged."""
    lines = []
    for epoch in state.epoch_lines:
        if epoch["students"][i] is None:
            return divergence_error(job, f"its loss or logits are no longer finite after epoch {epoch['epoch']}")
        lines.append(epoch["students"][i] | {"seconds": epoch["share"]})
    job.model.network.load_state_dict(stack.state_of(i))
    publish_text(job.folder / METRICS_FILE, format_epoch_lines(lines))
    write_event_file(job, lines)
    save_weights(job.folder / f"{job.name}.pt", job.model)
    return read_finished(job.folder, "last")
