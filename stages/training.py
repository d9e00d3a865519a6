"""The one training loop: a teacher, a baseline and a student differ in their stream and losses alone."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.errors import Interrupted, Refused, WrongCommand
from pipeline.files import make_folder, remove_leftovers
from pipeline.losses import Loss, at
from pipeline.losses.loss import fixed, student_taps, teacher_taps
from pipeline.losses.several import Term, by_one
from pipeline.metrics import summary
from pipeline.models import head_of
from pipeline.models.prepared import Prepared
from pipeline.models.weights import load_state, read_state
from pipeline.records import Head, Known, Outputs, TargetBatch
from pipeline.statistic import derived
from pipeline.stream import Stream
from pipeline.taps import tapped

from .checkpoint import CHECKPOINT, LINES, Finished, State, finished, publish_tensors
from .command_line import this_program
from .console import Console, LongWork, bar
from .data_parallel import Abreast, parted, prepare
from .held_out import HeldOut, autocast
from .ranks import agree, from_first, who
from .runs import milestones_of
from .settings import StudentSettings, TeacherSettings

# Multiply-adds of a step under which a second CPU thread gains nothing. mlp:64 on digits has 0.3 million and took
# 3.4 s with one thread or two; with two, beside another busy program, each step waited for it: 65 s.
_WORTH_THREADS = 10_000_000
Features = dict[str, torch.Tensor]
AfterEpoch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What is trained. name: teacher, baseline or student; epochs of steps steps each; folder: where it is kept;
    known: of the teacher, for losses that ask; after_epoch: told each epoch's line once it is kept, may raise;
    term: how a loss is led by the teacher; abreast: this rank's side of it, where there are several ranks."""

    name: str
    model: Prepared
    losses: tuple[Loss, ...]
    stream: Stream
    epochs: int
    steps: int
    settings: TeacherSettings | StudentSettings
    device: torch.device
    folder: Path
    multiply_adds: int
    advice: str = ""
    known: Known = Known()  # noqa: RUF009 (frozen)
    after_epoch: AfterEpoch | None = None
    term: Term = by_one
    abreast: Abreast | None = None

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its highest: warm-up, then the schedule."""
        total = self.epochs * self.steps
        warm = int(self.settings.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = (step - warm) / max(total - warm, 1)
        if self.settings.schedule == "cosine":
            return 0.5 * (1 + float(np.cos(np.pi * progress)))
        if self.settings.schedule == "step":
            return float(0.1 ** sum(progress >= share for share in milestones_of(self.settings)))
        return 1.0


def fit(job: Job, held_out: HeldOut, console: Console) -> Finished:
    """Train job.model in place; the seconds include those before an interruption.

    After every epoch the state is published as checkpoint.pt and a line added to metrics.jsonl; a later call
    goes on from there and ends with the same weights. At the end the weights are published as NAME.pt.
    Under torchrun all ranks train it, see data_parallel; rank 0 reads and writes the folder.
    Raises Refused when a loss or the logits are no longer finite, Interrupted on Ctrl-C.
    """
    weights = job.folder / f"{job.name}.pt"
    if from_first(lambda: _tidied(job, weights)):
        load_state(job.model.network, read_state(weights), str(weights))
        return _over(job)
    prepare(job.model, job.stream, job.device)
    taps = student_taps(job.losses)
    state = State.begin(job.model, loss_modules(job, taps), job.settings, job.rate)
    first = state.restore(job.folder, job.device)
    agree("checkpoint", f"epoch {first}")
    job = replace(job, stream=parted(job.stream))
    threads = torch.get_num_threads()
    if job.multiply_adds * job.stream.batch_size < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        _epochs(job, state, first, taps, held_out, console)
    except KeyboardInterrupt:
        stage = "teacher" if job.name == "teacher" else "student"
        go_on = f"{this_program()} {stage} --resume --out {job.settings.out}"
        raise Interrupted(f"stopped; go on with  {go_on}") from None
    finally:
        torch.set_num_threads(threads)
    job.model.load_state_dict(state.best or state.result.state_dict())
    from_first(lambda: _publish_weights(weights, job.model))
    return _over(job)


def _tidied(job: Job, weights: Path) -> bool:
    """Whether the training was over before. Its folder is made, and what a killed process left there removed."""
    make_folder(job.folder)
    remove_leftovers(
        job.folder, (CHECKPOINT, LINES, weights.name, *(_kept(job, epoch) for epoch in range(job.epochs)))
    )
    return weights.is_file()


def _over(job: Job) -> Finished:
    """What the lines say; the checkpoint goes, also one that is left of a stop between the two."""

    def record() -> dict[str, Any]:
        (job.folder / CHECKPOINT).unlink(missing_ok=True)
        return asdict(finished(job.folder, job.settings.select))

    return Finished(**from_first(record))


def _epochs(job: Job, state: State, first: int, taps: tuple[str, ...], held_out: HeldOut, console: Console) -> None:
    """The epochs from first on, each measured on the held-out split and kept."""
    total = job.epochs * job.steps
    long_work = LongWork(console, f"Training the {job.name}", total, job.advice)
    with bar(total, job.name, "step") as shown, tapped(job.model.network, taps) as kept:
        shown.update(first * job.steps)

        def done(steps: int) -> None:
            shown.update()
            long_work.at(steps)

        job = replace(job, abreast=_abreast(job, state, kept))
        batches = job.stream.batches(first * job.steps, total)
        for epoch in range(first, job.epochs):
            begun = time.monotonic()
            terms = _epoch(job, state, epoch, batches, kept, done)
            line = from_first(partial(_line, job, state, epoch, terms, held_out, begun))
            shown.set_postfix(
                {name: f"{line[name]:.4g}" for name in line if name not in ("epoch", "seconds")}, refresh=False
            )
            state.keep(job.folder, line, job.settings.select)
            if job.after_epoch:
                job.after_epoch(line)


def _line(
    job: Job, state: State, epoch: int, terms: dict[str, float], held_out: HeldOut, begun: float
) -> dict[str, Any]:
    """What an epoch came to, measured on the held-out split; its weights are published where that is asked for."""
    logits = held_out.logits(state.result)
    if not np.isfinite(logits).all():  # the last step can be the one too many
        raise _diverged(job, f"its logits are no longer finite after epoch {epoch + 1}")
    seen = summary(logits, held_out.labels)
    if job.settings.keep_every and (epoch + 1) % job.settings.keep_every == 0:
        _publish_weights(job.folder / _kept(job, epoch), state.result)
    figures = {"epoch": epoch + 1, **terms, **{f"val_{name}": value for name, value in seen.items()}}
    return figures | {"seconds": round(time.monotonic() - begun, 4)}


def _abreast(job: Job, state: State, kept: Features) -> Abreast | None:
    """This rank's side of the training, where there are several."""
    if who().world == 1:
        return None
    own_head = partial(_own_head, job)
    return Abreast(job.model, kept, state.modules, own_head, job.device, job.settings.precision, job.settings.seed)


