"""The training loop of teachers, baselines and students, which differ in their stream and criterion alone.

Several students may train from one stream: each batch is read, decoded and rendered once, and each student takes its
step on it. Their weights equal, to the bit, those of a student that trains alone.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from softcache.base.errors import CacheError, DivergedError, Interrupted, TrainingStopped
from softcache.base.files import make_folder, remove_stale_files
from softcache.pipeline.batch import Batch
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli.console import Console
from softcache.stages.cli.typed_command import format_continue_command
from softcache.stages.distributed.ranks import broadcast_from_first, check_equal, current_ranks, is_first
from softcache.stages.runs.environment import wait_for_device

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
from .data_parallel import check_batches_shareable, convert_batch_norm, split_over_ranks
from .epoch_line import make_epoch_line
from .progress import show_progress
from .run import TrainingRun
from .step import ActiveTraining, attach_criterion, start_training, train_step
from .validation import HeldOutSplit

if TYPE_CHECKING:
    from .tensorboard import EventFileWriter

# Multiply-adds of a step below which a second CPU thread gains nothing. A step of mlp:64 on digits has 0.3 million:
# the training took 3.4 s with one thread or two, but 65 s with two threads while another program was busy, because
# each step waited for the second thread.
WORTH_THREADS = 10_000_000


def train(run: TrainingRun, held_out: HeldOutSplit, console: Console) -> FinishedTraining:
    """Train run.model in place.

    After every epoch the state is published as checkpoint.pt and a line is added to metrics.jsonl; a later call
    continues from there and ends with the same weights. At the end the weights are published as NAME.pt. Under
    torchrun all ranks train the model, see `data_parallel`; rank 0 reads and writes the folder.

    Args:
        run: the training.
        held_out: the validation split, evaluated after each epoch.
        console: for progress.

    Returns:
        The time, including that before an interruption, and the epoch whose weights were kept.

    Raises:
        TrainingStopped: where run.after_epoch stops it.
        DivergedError: where a loss or the logits are no longer finite.
        Interrupted: on Ctrl-C, with the command that continues.
    """
    try:
        (finished,) = train_several([run], held_out, console)
    except KeyboardInterrupt:
        command = "teacher" if run.name == "teacher" else "student"
        losses = getattr(run.config, "loss", ())
        continuation = format_continue_command(command, run.config.out, run.config.arch, losses, run.config.data)
        raise Interrupted(f"stopped; continue with  {continuation}") from None
    if isinstance(finished, TrainingStopped):
        raise finished
    return finished


def train_several(
    runs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """Train several models from the stream of the first one; see `train`.

    Each ends with the weights that it would have alone. One that diverges, or whose after_epoch raises
    TrainingStopped, does not stop the others.

    Args:
        runs: trainings of equal epochs and steps.
        held_out: the validation split.
        console: for progress.

    Returns:
        For each run its time and selected epoch, or the error that stopped it.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        trainings = [_start(run, stack) for run in runs]
        active = [training for training in trainings if training is not None]
        try:
            if active:
                _run_epochs(active, held_out, console, stack)
        finally:
            torch.set_num_threads(threads)
    return [
        _report_finished(run) if training is None else _finish(training)
        for run, training in zip(runs, trainings, strict=True)
    ]


def _start(run: TrainingRun, stack: ExitStack) -> ActiveTraining | None:
    """Start or continue a training. For a finished one, load its weights into the model and return None."""
    if broadcast_from_first(lambda: _prepare_folder(run)):
        load_weights(run.model.network, read_state_dict(run.weights_file), str(run.weights_file))
        return None
    check_batches_shareable(run.model, run.stream, run.device, run.config)
    convert_batch_norm(run.model, run.device)
    with run.rng_state:
        attach_criterion(run)
        stack.callback(run.criterion.detach)
        state = TrainState.create(run.model, run.criterion.parts, run.config, run.schedule)
        first_epoch = state.restore(run.folder, run.device)
    check_equal("checkpoint", f"epoch {first_epoch}")
    if current_ranks().world > 1:
        vars(run.stream).pop("_device_cache", None)  # its data on a GPU; the split stream makes its own
        run = replace(run, stream=split_over_ranks(run.stream))
    training = start_training(run, state)
    if run.multiply_adds * run.stream.batch_size < WORTH_THREADS:
        training.threads = 1
    return training


