"""The one training loop: a teacher, a baseline and a student differ in their stream and losses alone.

Several students may train from one stream: each batch is read, decoded and rendered once, and each student takes its
step on it, as it would alone, to the bit.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from softcache.base.errors import CacheError, DivergedError, Interrupted, TrainingStopped
from softcache.base.files import make_folder, remove_stale_files
from softcache.pipeline.batch import Batch
from softcache.pipeline.losses import Loss, at_epoch
from softcache.pipeline.losses.base import list_student_taps
from softcache.pipeline.metrics.classification import summarize
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.pipeline.taps.hooks import capture_features
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import program_name
from softcache.stages.distributed.ranks import broadcast_from_first, check_equal, current_ranks, is_first

from .checkpoint import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    VECTORIZED_FOLDER,
    FinishedTraining,
    TrainState,
    read_epoch_lines,
    read_finished,
    save_tensors,
)
from .data_parallel import DataParallelStep, check_batches_shareable, convert_batch_norm, split_over_ranks
from .epoch_line import make_epoch_line
from .progress import show_progress
from .step import Features, TrainingRun, build_loss_modules, student_head, term_names, train_step
from .validation import HeldOutSplit

if TYPE_CHECKING:
    from .tensorboard import EventFileWriter

# Multiply-adds of a step under which a second CPU thread gains nothing. mlp:64 on digits has 0.3 million and took
# 3.4 s with one thread or two; with two, beside another busy program, each step waited for it: 65 s.
WORTH_THREADS = 10_000_000


@dataclass
class _Training:
    """A training under way. first: the epoch that it begins with; kept: outputs of the tapped layers; threads: of the
    CPU; events: TensorBoard's, where asked for; losses, sums, norms, seconds: of this epoch, its terms, their sums
    over the steps, the norms of their gradients at the last one, and what its own steps took."""

    job: TrainingRun
    state: TrainState
    first_epoch: int
    features: Features
    threads: int
    events: "EventFileWriter | None"
    losses: list[Loss] = field(default_factory=list)
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    norms: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    seconds: float = 0.0
    stopped: TrainingStopped | None = None


def train(job: TrainingRun, held_out: HeldOutSplit, console: Console) -> FinishedTraining:
    """Train job.model in place; the seconds include those before an interruption.

    After every epoch the state is published as checkpoint.pt and a line added to metrics.jsonl; a later call
    goes on from there and ends with the same weights. At the end the weights are published as NAME.pt.
    Under torchrun all ranks train it, see data_parallel; rank 0 reads and writes the folder.
    Raises TrainingStopped, DivergedError when a loss or the logits are no longer finite, and Interrupted on Ctrl-C.
    """
    try:
        (done,) = train_several([job], held_out, console)
    except KeyboardInterrupt:
        stage = "teacher" if job.name == "teacher" else "student"
        go_on = f"{program_name()} {stage} --resume --out {job.config.out}"
        raise Interrupted(f"stopped; go on with  {go_on}") from None
    if isinstance(done, TrainingStopped):
        raise done
    return done


def train_several(
    jobs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """As fit, of several trainings with as many epochs and steps, from the stream of the first one.

    Each ends with the weights that it would have alone; one that diverges, or whose after_epoch raises
    TrainingStopped, does not stop the others. Raises KeyboardInterrupt on Ctrl-C.
    """
    threads = torch.get_num_threads()
    with ExitStack() as opened:
        courses = [_start(job, opened) for job in jobs]
        try:
            if under_way := [course for course in courses if course]:
                _run_epochs(under_way, held_out, console)
        finally:
            torch.set_num_threads(threads)
    return [_finish(job, course) for job, course in zip(jobs, courses, strict=True)]


def _start(job: TrainingRun, opened: ExitStack) -> _Training | None:
    """The training from where it is; None where it is over, with its weights in the model."""
    weights = job.folder / f"{job.name}.pt"
    if broadcast_from_first(lambda: _prepare_folder(job, weights)):
        load_weights(job.model.network, read_state_dict(weights), str(weights))
        return None
    check_batches_shareable(job.model, job.stream, job.device, job.config)
    convert_batch_norm(job.model, job.device)
    taps = list_student_taps(job.losses)
    with job.rng_state:
        state = TrainState.create(job.model, build_loss_modules(job, taps), job.config, job.learning_rate_factor)
        first = state.restore(job.folder, job.device)
    check_equal("checkpoint", f"epoch {first}")
    if current_ranks().world > 1:
        vars(job.stream).pop("_device_cache", None)  # what lies on a GPU for it: the parted stream has its own
    small = job.multiply_adds * job.stream.batch_size < WORTH_THREADS
    threads = 1 if small else torch.get_num_threads()
    kept = opened.enter_context(capture_features(job.model.network, taps))
    job = replace(job, stream=split_over_ranks(job.stream), data_parallel=_data_parallel_step(job, state, kept))
    return _Training(job, state, first, kept, threads, _events(job, state.epoch_lines, opened))


def _events(job: TrainingRun, lines: list[dict[str, Any]], opened: ExitStack) -> "EventFileWriter | None":
    """TensorBoard's file of a training, with its lines so far, where that is asked for: by the first rank."""
    if not job.config.tensorboard or not is_first():
        return None
    from .tensorboard import EventFileWriter

    events = EventFileWriter(job.folder, lines)
    opened.callback(events.close)
    return events


