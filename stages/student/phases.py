"""The phases of a student's training: distillation, fine-tuning and the baseline, of one student or of several.

One phase is one TrainingRun. Its name is that of its weights: `student`, `distilled` where fine-tuning follows, and
`baseline`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from softcache.base.errors import TrainingStopped, UsageError
from softcache.base.files import remove_stale_files
from softcache.data.tasks import HardTargets, have_same_values
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.losses import HARD_LOSSES, Custom, Loss, copy_for_training
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.losses.hard import Hard
from softcache.pipeline.models import count_parameters
from softcache.pipeline.models.multiply_adds import count_multiply_adds
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
from .split_figures import compute_student_bank


@dataclass
class StudentTraining:
    """The training of one student with one seed.

    Attributes:
        config: the options of the student.
        setup: what it is trained from.
        folder: where its weights and metrics are written.
        after_epoch: called with the metrics of each epoch of the training from the cache; may raise TrainingStopped.
        results: {phase: figures} of the finished phases.
        stop_reason: why the training ended early, None while it has not.
    """

    config: StudentConfig
    setup: DistillationSetup
    folder: Path
    after_epoch: AfterEpoch | None = None
    results: dict[str, Any] = field(default_factory=dict)
    stop_reason: TrainingStopped | None = None


def first_phase(config: StudentConfig) -> str:
    """Return the name of the phase that trains from the cache: `student`, or `distilled` before fine-tuning."""
    return "distilled" if config.finetune_epochs else "student"


def train_phases(students: Sequence[StudentTraining], console: Console, vectorize: bool = False) -> None:
    """Run every phase of one student or several; the figures go into `results` of each.

    A student whose training ends early has its `stop_reason` set; the others continue.

    Args:
        students: one or several; several read each batch once, and have the same number of epochs.
        console: for progress.
        vectorize: train the students of one arch as one model.
    """
    config = students[0].config
    first = first_phase(config)
    _train_phase(first, students, console, vectorize)
    if first != "student":
        _train_phase("student", students, console, vectorize)
        for student in students:
            if student.stop_reason is None:
                student.results["student"]["seconds"] += student.results.pop(first)["seconds"]
    if config.baseline:
        _train_phase("baseline", students, console, vectorize)


def check_shared_stream(students: Sequence[StudentTraining], vectorize: bool) -> None:
    """Check, before anything is written, that several students can be trained on the same batches.

    Raises:
        UsageError: when their batches differ, or with `vectorize` when an arch cannot be trained as one model.
    """
    runs = _share_stream([_make_phase(first_phase(student.config), student) for student in students])
    if vectorize:
        for group in _group_by_arch(runs):
            check_vectorizable(group)


def _train_phase(phase: str, students: Sequence[StudentTraining], console: Console, vectorize: bool) -> None:
    """Train one phase of every student whose training has not ended early."""
    active = [student for student in students if student.stop_reason is None]
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
            student.stop_reason = outcome
        else:
            student.results[phase] = _compute_figures(run, student, outcome)


def _train_alone(run: TrainingRun, held_out: HeldOutSplit, console: Console) -> FinishedTraining | TrainingStopped:
    try:
        return train(run, held_out, console)
    except TrainingStopped as stopped:
        return stopped


def _train_vectorized(
    runs: Sequence[TrainingRun], held_out: HeldOutSplit, console: Console
) -> list[FinishedTraining | TrainingStopped]:
    """Train the students of one arch as one model, one arch after the other; outcomes in the order of the runs."""
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
    """Make the training of one phase: its losses, options and folder, and the weights that it starts from."""
    config, setup = student.config, student.setup
    hard = (_choose_hard_loss(setup),)
    losses = setup.losses if phase == first_phase(config) else hard
    network = setup.build_student(config, hard if phase == "baseline" else setup.losses)
    folder = student.folder if phase == "student" else student.folder / phase
    if phase == "baseline":
        config = replace(config, epochs=config.epochs + config.finetune_epochs)
    elif phase == "student" and config.finetune_epochs:
        weights_file = student.folder / "distilled/distilled.pt"
        wait_for_file(weights_file)
        load_weights(network, read_state_dict(weights_file), str(weights_file))
        rate = config.finetune_learning_rate or config.learning_rate / 10
        config = replace(config, epochs=config.finetune_epochs, learning_rate=rate)
    labels = hide_labels(config, setup.transfer_set.splits["train"].labels)
    run = make_training_run(phase, config, setup, network, losses, labels, folder)
    return replace(run, after_epoch=student.after_epoch if phase == first_phase(student.config) else None)


def _choose_hard_loss(setup: DistillationSetup) -> Loss:
    """Return the loss of hard targets alone: as among the student's losses, with weight 1; else that of the task."""
    default = HARD_LOSSES.get(setup.cache.task, Hard())
    own = next((loss for loss in setup.losses if loss.name == default.name and not isinstance(loss, Custom)), default)
    return replace(own, weight=1.0)  # type: ignore[type-var]