def _prepare_folder(run: TrainingRun) -> bool:
    """Make the folder, remove stale files of a killed process, and return whether the training is finished."""
    make_folder(run.folder)
    if (run.folder / VECTORIZED_FOLDER).is_dir():
        raise CacheError(f"'{run.folder}' was started with --vectorize: continue with it, or choose another --out")
    weights = [run.weights_file, *map(run.epoch_weights_file, range(run.epochs))]
    remove_stale_files(run.folder, (CHECKPOINT_FILE, METRICS_FILE, *(path.name for path in weights)))
    return run.weights_file.is_file()


def _run_epochs(
    trainings: Sequence[ActiveTraining], held_out: HeldOutSplit, console: Console, stack: ExitStack
) -> None:
    """Run the epochs that are left; evaluate each on the held-out split and save it."""
    run, first = trainings[0].run, min(training.first_epoch for training in trainings)
    title = f"the {run.name}" if len(trainings) == 1 else f"{len(trainings)} of {run.name} together"
    event_files = [_open_event_file(training.run, training.state.epoch_lines, stack) for training in trainings]
    runs = [training.run for training in trainings]
    with (
        show_progress(runs, first, lambda i: trainings[i].term_sums, title, console) as progress,
        _single_training_context(trainings),
        closing(run.stream.batches(first * run.steps, run.epochs * run.steps)) as batches,
    ):
        for epoch in range(first, run.epochs):
            started = time.perf_counter()
            active = [training for training in trainings if training.is_active(epoch)]
            for training in active:
                _begin_epoch(training, epoch)
            for step in range(run.steps):
                batch = next(batches).to(run.device)
                step_each(active, batch, measure_gradients=step == run.steps - 1)
                progress.step(len(batch.index))
            wait_for_device(run.device)  # else the steps that are left for a GPU would be in nobody's time
            step_seconds = sum(training.seconds for training in active)
            stream_seconds = (time.perf_counter() - started - step_seconds) / max(len(active), 1)
            for training, events in zip(trainings, event_files, strict=True):
                if training.is_active(epoch):
                    _end_epoch(training, epoch, held_out, stream_seconds, events)
            progress.epoch([t.state.epoch_lines[-1] if t.is_active(epoch) else None for t in trainings])
            if all(training.stopped for training in trainings):
                return


@contextmanager
def _single_training_context(trainings: Sequence[ActiveTraining]) -> Iterator[None]:
    """Set the threads and random generators of a single training for all of its epochs.

    With several trainings `step_each` sets them for each step.
    """
    if len(trainings) > 1:
        yield
        return
    torch.set_num_threads(trainings[0].threads)
    with trainings[0].run.rng_state:
        yield


def _begin_epoch(training: ActiveTraining, epoch: int) -> None:
    run = training.run
    run.criterion.set_progress(epoch, run.epochs)
    training.term_sums, training.gradient_norms = torch.zeros(2, len(run.criterion.losses), device=run.device)
    training.seconds = 0.0
    run.model.train()


def step_each(trainings: Sequence[ActiveTraining], batch: Batch, measure_gradients: bool = False) -> None:
    """Take a step of each training on one batch.

    Each of several trainings has its own number of threads, which changes the last bit of sums of floats, and its own
    random numbers.

    Args:
        trainings: the trainings.
        batch: on their device.
        measure_gradients: measure the gradient norm of each term as well.
    """
    for training in trainings:
        started = time.perf_counter()
        if len(trainings) == 1:
            training.term_sums += train_step(training, batch, measure_gradients)
        else:
            torch.set_num_threads(training.threads)
            with training.run.rng_state:
                training.term_sums += train_step(training, batch, measure_gradients)
        training.seconds += time.perf_counter() - started


def _end_epoch(
    training: ActiveTraining,
    epoch: int,
    held_out: HeldOutSplit,
    stream_seconds: float,
    events: "EventFileWriter | None",
) -> None:
    """Evaluate and save an epoch. stream_seconds: its share of the time that the stream took."""
    run = training.run
    torch.set_num_threads(training.threads)
    try:
        line = _measure_epoch(training, epoch, held_out, stream_seconds)
        with run.rng_state:
            training.state.save(run.folder, line, run.config.select)
        if events:
            events.add(line)
        if run.after_epoch:
            run.after_epoch(line)
    except TrainingStopped as stopped:
        training.stopped = stopped


