"""The phases of a student's training: distilled, fine-tuned, and as a baseline; of one student, or of several."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from softcache.base.errors import TrainingStopped, UsageError
from softcache.base.files import remove_stale_files
from softcache.data.transfer_set import Labels
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.distillation_loss import DistillationLoss
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
from softcache.stages.training.run import AfterEpoch, TrainingRun
from softcache.stages.training.validation import HeldOutSplit
from softcache.stages.training.vectorized import check_vectorizable, train_vectorized

from .requirements import hide_labels
from .setup import DistillationSetup


@dataclass
class StudentTraining:
    """One seed of one student.

    Attributes:
        config: its options.
        setup: what it is trained from.
        folder: where it is kept.
        after_epoch: called with each line of its training from the cache; may raise TrainingStopped.
        results: {phase: figures} of the phases that are over.
        stopped: why it ended early.
    """

    config: StudentConfig
    setup: DistillationSetup
    folder: Path
    after_epoch: AfterEpoch | None = None
    results: dict[str, Any] = field(default_factory=dict)
    stopped: TrainingStopped | None = None


def first_phase(config: StudentConfig) -> str:
    """Return the name of the training from the cache: `student`, or `distilled` where fine-tuning follows."""
    return "distilled" if config.finetune_epochs else "student"


def train_phases(students: Sequence[StudentTraining], console: Console, vectorize: bool = False) -> None:
    """Train students, and their baselines where asked for; the figures go into `results` of each.

    Args:
        students: one or several; several have as many epochs and read each batch once.
        console: for progress.
        vectorize: train those of one arch as one model.
    """
    config = students[0].config
    first = first_phase(config)
    _train_phase(first, students, console, vectorize)
    if first != "student":
        _train_phase("student", students, console, vectorize)
        for student in students:
            if student.stopped is None:
                student.results["student"]["seconds"] += student.results.pop(first)["seconds"]
    if config.baseline:
        _train_phase("baseline", students, console, vectorize)


def check_together(students: Sequence[StudentTraining], vectorize: bool) -> None:
    """Raise UsageError for students that cannot be trained together, before anything is written."""
    runs = _share_stream([_make_phase(first_phase(student.config), student) for student in students])
    if vectorize:
        for group in _group_by_arch(runs):
            check_vectorizable(group)


def _train_phase(phase: str, students: Sequence[StudentTraining], console: Console, vectorize: bool) -> None:
    """Train a phase of the students that have not ended."""
    active = [student for student in students if student.stopped is None]
    runs = [_make_phase(phase, student) for student in active]
    held_out = students[0].setup.held_out["val"]
    if len(students) == 1:
        outcomes = [_train_alone(run, held_out, console) for run in runs]
    elif vectorize:
        outcomes = _train_vectorized(runs, held_out, console)
    else:
        outcomes = train_several(_share_stream(runs), held_out, console)
    for student, run, outcome in zip(active, runs, outcomes, strict=True):
        if isinstance(outcome, TrainingStopped):
            student.stopped = outcome
        else:
            student.results[phase] = _figures(run, student, outcome)


def _train_alone(run: TrainingRun, held_out: HeldOutSplit, console: Console) -> FinishedTraining | TrainingStopped:
    try:
        return train(run, held_out, console)
    except TrainingStopped as stopped:
        return stopped


def _train_vectorized(
    runs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """Train those of one arch as one model, arch after arch."""
    outcomes: dict[Path, FinishedTraining | TrainingStopped] = {}
    for group in _group_by_arch(_share_stream(runs)):
        folders = [run.folder for run in group]
        outcomes |= dict(zip(folders, train_vectorized(group, held_out, console), strict=True))
    return [outcomes[run.folder] for run in runs]


def _group_by_arch(runs: Sequence[TrainingRun]) -> list[list[TrainingRun]]:
    groups: dict[str, list[TrainingRun]] = {}
    for run in runs:
        assert isinstance(run.config, StudentConfig)
        groups.setdefault(run.config.arch, []).append(run)
    return list(groups.values())


def _make_phase(phase: str, student: StudentTraining) -> TrainingRun:
    """Put together one phase of a student: its losses, options, folder and the weights that it starts from."""
    config, setup = student.config, student.setup
    smoothing = next((loss.smoothing for loss in setup.losses if isinstance(loss, Hard)), 0.0)
    hard: tuple[Loss, ...] = (Hard(smoothing=smoothing),)
    losses = setup.losses if phase == first_phase(config) else hard
    network = setup.build_student(config, hard if phase == "baseline" else setup.losses)
    folder = student.folder if phase == "student" else student.folder / phase
    if phase == "baseline":
        config = replace(config, epochs=config.epochs + config.finetune_epochs)
    elif phase == "student" and config.finetune_epochs:
        start = student.folder / "distilled/distilled.pt"
        wait_for_file(start)
        load_weights(network, read_state_dict(start), str(start))
        rate = config.finetune_learning_rate or config.learning_rate / 10
        config = replace(config, epochs=config.finetune_epochs, learning_rate=rate)
    labels = hide_labels(config, setup.transfer_set.splits["train"].labels)
    run = make_training_run(phase, config, setup, network, losses, labels, folder)
    return replace(run, after_epoch=student.after_epoch if phase == first_phase(student.config) else None)


def _figures(run: TrainingRun, student: StudentTraining, finished: FinishedTraining) -> dict[str, Any]:
    """Return what is reported of a phase: the network, the time, and every figure of the held-out splits."""
    setup, rows = student.setup, len(run.stream.rows) / run.stream.steps_per_epoch
    figures: dict[str, Any] = {
        "arch": setup.student_arch(student.config, setup.losses if run.name != "baseline" else run.criterion.losses),
        "preparation": setup.input_spec.to_json(),
        "parameters": count_parameters(run.model.network),
        "multiply_adds": run.multiply_adds,
        "seconds": finished.seconds,
        "epoch": finished.epoch,
        "images_per_second": run.epochs * run.steps * rows / finished.seconds,
    }
    return figures | broadcast_from_first(lambda: _measure(run, setup))


def _measure(run: TrainingRun, setup: DistillationSetup) -> dict[str, Any]:
    """Measure the held-out splits; the logits are saved beside the weights."""
    logits = setup.compute_logits(run.model)
    remove_stale_files(run.folder, (LOGITS,))
    save_logits(run.folder / LOGITS, logits, setup.transfer_set)
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
    """Put together one training of a student.

    A baseline takes as many steps as its student, on the labelled rows alone.

    Args:
        name: student, distilled or baseline.
        config: its options.
        setup: what it is trained from.
        network: the student.
        losses: the terms.
        labels: int64 [N] of the training split, -1 where hidden.
        folder: where it is kept.
    """
    input_spec = setup.input_spec
    only_labelled = all(loss.needs_labels for loss in losses)
    read_targets = any(loss.needs_logits or loss.teacher_taps() for loss in losses)
    combine = setup.teachers.combine
    combination = "" if combine is None or not combine.is_per_teacher else combine.name
    return TrainingRun(
        name=name,
        model=PreparedModel(network, input_spec).to(setup.device),
        criterion=DistillationLoss(losses, combination, missing_to_labels=config.missing == "hard"),
        stream=setup.make_stream(config, labels, only_labelled, read_targets),
        epochs=config.epochs,
        steps=setup.make_stream(config, labels, False, read_targets).steps_per_epoch,
        config=config,
        device=setup.device,
        folder=folder,
        multiply_adds=count_multiply_adds(network, input_spec.channels, input_spec.size),
        context=setup.make_context(labels),
    )


def _share_stream(runs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """Return the runs with one stream that reads what each needs. Raises UsageError where their batches differ."""
    if not runs:
        return []
    first = runs[0].stream
    for run in runs[1:]:
        if not _same_batches(first, run.stream) or (run.epochs, run.steps) != (runs[0].epochs, runs[0].steps):
            raise UsageError(
                f"'{runs[0].folder}' and '{run.folder}' do not see the same batches, as students of one stream do:"
                " other labels (--labelled goes by the seed), or a loss that wants labels beside one that does not."
                " Train them one after the other"
            )
    taps = tuple(dict.fromkeys(tap for run in runs for tap in run.stream.taps))
    shared = replace(first, taps=taps, read_targets=any(run.stream.read_targets for run in runs))
    return [replace(run, stream=shared) for run in runs]


def _same_batches(stream: CacheLoader, other: CacheLoader) -> bool:
    """Return whether two streams of the same caches and images differ at most in what is read of a row."""
    alike = replace(
        other,
        split=stream.split,
        labels=stream.labels,
        rows=stream.rows,
        cache=stream.cache,
        taps=stream.taps,
        read_targets=stream.read_targets,
    )
    same_rows = np.array_equal(stream.labels, other.labels) and np.array_equal(stream.rows, other.rows)
    return same_rows and alike == stream