def write_event_file(job: TrainingRun, lines: list[dict[str, Any]]) -> None:
    """TensorBoard's file of a training that is over, where that is asked for."""
    with ExitStack() as opened:
        _events(job, lines, opened)


def _prepare_folder(job: TrainingRun, weights: Path) -> bool:
    """Whether the training was over before. Its folder is made, and what a killed process left there removed."""
    make_folder(job.folder)
    if (job.folder / VECTORIZED_FOLDER).is_dir():
        raise CacheError(f"'{job.folder}' was begun with --vectorize: go on with it, or choose another --out")
    remove_stale_files(
        job.folder,
        (
            CHECKPOINT_FILE,
            METRICS_FILE,
            weights.name,
            *(_epoch_weights_file(job, epoch) for epoch in range(job.epochs)),
        ),
    )
    return weights.is_file()


def _data_parallel_step(job: TrainingRun, state: TrainState, kept: Features) -> DataParallelStep | None:
    """This rank's side of the training, where there are several."""
    if current_ranks().world == 1:
        return None
    head = partial(student_head, job)
    return DataParallelStep(job.model, kept, state.modules, head, job.device, job.config.precision, job.config.seed)


def _finish(job: TrainingRun, course: _Training | None) -> FinishedTraining | TrainingStopped:
    """Publish the weights that are kept; what the lines say. A checkpoint that is left of a stop before goes too."""
    if course and course.stopped:
        return course.stopped
    if course:
        job.model.load_state_dict(course.state.best_weights or course.state.result_model.state_dict())

    def over() -> dict[str, Any]:
        if course:
            save_weights(job.folder / f"{job.name}.pt", job.model)
        (job.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        done = read_finished(job.folder, job.config.select)
        if not course:  # trained before: events may be asked for only now
            write_event_file(job, read_epoch_lines(job.folder))
        return asdict(done)

    return FinishedTraining(**broadcast_from_first(over))


def _run_epochs(courses: Sequence[_Training], held_out: HeldOutSplit, console: Console) -> None:
    """The epochs from the first that is left, each measured on the held-out split and kept."""
    job, first = courses[0].job, min(course.first_epoch for course in courses)
    total = job.epochs * job.steps
    what = f"the {job.name}" if len(courses) == 1 else f"{len(courses)} of {job.name} together"
    with show_progress([course.job for course in courses], first, lambda i: courses[i].sums, what, console) as shown:
        batches = job.stream.batches(first * job.steps, total)
        for epoch in range(first, job.epochs):
            begun = time.perf_counter()
            under_way = [course for course in courses if course.first_epoch <= epoch and not course.stopped]
            for course in under_way:
                _begin_epoch(course, epoch)
            for number in range(1, job.steps + 1):
                batch = next(batches).to(job.device)
                _step_of_each(under_way, batch, last=number == job.steps)
                shown.step(len(batch.index))
            own = sum(course.seconds for course in under_way)
            shared = (time.perf_counter() - begun - own) / max(len(under_way), 1)
            for course in under_way:
                _use_threads(course)
                try:
                    _end_epoch(course, epoch, held_out, shared)
                except TrainingStopped as ended:
                    course.stopped = ended
            shown.epoch(
                [c.state.epoch_lines[-1] if c.first_epoch <= epoch and not c.stopped else None for c in courses]
            )
            if all(course.stopped for course in courses):
                return


def _begin_epoch(course: _Training, epoch: int) -> None:
    job = course.job
    course.losses = [at_epoch(loss, epoch, job.epochs) for loss in job.losses]
    course.sums, course.norms = torch.zeros(2, len(job.losses), device=job.device)
    course.seconds = 0.0
    job.model.train()


def _step_of_each(courses: Sequence[_Training], batch: Batch, last: bool = False) -> None:
    """Of each the step that it would take alone: with its own threads and what is random in it. last: of an epoch, at
    which the gradients of the terms are measured."""
    for course in courses:
        _use_threads(course)
        begun = time.perf_counter()
        with course.job.rng_state:
            norms = course.norms if last else None
            course.sums += train_step(course.job, course.state, batch, course.losses, course.features, norms)
        course.seconds += time.perf_counter() - begun


def _use_threads(course: _Training) -> None:
    """As many as it has alone: sums depend on it in the last bit."""
    if course.threads != torch.get_num_threads():
        torch.set_num_threads(course.threads)


def _end_epoch(course: _Training, epoch: int, held_out: HeldOutSplit, shared: float) -> None:
    """Measure and keep an epoch. shared: seconds of it that were the stream's."""
    job = course.job
    means, norms = torch.stack([course.sums / job.steps, course.norms]).tolist()  # the one synchronisation
    for name, mean in zip(term_names(job.losses), means, strict=True):
        if not np.isfinite(mean):
            raise divergence_error(job, f"the term '{name}' is {mean} in epoch {epoch + 1}")
    line = broadcast_from_first(partial(_measure_epoch, course, epoch, means, norms, held_out, shared))
    with job.rng_state:
        course.state.save(job.folder, line, job.config.select)
    if course.events:
        course.events.add(line)
    if job.after_epoch:
        job.after_epoch(line)


def _measure_epoch(
    course: _Training, epoch: int, means: list[float], norms: list[float], held_out: HeldOutSplit, shared: float
) -> dict[str, Any]:
    """What an epoch came to, measured on the held-out split; its weights are published where that is asked for."""
    job, result, begun = course.job, course.state.result_model, time.perf_counter()
    logits = held_out.logits(result)
    if not np.isfinite(logits).all():  # the last step can be the one too many
        raise divergence_error(job, f"its logits are no longer finite after epoch {epoch + 1}")
    if job.config.keep_every and (epoch + 1) % job.config.keep_every == 0:
        save_weights(job.folder / _epoch_weights_file(job, epoch), result)
    line = make_epoch_line(job, epoch, means, norms, summarize(logits, held_out.labels))
    return line | {"seconds": round(course.seconds + shared + time.perf_counter() - begun, 4)}


def _epoch_weights_file(job: TrainingRun, epoch: int) -> str:
    """The file of the weights after an epoch, counted from 0."""
    return f"{job.name}-{epoch + 1:04d}.pt"


def save_weights(path: Path, model: nn.Module) -> None:
    """The weights of the network alone, as teacher-cache --weights reads them."""
    network = model.get_submodule("network").state_dict()
    save_tensors(path, {name: value.detach().cpu() for name, value in network.items()})


def divergence_error(job: TrainingRun, how: str) -> DivergedError:
    return DivergedError(
        f"training the {job.name} diverged: {how}."
        f" Lower --learning-rate (now {job.config.learning_rate:g}), or set --clip-norm 1"
    )