def _measure_epoch(
    training: ActiveTraining, epoch: int, held_out: HeldOutSplit, stream_seconds: float
) -> dict[str, Any]:
    """Return the record of an epoch. Raises DivergedError where a term is not finite."""
    run = training.run
    means, norms = torch.stack([training.term_sums / run.steps, training.gradient_norms]).tolist()
    for name, mean in zip(run.criterion.names, means, strict=True):
        if not np.isfinite(mean):
            raise divergence_error(run, f"the term '{name}' is {mean} in epoch {epoch + 1}")
    return broadcast_from_first(partial(_validate_epoch, training, epoch, means, norms, held_out, stream_seconds))


def _validate_epoch(
    training: ActiveTraining,
    epoch: int,
    means: list[float],
    norms: list[float],
    held_out: HeldOutSplit,
    stream_seconds: float,
) -> dict[str, Any]:
    """Evaluate an epoch on the held-out split and, with --keep-every, publish its weights; on rank 0."""
    run, model, started = training.run, training.state.result_model, time.perf_counter()
    logits = held_out.logits(model)
    if not np.isfinite(logits).all():  # the terms were finite before the last step; the weights may not be after it
        raise divergence_error(run, f"its logits are no longer finite after epoch {epoch + 1}")
    if run.config.keep_every and (epoch + 1) % run.config.keep_every == 0:
        save_weights(run.epoch_weights_file(epoch), model)
    line = make_epoch_line(run, epoch, means, norms, held_out.summarize(logits))
    return line | {"seconds": round(training.seconds + stream_seconds + time.perf_counter() - started, 4)}


def _finish(training: ActiveTraining) -> FinishedTraining | TrainingStopped:
    """Load the selected weights into the model and publish them; return the error of a training that was stopped."""
    run, state = training.run, training.state
    if training.stopped:
        return training.stopped
    run.model.load_state_dict(state.best_weights or state.result_model.state_dict())

    def publish() -> dict[str, Any]:
        save_weights(run.weights_file, run.model)
        (run.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return asdict(read_finished(run.folder, run.config.select))

    return FinishedTraining(**broadcast_from_first(publish))


def _report_finished(run: TrainingRun) -> FinishedTraining:
    """Read the result of a training that an earlier process finished; write its event file with --tensorboard."""

    def read() -> dict[str, Any]:
        (run.folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # left when that process was stopped just before this
        write_event_file(run, read_epoch_lines(run.folder))
        return asdict(read_finished(run.folder, run.config.select))

    return FinishedTraining(**broadcast_from_first(read))


def _open_event_file(run: TrainingRun, lines: list[dict[str, Any]], stack: ExitStack) -> "EventFileWriter | None":
    """Open TensorBoard's file of a training, with its lines so far; None without --tensorboard and on other ranks."""
    if not run.config.tensorboard or not is_first():
        return None
    from .tensorboard import EventFileWriter

    events = EventFileWriter(run.folder, lines)
    stack.callback(events.close)
    return events


def write_event_file(run: TrainingRun, lines: list[dict[str, Any]]) -> None:
    """Write TensorBoard's file of a finished training, with --tensorboard.

    Args:
        run: the training.
        lines: the records of its epochs.
    """
    with ExitStack() as stack:
        _open_event_file(run, lines, stack)


def save_weights(path: Path, model: nn.Module) -> None:
    """Publish the weights of the network alone, as teacher-cache --weights reads them."""
    network = model.get_submodule("network").state_dict()
    save_tensors(path, {name: value.detach().cpu() for name, value in network.items()})


def divergence_error(run: TrainingRun, how: str) -> DivergedError:
    """Return the error of a training that diverged; how: the value that is not finite, as a clause."""
    return DivergedError(
        f"training the {run.name} diverged: {how}."
        f" Lower --learning-rate (now {run.config.learning_rate:g}), or set --clip-norm 1"
    )
