"""`softcache tune`: a search for a student's loss weights and training settings; a trial costs a student."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from softcache.base.errors import Interrupted, TrainingStopped, UsageError
from softcache.base.files import make_folder
from softcache.data.transfer_set import short_name
from softcache.stages.cli.configs import StudentConfig, TuneConfig
from softcache.stages.cli.console import Console
from softcache.stages.runs.folder import IGNORED_OPTIONS, find_free_folder, parse_milestones
from softcache.stages.student.command import print_notes
from softcache.stages.student.defaults import fill_defaults, to_student_config
from softcache.stages.student.phases import StudentTraining, first_phase
from softcache.stages.student.recipes import apply_recipe
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.student.several_students import train_students
from softcache.stages.student.student_run import resume_if_started
from softcache.stages.training.checkpoint import METRICS_FILE, read_epoch_lines

from .folder import (
    DATABASE,
    check_folder,
    check_same_search,
    clean_up,
    find_unfinished_searches,
    lock_search,
    start_search,
)
from .space import SearchedOption, Value, apply_values, parse_space
from .study import SharedStudy, Trial, TrialState, UpdateFinishedTrialError, open_study, optuna, report_epochs
from .summary import format_row, make_rows, print_rows, validation_figure, write_report

_MOST_POINTS = 100_000
_HERE = ("cache", "data", "data_root", "device", "workers")  # may differ from machine to machine


def run(config: TuneConfig, said: set[str]) -> None:
    """Everything is checked; then trial after trial, beside other processes; then the best. --out goes on."""
    console = Console(config.json, epoch_lines=False)
    if config.resume or config.seeds > 1 or config.baseline:
        raise UsageError("tune takes no --resume (run it again with the same --out), --seeds or --baseline")
    if config.grid and "trials" in said:
        raise UsageError("--grid tries every combination once: leave out --trials")
    # The recipe is in the settings by now; said again, it would fill in what a trial sets to a default.
    first = replace(fill_defaults(apply_recipe(to_student_config(config), said)), recipe="")
    parse_milestones(first)
    space = parse_space(config.search, first, said)
    grid = _grid(space) if config.grid else []
    setup = DistillationSetup.open(first)
    _check(space, first, setup)
    print_notes(first, setup, console)
    begun = _search_record(config, first, setup)
    default = f"{short_name(first.data)}-{first.arch.replace(':', '-')}"
    folder = Path(config.out) if config.out else find_free_folder(f"tune-{default}")
    check_folder(folder, begun)
    if not config.out:
        for stopped in find_unfinished_searches(folder, begun):
            console.print(f"'{stopped}' was stopped; the same command with --out {stopped} goes on")
    if not config.storage:
        make_folder(folder)
    url = config.storage or f"sqlite:///{folder.resolve()}/{DATABASE}"
    everywhere = {name: value for name, value in begun.items() if name not in _HERE}
    warm = _fewest_epochs(first, space) // 4
    with open_study(url, config.study or default, validation_figure(first) != "nll", everywhere, warm) as (
        study,
        storage,
    ):
        check_same_search(study.user_attrs["begun"], everywhere, f"the study '{study.study_name}'")
        slots, mark = len(grid) or config.trials, start_search(folder, begun)
        shared = SharedStudy(study, storage, folder, mark, space, first.seed, slots, grid)
        try:
            Search(shared, first, setup, config.prune, config.together, console).run()
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(f"stopped; the same command with --out {folder} goes on") from None
        rows = make_rows(shared.holders(), space)
    with lock_search(folder):
        clean_up(folder)
        record = write_report(folder, rows, first, space, begun)
    if config.json:
        return console.print_json(json.dumps(record))
    print_rows(record, validation_figure(first), space, folder, console)


def _search_record(config: TuneConfig, first: StudentConfig, setup: DistillationSetup) -> dict[str, Any]:
    """What the trials of a search have in common, as JSON has it; with another of these it is another search."""
    common = {name: value for name, value in asdict(first).items() if name not in IGNORED_OPTIONS}
    searched = {name: getattr(config, name) for name in ("search", "grid", "prune")}
    caches = [cache.manifest.fingerprint for cache in setup.teachers.members]
    found: dict[str, Any] = json.loads(json.dumps(common | searched | {"fingerprints": caches}))
    return found


def _fewest_epochs(first: StudentConfig, space: tuple[SearchedOption, ...]) -> int:
    """Of a trial, where epochs are searched."""
    return min([int(v) for one in space if one.name == "epochs" for v in one.ends()] or [first.epochs])


@dataclass(frozen=True)
class Search:
    """Trials of a study, so many together, in this process. first: the settings of all but for what is searched."""

    shared: SharedStudy
    first: StudentConfig
    setup: DistillationSetup
    prune: bool
    together: int
    console: Console

    @property
    def figure(self) -> str:
        """By which trials are compared."""
        return validation_figure(self.first)

    def run(self) -> None:
        """Until every slot's trial is over, those of other processes included."""
        waiting = False
        while True:
            with self.shared.next_trials(self.together) as trials:
                if trials:
                    self._train(trials)
                    continue
            left = [s for s, t in self.shared.holders().items() if not t.state.is_finished() and s < self.shared.slots]
            if not left:
                return
            if not waiting:
                numbers = ", ".join(map(str, left))
                self.console.print(f"waiting for other processes, which train: {numbers} (Ctrl-C loses nothing)")
            waiting = True
            time.sleep(0.5)

    def _train(self, trials: Sequence[Trial]) -> None:
        """Train some trials, those that see the same batches from one stream, and write down what came of each."""
        runs = [_Run.of(trial, self) for trial in trials]
        for run in runs:
            run.open(self.setup)
        for group in _groups([run for run in runs if run.student is not None]):
            for run in group:
                run.told()  # of an earlier process, which may have been killed before it did
            left = [run for run in group if run.ended is None]
            results = self._results([run.student for run in left if run.student is not None])
            for run, result in zip(left, results, strict=True):
                run.finish(result)
        for run in runs:
            self._tell(run)

    def _results(self, students: Sequence[StudentTraining]) -> list[dict[str, Any] | TrainingStopped]:
        """Of each its result, or how it ended. What does not fit, or not into memory, is tried one by one: then it is
        that trial's own."""
        if not students:
            return []
        try:
            return train_students(students, False, self.console)
        except (UsageError, torch.OutOfMemoryError) as error:
            if len(students) == 1:
                return [TrainingStopped(str(error))]
        lock_search = [replace(one, config=resume_if_started(one.config)) for one in students]
        return [result for one in lock_search for result in self._results([one])]

    def _tell(self, run: "_Run") -> None:
        """The study what came of a trial."""
        state, value, facts = run.outcome()
        try:
            if isinstance(run.ended, UpdateFinishedTrialError):
                raise run.ended
            for name, fact in facts.items():
                run.trial.set_user_attr(name, fact)
            self.shared.study.tell(run.trial, value, state)
        except UpdateFinishedTrialError:
            return self.console.print(f"trial {run.slot}: another process has taken it over")
        rows = make_rows(self.shared.holders(), self.shared.space)
        row = next(row for row in rows if row["trial"] == run.slot)
        self.console.print(format_row(row, rows, self.shared.slots, self.figure))