def _compute_figures(run: TrainingRun, student: StudentTraining, finished: FinishedTraining) -> dict[str, Any]:
    """Return what is reported of a phase: the network, the time, and the figures on the held-out splits."""
    setup = student.setup
    rows_per_step = len(run.stream.rows) / run.stream.steps_per_epoch
    figures: dict[str, Any] = {
        "arch": setup.student_arch(student.config, setup.losses if run.name != "baseline" else run.criterion.losses),
        **({"output": setup.output} if setup.output else {}),
        **({"init": setup.initial.to_json(run.model.network, setup.width)} if setup.initial else {}),
        "preparation": run.model.input_spec.to_json(),
        "parameters": count_parameters(run.model.network),
        "multiply_adds": run.multiply_adds,
        "seconds": finished.seconds,
        "epoch": finished.epoch,
        "images_per_second": run.epochs * run.steps * rows_per_step / finished.seconds,
    }
    return figures | broadcast_from_first(lambda: _evaluate_and_save(run, setup))


def _evaluate_and_save(run: TrainingRun, setup: DistillationSetup) -> dict[str, Any]:
    """Compute the student's logits on the held-out splits, save them beside the weights, return their figures."""
    logits = setup.compute_logits(run.model)
    remove_stale_files(run.folder, (LOGITS,))
    save_logits(run.folder / LOGITS, logits, setup.transfer_set)
    assert isinstance(run.config, StudentConfig)
    return setup.compute_metrics(logits, compute_student_bank(setup, run.model, logits, run.config))


def make_training_run(
    name: str,
    config: StudentConfig,
    setup: DistillationSetup,
    network: nn.Module,
    losses: tuple[Loss, ...],
    labels: HardTargets,
    folder: Path,
) -> TrainingRun:
    """Make one training of a student from its parts.

    A baseline takes as many steps as its student, on the labelled rows only. A loss of a user's own is copied, so that
    no two trainings share its state.

    Args:
        name: student, distilled or baseline.
        config: the options of the student.
        setup: what it is trained from.
        network: the student, with its initial weights.
        losses: the terms of the loss.
        labels: the hard targets of the training split by index, unknown where hidden.
        folder: where weights and metrics are written.
    """
    input_spec, losses = setup.scale_output(labels), tuple(map(copy_for_training, losses))
    only_labelled = all(loss.needs_labels for loss in losses)
    read_targets = any(loss.needs_logits or loss.teacher_taps() for loss in losses)
    combine = setup.teachers.combine
    combination = combine.name if combine is not None and combine.is_per_teacher else "per_teacher"
    return TrainingRun(
        name=name,
        model=PreparedModel(network, input_spec).to(setup.device),
        criterion=DistillationLoss(*losses, combination=combination, missing_to_labels=config.missing == "hard"),
        stream=setup.make_stream(config, labels, only_labelled, read_targets),
        epochs=config.epochs,
        steps=setup.make_stream(config, labels, only_labelled=False, read_targets=read_targets).steps_per_epoch,
        config=config,
        device=setup.device,
        folder=folder,
        multiply_adds=count_multiply_adds(network, input_spec.channels, input_spec.size, input_spec.shape),
        context=setup.source.make_context(labels, setup.head),
    )


def _share_stream(runs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """Return the runs with one stream, which reads the features that any of them needs.

    Raises:
        UsageError: when the runs do not have the same batches, epochs and steps.
    """
    if not runs:
        return []
    first = runs[0].stream
    for run in runs[1:]:
        if not _have_same_batches(first, run.stream) or (run.epochs, run.steps) != (runs[0].epochs, runs[0].steps):
            raise UsageError(
                f"'{runs[0].folder}' and '{run.folder}' do not see the same batches, as students of one stream must:"
                " their labels differ (--labelled depends on the seed), or one has only losses that need labels and"
                " the other has not. Train them one after the other"
            )
    taps = tuple(dict.fromkeys(tap for run in runs for tap in run.stream.taps))
    shared = replace(first, taps=taps, read_targets=any(run.stream.read_targets for run in runs))
    return [replace(run, stream=shared) for run in runs]


def _have_same_batches(stream: BatchStream, other: BatchStream) -> bool:
    """Whether two streams of the same caches and images differ at most in which targets they read of a row."""
    same_rows = have_same_values(stream.labels, other.labels) and np.array_equal(stream.rows, other.rows)
    # Arrays and caches are replaced by the same objects, because == of two arrays is an array.
    other_with_same_rows = replace(
        other,
        split=stream.split,
        labels=stream.labels,
        rows=stream.rows,
        cache=stream.cache,
        taps=stream.taps,
        read_targets=stream.read_targets,
        source=stream.source,
    )
    return same_rows and other_with_same_rows == stream
