"""The trainings of a student: distilled, fine-tuned, and as a baseline; of one, or of several from one stream."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from softcache.base.errors import TrainingStopped, UsageError
from softcache.base.files import remove_stale_files
from softcache.data.transfer_set import Labels
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.hard import Hard
from softcache.pipeline.models import count_multiply_adds, count_parameters
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.distributed.ranks import broadcast_from_first, wait_for_file
from softcache.stages.runs.logits import LOGITS, save_logits
from softcache.stages.training.checkpoint import FinishedTraining
from softcache.stages.training.loop import train, train_several
from softcache.stages.training.step import AfterEpoch, TrainingRun
from softcache.stages.training.validation import HeldOutSplit
from softcache.stages.training.vectorized import check_vectorizable, train_vectorized

from .requirements import hide_labels
from .setup import DistillationSetup

Result = dict[str, Any]


@dataclass(frozen=True)
class StudentTraining:
    """One seed of one student: its settings, what it is trained from, where it is kept. after_epoch: told each line of
    its training from the cache; may raise TrainingStopped."""

    config: StudentConfig
    setup: DistillationSetup
    folder: Path
    after_epoch: AfterEpoch | None = None


def first_phase(config: StudentConfig) -> str:
    """The name of the training from the cache."""
    return "distilled" if config.finetune_epochs else "student"


def train_phases(
    students: Sequence[StudentTraining], console: Console, vectorize: bool = False
) -> list[Result | TrainingStopped]:
    """Of each student the figures of its `student`, and of its `baseline` when asked for.

    Several have as many epochs and read each batch once; where one ends early, that is in its place. vectorize: those
    of one arch as one model.
    """
    config = students[0].config
    first = first_phase(config)
    results = _train_phase(first, students, [{} for _ in students], console, vectorize)
    if first != "student":
        results = _train_phase("student", students, results, console, vectorize)
        for result in results:
            if not isinstance(result, TrainingStopped):
                result["student"]["seconds"] += result.pop(first)["seconds"]
    if config.baseline:
        results = _train_phase("baseline", students, results, console, vectorize)
    return results


def check(students: Sequence[StudentTraining], vectorize: bool) -> None:
    """Raise UsageError for several that cannot be trained together, before anything is written."""
    jobs = _share_stream([_make_phase(first_phase(one.config), one) for one in students])
    for places in _by_arch(students) if vectorize else []:
        check_vectorizable([jobs[i] for i in places])


def _train_phase(
    name: str,
    students: Sequence[StudentTraining],
    results: Sequence[Result | TrainingStopped],
    console: Console,
    vectorize: bool,
) -> list[Result | TrainingStopped]:
    """The results with the figures of one more training, of those students that have not ended."""
    left = [
        student for student, result in zip(students, results, strict=True) if not isinstance(result, TrainingStopped)
    ]
    jobs = [_make_phase(name, student) for student in left]
    val = students[0].setup.held_out["val"]
    done: dict[int, FinishedTraining | TrainingStopped] = {}
    if len(students) == 1 and left:
        done[0] = _alone(jobs[0], val, console)
    else:
        shared = _share_stream(jobs)
        for places in _by_arch(left) if vectorize else [range(len(left))]:
            fitted = (train_vectorized if vectorize else train_several)([shared[i] for i in places], val, console)
            done |= dict(zip(places, fitted, strict=True))
    ended = iter(zip(jobs, left, [done[i] for i in range(len(left))], strict=True))
    return [result if isinstance(result, TrainingStopped) else _with(result, name, *next(ended)) for result in results]


def _with(
    result: Result, name: str, job: TrainingRun, student: StudentTraining, done: FinishedTraining | TrainingStopped
) -> Result | TrainingStopped:
    return done if isinstance(done, TrainingStopped) else result | {name: _figures(job, student, done)}


def _alone(job: TrainingRun, val: HeldOutSplit, console: Console) -> FinishedTraining | TrainingStopped:
    try:
        return train(job, val, console)
    except TrainingStopped as ended:
        return ended


def _by_arch(students: Sequence[StudentTraining]) -> list[list[int]]:
    """The places of the students of each arch."""
    archs = [student.config.arch for student in students]
    return [[i for i, arch in enumerate(archs) if arch == one] for one in dict.fromkeys(archs)]


def _make_phase(name: str, student: StudentTraining) -> TrainingRun:
    """One training of a student: losses, settings, where it is kept and from which weights it starts."""
    config, setup = student.config, student.setup
    smoothing = next((loss.smoothing for loss in setup.losses if isinstance(loss, Hard)), 0.0)
    hard: tuple[Loss, ...] = (Hard(smoothing=smoothing),)
    losses = setup.losses if name == first_phase(config) else hard
    network = setup.build_student(config, hard if name == "baseline" else setup.losses)
    folder = student.folder if name == "student" else student.folder / name
    if name == "baseline":
        config = replace(config, epochs=config.epochs + config.finetune_epochs)
    elif name == "student" and config.finetune_epochs:
        start = student.folder / "distilled/distilled.pt"
        wait_for_file(start)
        load_weights(network, read_state_dict(start), str(start))
        config = _finetuning(config)
    labels = hide_labels(config, setup.transfer_set.splits["train"].labels)
    job = make_training_run(name, config, setup, network, losses, labels, folder)
    return replace(job, after_epoch=student.after_epoch if name == first_phase(student.config) else None)


def _finetuning(config: StudentConfig) -> StudentConfig:
    """The settings of the training from hard targets alone that follows distillation."""
    rate = config.finetune_learning_rate or config.learning_rate / 10
    return replace(config, epochs=config.finetune_epochs, learning_rate=rate)


def _figures(job: TrainingRun, student: StudentTraining, done: FinishedTraining) -> dict[str, Any]:
    setup, rows = student.setup, len(job.stream.rows) / job.stream.steps_per_epoch
    figures: dict[str, Any] = {
        "arch": setup.student_arch(student.config, setup.losses if job.name != "baseline" else job.losses),
        "preparation": setup.input_spec.to_json(),
        "parameters": count_parameters(job.model.network),
        "multiply_adds": job.multiply_adds,
        "seconds": done.seconds,
        "epoch": done.epoch,
        "images_per_second": job.epochs * job.steps * rows / done.seconds,
    }
    return figures | broadcast_from_first(lambda: _measure(job, setup))


def _measure(job: TrainingRun, setup: DistillationSetup) -> dict[str, Any]:
    """The figures of the held-out splits; what they are made of is kept beside the weights."""
    logits = setup.compute_logits(job.model)
    remove_stale_files(job.folder, (LOGITS,))
    save_logits(job.folder / LOGITS, logits, setup.transfer_set)
    return setup.compute_metrics(logits)


def make_training_run(
    name: str,
    config: StudentConfig,
    setup: DistillationSetup,
    network: nn.Module,
    losses: tuple[Loss, ...],
    labels: Labels,
    folder: Path,
) -> TrainingRun:
    """What is to be trained. A baseline takes as many steps as its student, on the labelled rows alone."""
    input_spec = setup.input_spec
    model = PreparedModel(network, input_spec).to(setup.device)
    cost = count_multiply_adds(network, input_spec.channels, input_spec.size)
    only_labelled = all(loss.needs_labels for loss in losses)
    targets = any(loss.needs_logits or loss.teacher_taps() for loss in losses)
    stream = setup.make_stream(config, labels, only_labelled, targets)
    steps = setup.make_stream(config, labels, False, targets).steps_per_epoch
    return TrainingRun(
        name,
        model,
        losses,
        stream,
        config.epochs,
        steps,
        config,
        setup.device,
        folder,
        cost,
        context=setup.make_context(labels),
        multi_teacher=setup.multi_teacher(config),
    )


def _share_stream(jobs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """The jobs with one stream that has what each reads. Raises UsageError where their batches differ."""
    if not jobs:
        return []
    first = jobs[0].stream
    for job in jobs[1:]:
        if not _same_batches(first, job.stream) or (job.epochs, job.steps) != (jobs[0].epochs, jobs[0].steps):
            raise UsageError(
                f"'{jobs[0].folder}' and '{job.folder}' do not see the same batches, as students of one stream do:"
                " other labels (--labelled goes by the seed), or a loss that wants labels beside one that does not."
                " Train them one after the other"
            )
    taps = tuple(dict.fromkeys(tap for job in jobs for tap in job.stream.taps))
    shared = replace(first, taps=taps, read_targets=any(job.stream.read_targets for job in jobs))
    return [replace(job, stream=shared) for job in jobs]


def _same_batches(one: CacheLoader, other: CacheLoader) -> bool:
    """Whether two streams of the same caches and images differ in what is read of a row alone."""
    alike = replace(
        other,
        split=one.split,
        labels=one.labels,
        rows=one.rows,
        cache=one.cache,
        taps=one.taps,
        read_targets=one.read_targets,
    )
    rows = np.array_equal(one.labels, other.labels) and np.array_equal(one.rows, other.rows)
    return rows and alike == one