def _kept(job: Job, epoch: int) -> str:
    """The file of the weights after an epoch, counted from 0."""
    return f"{job.name}-{epoch + 1:04d}.pt"


def _publish_weights(path: Path, model: nn.Module) -> None:
    """The weights of the network alone, as teacher-cache --weights reads them."""
    network = model.get_submodule("network").state_dict()
    publish_tensors(path, {name: value.detach().cpu() for name, value in network.items()})


def _epoch(
    job: Job, state: State, epoch: int, batches: Iterator[TargetBatch], kept: Features, done: Callable[[int], None]
) -> dict[str, float]:
    """One epoch of steps; the mean of each weighted term and of their sum."""
    losses = [at(loss, epoch, job.epochs) for loss in job.losses]
    sums = torch.zeros(len(losses), device=job.device)
    job.model.train()
    for number in range(epoch * job.steps, (epoch + 1) * job.steps):
        sums += step(job, state, next(batches).to(job.device), losses, kept)
        done(number + 1)
    means = dict(zip(names(losses), (sums / job.steps).tolist(), strict=True))  # the one synchronisation of an epoch
    for name, mean in means.items():
        if not np.isfinite(mean):
            raise _diverged(job, f"the term '{name}' is {mean} in epoch {epoch + 1}")
    return {"loss": sum(means.values()), **{f"loss_{name}": mean for name, mean in means.items()}}