@dataclass
class _Run:
    """A trial as a student's run. ended: how it ended early, result: its result.json."""

    trial: Trial
    slot: int
    config: StudentConfig
    figure: str
    prune: bool
    student: StudentTraining | None = None
    ended: Exception | None = None
    result: dict[str, Any] | None = None

    @staticmethod
    def of(trial: Trial, search: Search) -> "_Run":
        """Of the settings that the trial's values make."""
        slot, space = int(trial.user_attrs["slot"]), search.shared.space
        values = {one.name: one.decimal(trial.params[one.name]) for one in space}
        folder = search.shared.folder / f"trial-{slot:04d}"
        own = replace(apply_values(search.first, space, values), out=str(folder))
        return _Run(trial, slot, own, search.figure, search.prune)

    def open(self, like: DistillationSetup) -> None:
        """What it is trained from. One that cannot be trained counts as tried."""
        try:
            setup = like.with_options(self.config)
            setup.build_student(self.config, setup.losses)
        except (UsageError, torch.OutOfMemoryError) as error:
            self.ended = error
            return
        own = resume_if_started(self.config)
        self.student = StudentTraining(own, setup, Path(own.out), self.after_epoch)

    def lines(self) -> list[dict[str, Any]]:
        """Of the epochs that are done."""
        name, folder = first_phase(self.config), Path(self.config.out)
        where = folder if name == "student" else folder / name
        return read_epoch_lines(where) if (where / METRICS_FILE).is_file() else []

    def told(self) -> None:
        """Tell the study every epoch; it may end the trial, or another process may have."""
        try:
            report_epochs(self.trial, self.lines(), self.figure, self.config.epochs, self.prune)
        except (optuna.TrialPruned, UpdateFinishedTrialError) as why:
            self.ended = why

    def after_epoch(self, _: dict[str, Any]) -> None:
        """The same while it trains."""
        self.told()
        if self.ended:
            raise TrainingStopped(f"trial {self.slot} is over")

    def finish(self, result: dict[str, Any] | TrainingStopped) -> None:
        """What its training has come to."""
        if isinstance(result, TrainingStopped):
            self.ended = self.ended or result
            return
        self.told()
        self.result = result

    def outcome(self) -> tuple[TrialState, float | None, dict[str, Any]]:
        """State and figure, its seconds and why it failed."""
        seconds = {"seconds": sum(line["seconds"] for line in self.lines())}
        if self.result is not None and self.ended is None:
            student = self.result["student"]
            return TrialState.COMPLETE, float(student["val"][self.figure]), {"seconds": student["seconds"]}
        if isinstance(self.ended, optuna.TrialPruned):
            return TrialState.PRUNED, None, seconds
        return TrialState.PRUNED, None, seconds | {"failed": str(self.ended).splitlines()[0][:500]}


