"""Students of one arch, with different seeds or loss weights, trained as one vectorised model (torch.func).

The time of a step of a small student is mostly the overhead of calls, and 32 vectorised students take no more calls
than one. Batched products add in another order, so the weights equal those of a student that trains alone except for
rounding.
"""

import copy
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, stack_module_state

from softcache.base.errors import CacheError, TrainingStopped, UsageError
from softcache.base.files import make_folder, publish_text, remove_stale_files
from softcache.base.threads import take_first
from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.multi_teacher import Term
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
from .epoch_line import make_epoch_line
from .gradient_norms import flatten_gradients
from .loop import divergence_error, save_weights, train_several, write_event_file
from .progress import show_progress
from .run import TrainingRun
from .validation import HeldOutSplit

_MEMBERS = "members.txt"


class VectorizedModel(nn.Module):
    """S models of one arch as one model.

    Args:
        models: the models, of equal shapes.
    """

    def __init__(self, models: Sequence[PreparedModel]):
        super().__init__()
        weights, buffers = stack_module_state([model.network for model in models])
        self._names, self._buffer_names = list(weights), list(buffers)
        trained = {name: p.requires_grad for name, p in models[0].network.named_parameters()}
        self.stacked = nn.ParameterList(nn.Parameter(x.detach(), trained[name]) for name, x in weights.items())
        for i, value in enumerate(buffers.values()):
            self.register_buffer(f"buffer{i}", value)
        self._template = [copy.deepcopy(models[0])]  # in a list, so that its weights are no parameters of this module

    def train(self, mode: bool = True) -> "VectorizedModel":
        """Set the mode, also of the template network, which has the dropout and batch norm layers."""
        self._template[0].train(mode)
        super().train(mode)
        return self

    def state_of(self, i: int) -> dict[str, torch.Tensor]:
        """Return the state dict of the network of model i."""
        weights = zip(self._names, self.stacked, strict=True)
        return {name: x[i].detach().clone() for name, x in (*weights, *self._buffers_by_name().items())}

    def _buffers_by_name(self) -> dict[str, torch.Tensor]:
        return {name: self.get_buffer(f"buffer{i}") for i, name in enumerate(self._buffer_names)}

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Compute the logits of all models, float32 [B, S, K], for views uint8 [B, C, H, W]."""
        template = self._template[0]
        x = template.prepare_input(views)
        weights = dict(zip(self._names, self.stacked, strict=True))

        def run_network(weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
            logits: torch.Tensor = functional_call(template.network, (weights, buffers), (x,))
            return logits

        logits = torch.vmap(run_network, randomness="different")(weights, self._buffers_by_name())
        return logits.float().movedim(0, 1)


def check_vectorizable(runs: Sequence[TrainingRun]) -> None:
    """Raise UsageError for trainings that cannot be one vectorised model.

    These are: losses that read features, need the head or have a part; options that need each student's weights after
    an epoch, or --compile; losses that differ in more than their weights; networks whose state dict is not their
    parameters and buffers; and networks that torch.vmap refuses.
    """
    first = runs[0]
    for run in runs:
        config, losses = run.config, run.criterion.losses
        if any(_reads_features(loss) for loss in losses):
            raise UsageError(
                "--vectorize takes losses that read logits and labels alone and have no part of their own, not"
                f" {', '.join(run.criterion.names)}: leave it out"
            )
        if config.select != "last" or config.ema or config.keep_every or config.compile:
            raise UsageError("--vectorize takes no --select, --ema, --keep-every or --compile: leave it out")
        if [_without_weight(loss) for loss in losses] != [_without_weight(loss) for loss in first.criterion.losses]:
            raise UsageError(
                f"--vectorize takes losses that differ in their weights alone, not in '{first.folder}' and"
                f" '{run.folder}': leave it out"
            )
    network = first.model.network
    stored = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    if stored != set(network.state_dict()):
        raise UsageError(
            "--vectorize cannot take a network with tied weights or buffers that are not kept: leave it out"
        )
    try:
        views = take_first(first.stream.batches(0, 1)).slice(0, 2).to(first.device).views
        with torch.no_grad():
            VectorizedModel([run.model for run in runs[:2]]).to(first.device).eval()(views)
    except Exception as error:  # of torch.vmap, or of a user's own code under it
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UsageError(f"--vectorize cannot take this network ({reason}): leave it out") from error


def _reads_features(loss: Loss) -> bool:
    has_part = type(loss).build_part is not Loss.build_part
    return bool(loss.student_taps() or loss.teacher_taps() or loss.needs_head or has_part)


def _without_weight(loss: Loss) -> Loss:
    return replace(loss, weight=0.0)  # type: ignore[type-var]


def train_vectorized(
    runs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """Train the unfinished students as one vectorised model.

    Its checkpoint is in a subfolder of the first student's folder. It is used only for the same students; for others
    the training starts over. A single unfinished student trains alone.

    Args:
        runs: trainings of equal epochs and steps, see `check_vectorizable`.
        held_out: the validation split.
        console: for progress.

    Returns:
        For each run its time and selected epoch, or the error that stopped it.

    Raises:
        CacheError: for a folder whose training was started without --vectorize.
    """
    unfinished = _find_unfinished(runs)
    for run in runs:
        make_folder(run.folder)
        if (run.folder / CHECKPOINT_FILE).is_file():
            raise CacheError(
                f"'{run.folder}' was started without --vectorize: continue without it, or choose another --out"
            )
        is_unusable = len(unfinished) < 2 or run is not unfinished[0] or _read_members(run) != _names(unfinished)
        if (run.folder / VECTORIZED_FOLDER).is_dir() and is_unusable:
            console.print(f"'{run.folder / VECTORIZED_FOLDER}' is of other students together: these start over")
            shutil.rmtree(run.folder / VECTORIZED_FOLDER)
    results: dict[str, FinishedTraining | TrainingStopped] = {}
    if len(unfinished) > 1:
        results = dict(zip(_names(unfinished), _train_as_one(unfinished, held_out, console), strict=True))
    if others := [run for run in runs if str(run.folder) not in results]:  # finished, or a single unfinished one
        results |= dict(zip(_names(others), train_several(others, held_out, console), strict=True))
    return [results[name] for name in _names(runs)]


def _find_unfinished(runs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """Find the students of the vectorised model.

    Where a checkpoint names its students, these are all of them, including those whose weights were published before
    a stop.
    """
    for run in runs:
        members = [member for member in runs if str(member.folder) in _read_members(run)]
        if members and _names(members) == _read_members(run):
            return members
    return [run for run in runs if not run.weights_file.is_file()]


def _names(runs: Sequence[TrainingRun]) -> list[str]:
    return [str(run.folder) for run in runs]


def _read_members(run: TrainingRun) -> list[str]:
    """Read the folders of the students whose vectorised checkpoint is in a student's folder."""
    path = run.folder / VECTORIZED_FOLDER / _MEMBERS
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _train_as_one(
    runs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """Train students as one model, from its checkpoint where there is one, and publish each."""
    first, folder = runs[0], runs[0].folder / VECTORIZED_FOLDER
    for run in runs:
        remove_stale_files(run.folder, (METRICS_FILE, run.weights_file.name))
    make_folder(folder)
    publish_text(folder / _MEMBERS, "".join(f"{name}\n" for name in _names(runs)))
    model = VectorizedModel([run.model for run in runs]).to(first.device)
    with first.rng_state:
        state = TrainState.create(model, nn.ModuleDict(), first.config, first.schedule)
        first_epoch = state.restore(folder, first.device)
        _run_epochs(runs, model, state, first_epoch, held_out, console)
    results = [_finish(run, model, state, i) for i, run in enumerate(runs)]
    shutil.rmtree(folder)
    return results


def _run_epochs(
    runs: Sequence[TrainingRun],
    model: VectorizedModel,
    state: TrainState,
    first_epoch: int,
    held_out: HeldOutSplit,
    console: Console,
) -> None:
    """Run the epochs that are left; evaluate and save each."""
    run, students = runs[0], len(runs)
    sums = torch.zeros(len(run.criterion.losses), students, device=run.device)  # the weighted terms of each student
    title = f"{students} of {run.name} as one"
    with (
        show_progress(runs, first_epoch, lambda i: sums[:, i], title, console) as progress,
        closing(run.stream.batches(first_epoch * run.steps, run.epochs * run.steps)) as batches,
    ):
        for epoch in range(first_epoch, run.epochs):
            started = time.perf_counter()
            weights = _begin_epoch(runs, epoch)
            sums, norms = torch.zeros_like(weights), torch.zeros_like(weights)
            model.train()
            for step in range(run.steps):
                batch = next(batches).to(run.device)
                sums += _step(run, model, state, batch, weights, norms if step == run.steps - 1 else None)
                progress.step(len(batch.index))
            line = _measure_epoch(
                runs,
                means=sums / run.steps,
                norms=norms,
                logits=held_out.logits(model),
                held_out=held_out,
                epoch=epoch,
            )
            share = round((time.perf_counter() - started) / students, 6)
            state.save(run.folder / VECTORIZED_FOLDER, line | {"share": share}, "last")
            progress.epoch(line["students"])


def _begin_epoch(runs: Sequence[TrainingRun], epoch: int) -> torch.Tensor:
    """Set every ramp to its value in an epoch; return the weights of each term in each student, float32 [terms, S]."""
    for run in runs:
        run.criterion.set_progress(epoch, run.epochs)
    return torch.tensor([run.criterion.weights for run in runs], device=runs[0].device).T.contiguous()


def _step(
    run: TrainingRun,
    model: VectorizedModel,
    state: TrainState,
    batch: Batch,
    weights: torch.Tensor,
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take one step of all students.

    Args:
        run: the first training; the losses of the others differ in their weights alone.
        model: the vectorised model.
        state: its optimiser and schedule.
        batch: on the device.
        weights: of each term in each student, float32 [terms, S].
        norms: overwritten with the L2 norm of each weighted term's gradient, float32 [terms, S]; None to skip it.

    Returns:
        The weighted terms [terms, S], detached.
    """
    with autocast(run.device, run.config.precision):
        logits = model(batch.views)

    def compute_term(term: Term) -> Any:
        return lambda z: term(ModelOutputs(z), batch, None)

    unweighted = [
        torch.vmap(compute_term(term), in_dims=1, randomness="different")(logits) for term in run.criterion.functions
    ]
    terms = weights * torch.stack(unweighted)
    if norms is not None:
        largest = int(terms.detach().abs().sum(1).argmax())
        others = sum(
            _measure_gradient(state, unweighted[i], weights[i], norms[i])
            for i in range(len(unweighted))
            if i != largest
        )
    for weight in state.weights:
        weight.grad = None
    terms.sum().backward()  # type: ignore[no-untyped-call]
    if norms is not None:
        gradient = flatten_gradients([weight.grad for weight in state.weights], state.weights, keep=1)
        norms[largest] = (gradient - others).norm(dim=1)
    if run.config.clip_norm:
        _clip_gradients(state.weights, run.config.clip_norm)
    state.update_weights()
    return terms.detach()


def _measure_gradient(
    state: TrainState, term: torch.Tensor, weight: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of one term [S] with its weights, [S, weights of a student]; write its norms."""
    gradient = flatten_gradients(
        torch.autograd.grad(term, state.weights, weight, retain_graph=True, allow_unused=True), state.weights, keep=1
    )
    norms.copy_(gradient.norm(dim=1))
    return gradient


def _clip_gradients(weights: list[nn.Parameter], max_norm: float) -> None:
    """Clip the gradient norm of each student, as torch.nn.utils.clip_grad_norm_ does for one model."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def _measure_epoch(
    runs: Sequence[TrainingRun],
    means: torch.Tensor,
    norms: torch.Tensor,
    logits: NDArray[np.float32],
    held_out: HeldOutSplit,
    epoch: int,
) -> dict[str, Any]:
    """Return the record of an epoch, with one for each student, None for a student that has diverged.

    Args:
        runs: the students.
        means: of the weighted terms, [terms, S].
        norms: of the terms' gradients, [terms, S].
        logits: on the validation split, [N, S, K].
        held_out: the validation split.
        epoch: counted from 0.
    """
    finite = np.isfinite(logits).all((0, 2)) & np.isfinite(means.cpu().numpy()).all(0)
    lines: list[dict[str, Any] | None] = []
    for i, run in enumerate(runs):
        if not finite[i]:
            lines.append(None)
            continue
        validation = held_out.summarize(logits[:, i])
        lines.append(make_epoch_line(run, epoch, means[:, i].tolist(), norms[:, i].tolist(), validation))
    return {"epoch": epoch + 1, "students": lines}


def _finish(run: TrainingRun, model: VectorizedModel, state: TrainState, i: int) -> FinishedTraining | TrainingStopped:
    """Publish the weights and records of student i, or return the error of its divergence."""
    lines = []
    for epoch in state.epoch_lines:
        if epoch["students"][i] is None:
            return divergence_error(run, f"its loss or logits are no longer finite after epoch {epoch['epoch']}")
        lines.append(epoch["students"][i] | {"seconds": epoch["share"]})
    run.model.network.load_state_dict(model.state_of(i))
    publish_text(run.folder / METRICS_FILE, format_epoch_lines(lines))
    write_event_file(run, lines)
    save_weights(run.weights_file, run.model)
    return read_finished(run.folder, "last")