def _diverged(job: Job, how: str) -> Refused:
    return Refused(
        f"training the {job.name} diverged: {how}."
        f" Lower --learning-rate (now {job.settings.learning_rate:g}), or set --clip-norm 1"
    )


def step(job: Job, state: State, batch: TargetBatch, losses: list[Loss], kept: Features) -> torch.Tensor:
    """One step of the optimiser; the weighted terms, detached."""
    if job.abreast:
        outputs, batch = job.abreast.outputs(batch, state.schedule.last_epoch)
    else:
        with autocast(job.device, job.settings.precision):
            logits = job.model(batch.views)
        features = {tap: x.float() for tap, x in kept.items()}
        outputs = Outputs(logits, features, _own_head(job, logits.shape[1]))
    batch = _with_taps(job, batch)
    terms = torch.stack(
        [
            fixed(loss.weight) * job.term(loss, outputs, batch, state.modules.get(name))
            for name, loss in zip(names(losses), losses, strict=True)
        ]
    )
    state.optimizer.zero_grad(set_to_none=True)
    if job.abreast:
        job.abreast.backward(terms.sum())
    else:
        terms.sum().backward()  # type: ignore[no-untyped-call]
    if job.settings.clip_norm:
        nn.utils.clip_grad_norm_(state.weights, job.settings.clip_norm)
    state.optimizer.step()
    state.schedule.step()
    if state.average is not None:
        state.average.update_parameters(job.model)
    return terms.detach()


def _own_head(job: Job, classes: int) -> Head | None:
    """The student's own last layer, live, where a loss asks for it."""
    if not any(loss.needs_head for loss in job.losses):
        return None
    layer = head_of(job.model.network, classes)
    if layer is None:
        return None
    return Head(layer.weight, layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias)


def _with_taps(job: Job, batch: TargetBatch) -> TargetBatch:
    """The batch with the teacher's features that the losses ask for, float32, made from what is cached."""
    asked = teacher_taps(job.losses)
    return replace(batch, features=derived(batch.features, asked)) if asked else batch


def names(losses: Sequence[Loss]) -> list[str]:
    """A name for each term: `kd`, and `hint-0`, `hint-1` where there are several of a kind."""
    kinds = [loss.name for loss in losses]
    return [kind if kinds.count(kind) == 1 else f"{kind}-{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def loss_modules(job: Job, taps: tuple[str, ...]) -> dict[str, nn.Module]:
    """The losses' own trainable parts, made from the shapes of one batch."""
    batch = next(job.stream.batches(0, 1)).rows(0, 2).to(job.device)
    job.model.eval()
    with torch.no_grad(), tapped(job.model.network, taps) as kept:
        logits = job.model(batch.views)
        outputs = Outputs(logits, dict(kept), _own_head(job, logits.shape[1]))
    if batch.logits is not None and batch.logits.shape[-1] != outputs.logits.shape[1]:
        raise WrongCommand(f"the student has {outputs.logits.shape[1]} classes, the cache {batch.logits.shape[-1]}")
    batch = _with_taps(job, batch)
    named = zip(names(job.losses), job.losses, strict=True)
    made = {name: loss.module(outputs, batch, job.known) for name, loss in named}
    return {name: module.to(job.device) for name, module in made.items() if module is not None}