_OF_A_STREAM = ("epochs", "finetune_epochs", "batch_size", "sampler", "draws", "labelled")


def _groups(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Those that see the same batches together. Where labels are hidden, which rows are seen goes by the losses."""
    found: dict[Any, list[_Run]] = {}
    for run in runs:
        lock_search = run.config.labelled or run.config.missing
        key = run.slot if lock_search else tuple(getattr(run.config, name) for name in _OF_A_STREAM)
        found.setdefault(key, []).append(run)
    return list(found.values())


def _grid(space: tuple[SearchedOption, ...]) -> list[dict[str, Value]]:
    """Every combination, the last name changing first. Raises UsageError where there is no end of them."""
    for one in space:
        if not one.choices and not one.step:
            raise UsageError(f"search '{one.spec}' has no steps: --grid wants {one.name}=LOW..HIGH:step=S or a|b|c")
    count = prod(len(one.points()) for one in space)
    if count > _MOST_POINTS:
        raise UsageError(f"--grid would be {count:,} trials, more than {_MOST_POINTS:,}: take wider steps")
    return [
        dict(zip([one.name for one in space], values, strict=True))
        for values in product(*(one.points() for one in space))
    ]


def _check(space: tuple[SearchedOption, ...], first: StudentConfig, setup: DistillationSetup) -> None:
    """Find what would stop a trial before anything is made: labels; archs and losses at every end of the space."""
    if not (setup.held_out["val"].labels >= 0).any():
        raise UsageError("tune compares students on the labels of the validation split, and these images have none")
    middle = {one.name: one.ends()[0] for one in space}
    for one in space:
        for value in one.ends():
            own = apply_values(first, space, {**middle, one.name: value})
            try:
                material_of = setup.with_options(own)
                material_of.build_student(own, material_of.losses)
            except UsageError as error:
                raise UsageError(f"search '{one.spec}': {error}") from None
