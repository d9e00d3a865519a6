"""The trials that one process trains: each is the run of a student, whose epochs are reported to the study."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from softcache.base.errors import TrainingStopped, UsageError
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.student.phases import StudentTraining, first_phase
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.student.several_students import train_students
from softcache.stages.student.student_run import resume_if_started
from softcache.stages.training.checkpoint import METRICS_FILE, read_epoch_lines

from .space import apply_values
from .study import SharedStudy, Trial, TrialState, UpdateFinishedTrialError, optuna, report_epochs
from .summary import format_row, make_rows

# Trials that agree in these options see the same batches.
_STREAM_OPTIONS = ("epochs", "finetune_epochs", "batch_size", "sampler", "draws", "labelled")


@dataclass(frozen=True)
class Search:
    """The part that this process takes in a search.

    Attributes:
        shared_study: the trials, which several processes share.
        base_config: the options of a student, except for those that are searched.
        setup: what a student with these options is trained from.
        prune: stop trials that are below the median of the others.
        trials_at_once: how many trials are trained on one stream of batches.
        figure: the figure of the validation split by which trials are compared.
        console: for progress.
    """

    shared_study: SharedStudy
    base_config: StudentConfig
    setup: DistillationSetup
    prune: bool
    trials_at_once: int
    figure: str
    console: Console

    def run(self) -> None:
        """Train trials until all are finished, those of other processes included.

        Raises:
            CacheError: when the storage fails, or its study is of another search.
            Interrupted: on Ctrl-C.
        """
        is_waiting = False
        while True:
            with self.shared_study.take_trials(self.trials_at_once) as trials:
                if trials:
                    self._train(trials)
                    continue
            unfinished = [
                slot
                for slot, trial in self.shared_study.read_trials().items()
                if slot < self.shared_study.slots and not trial.state.is_finished()
            ]
            if not unfinished:
                return
            if not is_waiting:
                numbers = ", ".join(map(str, unfinished))
                self.console.print(f"waiting for other processes, which train: {numbers} (Ctrl-C loses nothing)")
            is_waiting = True
            time.sleep(0.5)

    def _train(self, trials: Sequence[Trial]) -> None:
        """Train trials, those that see the same batches on one stream, and record the outcome of each."""
        runs = [TrialRun.create(trial, self) for trial in trials]
        for run in runs:
            run.open(self.setup)
        for group in _group_by_stream([run for run in runs if run.student is not None]):
            for run in group:
                run.report()  # epochs of a process that was killed before it reported them
            active = [run for run in group if run.stop_reason is None]
            outcomes = self._train_students([run.student for run in active if run.student is not None])
            for run, outcome in zip(active, outcomes, strict=True):
                run.finish(outcome)
        for run in runs:
            self._record_outcome(run)

    def _train_students(self, students: Sequence[StudentTraining]) -> list[dict[str, Any] | TrainingStopped]:
        """Train students on one stream of batches, and return the result.json of each or why its training ended.

        If their batches differ, or memory is too small for all of them, they are trained one after the other, so that
        the error is that of one trial.
        """
        if not students:
            return []
        try:
            return train_students(students, False, self.console)
        except (UsageError, torch.OutOfMemoryError) as error:
            if len(students) == 1:
                return [TrainingStopped(str(error))]
        resumed = [replace(student, config=resume_if_started(student.config)) for student in students]
        return [outcome for student in resumed for outcome in self._train_students([student])]

    def _record_outcome(self, run: "TrialRun") -> None:
        """Write the outcome of a trial to the study and print a line about it."""
        state, value, attributes = run.get_outcome()
        try:
            if isinstance(run.stop_reason, UpdateFinishedTrialError):
                raise run.stop_reason
            for name, attribute in attributes.items():
                run.trial.set_user_attr(name, attribute)
            self.shared_study.study.tell(run.trial, value, state)
        except UpdateFinishedTrialError:
            return self.console.print(f"trial {run.slot}: another process has taken it over")
        rows = make_rows(self.shared_study.read_trials(), self.shared_study.space)
        row = next(row for row in rows if row["trial"] == run.slot)
        self.console.print(format_row(row, rows, self.shared_study.slots, self.figure))


@dataclass
class TrialRun:
    """A trial and the run of its student.

    Attributes:
        trial: the trial in the study.
        slot: its number in the search.
        config: the options of its student.
        figure: the figure of the validation split that is reported.
        prune: stop it when it is below the median of the others.
        student: its training, None until `open` and when it cannot be trained.
        stop_reason: why it ended early.
        result: its result.json.
    """

    trial: Trial
    slot: int
    config: StudentConfig
    figure: str
    prune: bool
    student: StudentTraining | None = None
    stop_reason: Exception | None = None
    result: dict[str, Any] | None = None

    @staticmethod
    def create(trial: Trial, search: Search) -> "TrialRun":
        """Make the run of a trial from the values that the study has for it."""
        slot, space = int(trial.user_attrs["slot"]), search.shared_study.space
        values = {option.name: option.round_to_point(trial.params[option.name]) for option in space}
        folder = search.shared_study.folder / f"trial-{slot:04d}"
        config = replace(apply_values(search.base_config, space, values), out=str(folder))
        return TrialRun(trial=trial, slot=slot, config=config, figure=search.figure, prune=search.prune)

    def open(self, base_setup: DistillationSetup) -> None:
        """Open what the student is trained from. A trial that cannot be trained ends here, with the reason."""
        try:
            setup = base_setup.with_options(self.config)
            setup.build_student(self.config, setup.losses)
        except (UsageError, torch.OutOfMemoryError) as error:
            self.stop_reason = error
            return
        config = resume_if_started(self.config)
        self.student = StudentTraining(config, setup, Path(config.out), self.after_epoch)

    def read_epochs(self) -> list[dict[str, Any]]:
        """Read the metrics of each finished epoch of the training from the cache."""
        phase, folder = first_phase(self.config), Path(self.config.out)
        if phase != "student":
            folder = folder / phase
        return read_epoch_lines(folder) if (folder / METRICS_FILE).is_file() else []

    def report(self) -> None:
        """Report all finished epochs to the study. The trial ends if it is pruned or another process has it."""
        try:
            report_epochs(
                self.trial, self.read_epochs(), figure=self.figure, epochs=self.config.epochs, prune=self.prune
            )
        except (optuna.TrialPruned, UpdateFinishedTrialError) as reason:
            self.stop_reason = reason

    def after_epoch(self, _: dict[str, Any]) -> None:
        """Report an epoch while the student is trained.

        Raises:
            TrainingStopped: when the trial has ended.
        """
        self.report()
        if self.stop_reason:
            raise TrainingStopped(f"trial {self.slot} has ended")

    def finish(self, outcome: dict[str, Any] | TrainingStopped) -> None:
        """Take the outcome of the training: its result.json, or why it ended early."""
        if isinstance(outcome, TrainingStopped):
            self.stop_reason = self.stop_reason or outcome
            return
        self.report()
        self.result = outcome

    def get_outcome(self) -> tuple[TrialState, float | None, dict[str, Any]]:
        """Return the state of the finished trial, its figure, and attributes: seconds, and the reason of a failure."""
        seconds = {"seconds": sum(line["seconds"] for line in self.read_epochs())}
        if self.result is not None and self.stop_reason is None:
            student = self.result["student"]
            value, seconds = student["val"].get(self.figure), {"seconds": student["seconds"]}
            if value is not None:
                return TrialState.COMPLETE, float(value), seconds
            return TrialState.PRUNED, None, seconds | {"failed": f"the validation split has no {self.figure}"}
        if isinstance(self.stop_reason, optuna.TrialPruned):
            return TrialState.PRUNED, None, seconds
        return TrialState.PRUNED, None, seconds | {"failed": str(self.stop_reason).splitlines()[0][:500]}


def _group_by_stream(runs: Sequence[TrialRun]) -> list[list[TrialRun]]:
    """Group the runs that see the same batches.

    With hidden labels or missing targets the rows that are read depend on the losses: each run is a group then.
    """
    groups: dict[Any, list[TrialRun]] = {}
    for run in runs:
        is_alone = run.config.labelled or run.config.missing
        key = run.slot if is_alone else tuple(getattr(run.config, name) for name in _STREAM_OPTIONS)
        groups.setdefault(key, []).append(run)
    return list(groups.values())
