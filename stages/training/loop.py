"""The one training loop: a teacher, a baseline and a student differ in their stream and criterion alone.

Several students may train from one stream: each batch is read, decoded and rendered once, and each student takes its
step on it, as it would alone, to the bit.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from .data_parallel import check_batches_shareable, convert_batch_norm, split_over_ranks
from .epoch_line import make_epoch_line
from .progress import show_progress
from .run import TrainingRun
from .step import ActiveTraining, build_loss_parts, start_training, train_step
from .validation import HeldOutSplit

if TYPE_CHECKING:
    from .tensorboard import EventFileWriter

# Multiply-adds of a step under which a second CPU thread gains nothing. mlp:64 on digits has 0.3 million and took
# 3.4 s with one thread or two; with two, beside another busy program, each step waited for it: 65 s.
WORTH_THREADS = 10_000_000


def train(run: TrainingRun, held_out: HeldOutSplit, console: Console) -> FinishedTraining:
    """Train run.model in place.

    After every epoch the state is published as checkpoint.pt and a line added to metrics.jsonl; a later call goes on
    from there and ends with the same weights. At the end the weights are published as NAME.pt. Under torchrun all
    ranks train it, see data_parallel; rank 0 reads and writes the folder.

    Args:
        run: what is trained.
        held_out: the validation split, measured after each epoch.
        console: for progress.

    Returns:
        How long it took, seconds before an interruption included, and the epoch whose weights were kept.

    Raises:
        TrainingStopped: where run.after_epoch ends it; DivergedError where a loss or the logits are no longer finite.
        Interrupted: on Ctrl-C, with the command that goes on.
    """
    try:
        (finished,) = train_several([run], held_out, console)
    except KeyboardInterrupt:
        command = "teacher" if run.name == "teacher" else "student"
        go_on = f"{program_name()} {command} --resume --out {run.config.out}"
        raise Interrupted(f"stopped; go on with  {go_on}") from None
    if isinstance(finished, TrainingStopped):
        raise finished
    return finished


def train_several(
    runs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """Train several with as many epochs and steps, from the stream of the first one; see `train`.

    Each ends with the weights that it would have alone. One that diverges, or whose after_epoch raises
    TrainingStopped, does not stop the others.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    threads = torch.get_num_threads()
    with ExitStack() as opened:
        trainings = [_start(run, opened) for run in runs]
        active = [training for training in trainings if training is not None]
        try:
            if active:
                _run_epochs(active, held_out, console, opened)
        finally:
            torch.set_num_threads(threads)
    return [
        _report_finished(run) if training is None else _finish(training)
        for run, training in zip(runs, trainings, strict=True)
    ]


def _start(run: TrainingRun, opened: ExitStack) -> ActiveTraining | None:
    """Begin a training, or go on with it; None where it is over, with its weights in the model."""
    if broadcast_from_first(lambda: _prepare_folder(run)):
        load_weights(run.model.network, read_state_dict(run.weights_file), str(run.weights_file))
        return None
    check_batches_shareable(run.model, run.stream, run.device, run.config)
    convert_batch_norm(run.model, run.device)
    with run.rng_state:
        head = build_loss_parts(run)
        state = TrainState.create(run.model, run.criterion.parts, run.config, run.schedule)
        first_epoch = state.restore(run.folder, run.device)
    check_equal("checkpoint", f"epoch {first_epoch}")
    if current_ranks().world > 1:
        vars(run.stream).pop("_device_cache", None)  # what lies on a GPU for it: the split stream has its own
        run = replace(run, stream=split_over_ranks(run.stream))
    features = opened.enter_context(capture_features(run.model.network, run.criterion.student_taps))
    training = start_training(run, state, features, head)
    if run.multiply_adds * run.stream.batch_size < WORTH_THREADS:
        training.threads = 1
    return training


def _prepare_folder(run: TrainingRun) -> bool:
    """Make the folder, remove what a killed process left there; return whether the training was over before."""
    make_folder(run.folder)
    if (run.folder / VECTORIZED_FOLDER).is_dir():
        raise CacheError(f"'{run.folder}' was begun with --vectorize: go on with it, or choose another --out")
    weights = [run.weights_file, *map(run.epoch_weights_file, range(run.epochs))]
    remove_stale_files(run.folder, (CHECKPOINT_FILE, METRICS_FILE, *(path.name for path in weights)))
    return run.weights_file.is_file()


def _run_epochs(
    trainings: Sequence[ActiveTraining], held_out: HeldOutSplit, console: Console, opened: ExitStack
) -> None:
    """Run the epochs from the first that is left; measure each on the held-out split and save it."""
    run, first = trainings[0].run, min(training.first_epoch for training in trainings)
    what = f"the {run.name}" if len(trainings) == 1 else f"{len(trainings)} of {run.name} together"
    event_files = [_open_event_file(one.run, one.state.epoch_lines, opened) for one in trainings]
    runs = [training.run for training in trainings]
    with (
        show_progress(runs, first, lambda i: trainings[i].term_sums, what, console) as shown,
        _alone(trainings),
    ):
        batches = run.stream.batches(first * run.steps, run.epochs * run.steps)
        for epoch in range(first, run.epochs):
            started = time.perf_counter()
            active = [training for training in trainings if training.is_active(epoch)]
            for training in active:
                _begin_epoch(training, epoch)
            for step in range(run.steps):
                batch = next(batches).to(run.device)
                step_each(active, batch, measure_gradients=step == run.steps - 1)
                shown.step(len(batch.index))
            own = sum(training.seconds for training in active)
            shared = (time.perf_counter() - started - own) / max(len(active), 1)
            for training, events in zip(trainings, event_files, strict=True):
                if training.is_active(epoch):
                    _end_epoch(training, epoch, held_out, shared, events)
            shown.epoch([one.state.epoch_lines[-1] if one.is_active(epoch) else None for one in trainings])
            if all(training.stopped for training in trainings):
                return


@contextmanager
def _alone(trainings: Sequence[ActiveTraining]) -> Iterator[None]:
    """Give one training the threads and the generators for all of its epochs; several take them step by step."""
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
    """Take a step of each training on one batch; each with its own threads and random numbers where there are several.

    Sums of floats depend on the number of threads in the last bit.
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
    training: ActiveTraining, epoch: int, held_out: HeldOutSplit, shared: float, events: "EventFileWriter | None"
) -> None:
    """Measure and save an epoch. shared: seconds of it that were the stream's."""
    run = training.run
    torch.set_num_threads(training.threads)
    try:
        line = _measure_epoch(training, epoch, held_out, shared)
        with run.rng_state:
            training.state.save(run.folder, line, run.config.select)
        if events:
            events.add(line)
        if run.after_epoch:
            run.after_epoch(line)
    except TrainingStopped as stopped:
        training.stopped = stopped


def _measure_epoch(training: ActiveTraining, epoch: int, held_out: HeldOutSplit, shared: float) -> dict[str, Any]:
    """Return the line of an epoch. Raises DivergedError where a term is not finite."""
    run = training.run
    # The one synchronisation of an epoch with a GPU.
    means, norms = torch.stack([training.term_sums / run.steps, training.gradient_norms]).tolist()
    for name, mean in zip(run.criterion.names, means, strict=True):
        if not np.isfinite(mean):
            raise divergence_error(run, f"the term '{name}' is {mean} in epoch {epoch + 1}")
    return broadcast_from_first(partial(_validate_epoch, training, epoch, means, norms, held_out, shared))


def _validate_epoch(
    training: ActiveTraining,
    epoch: int,
    means: list[float],
    norms: list[float],
    held_out: HeldOutSplit,
    shared: float,
) -> dict[str, Any]:
    """Measure an epoch on the held-out split; publish its weights with --keep-every. By the first rank."""
    run, model, started = training.run, training.state.result_model, time.perf_counter()
    logits = held_out.logits(model)
    if not np.isfinite(logits).all():  # the last step can be the one too many
        raise divergence_error(run, f"its logits are no longer finite after epoch {epoch + 1}")
    if run.config.keep_every and (epoch + 1) % run.config.keep_every == 0:
        save_weights(run.epoch_weights_file(epoch), model)
    line = make_epoch_line(run, epoch, means, norms, summarize(logits, held_out.labels))
    return line | {"seconds": round(training.seconds + shared + time.perf_counter() - started, 4)}


def _finish(training: ActiveTraining) -> FinishedTraining | TrainingStopped:
    """Publish the weights that are kept."""
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
    """Read what a training that was over before came to; its event file may be asked for only now."""

    def read() -> dict[str, Any]:
        (run.folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # it may have been stopped just before that
        write_event_file(run, read_epoch_lines(run.folder))
        return asdict(read_finished(run.folder, run.config.select))

    return FinishedTraining(**broadcast_from_first(read))


def _open_event_file(run: TrainingRun, lines: list[dict[str, Any]], opened: ExitStack) -> "EventFileWriter | None":
    """Open TensorBoard's file of a training, with its lines so far, where that is asked for; by the first rank."""
    if not run.config.tensorboard or not is_first():
        return None
    from .tensorboard import EventFileWriter

    events = EventFileWriter(run.folder, lines)
    opened.callback(events.close)
    return events


def write_event_file(run: TrainingRun, lines: list[dict[str, Any]]) -> None:
    """Write TensorBoard's file of a training that is over, where that is asked for."""
    with ExitStack() as opened:
        _open_event_file(run, lines, opened)


def save_weights(path: Path, model: nn.Module) -> None:
    """Publish the weights of the network alone, as teacher-cache --weights reads them."""
    network = model.get_submodule("network").state_dict()
    save_tensors(path, {name: value.detach().cpu() for name, value in network.items()})


def divergence_error(run: TrainingRun, how: str) -> DivergedError:
    """Return the error of a training that diverged; how: the figure that shows it."""
    return DivergedError(
        f"training the {run.name} diverged: {how}."
        f" Lower --learning-rate (now {run.config.learning_rate:g}), or set --clip-norm 1"
    )
