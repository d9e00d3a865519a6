"""`stages tune`: a search for a student's loss weights and training settings; a trial costs a student, no teacher."""

import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from data.errors import Diverged, Interrupted, WrongCommand
from pipeline.files import make_folder

from . import student as student_stage
from .checkpoint import LINES, lines_of
from .console import Console
from .material import Material
from .passes import first_training
from .recipes import fill_in
from .runs import free_run, milestones_of
from .search_folder import DATABASE, alone, begin, compare, look_at, tidy, unfinished
from .search_report import figure_of, line_of, rows_of, say_rows, write_report
from .search_space import Searched, Value, parse_space, with_values
from .settings import SearchSettings, StudentSettings
from .shared_study import SharedStudy, Trial, TrialState, UpdateFinishedTrialError, follow, opened, optuna
from .teacher import row_name

_MOST_POINTS = 100_000
_HERE = ("cache", "data", "data_root", "device", "workers")  # may differ from machine to machine


def run(settings: SearchSettings, said: set[str]) -> None:
    """Everything is checked; then trial after trial, beside other processes; then the best. --out goes on."""
    console = Console(settings.json)
    if settings.resume or settings.seeds > 1 or settings.baseline:
        raise WrongCommand("tune takes no --resume (run it again with the same --out), --seeds or --baseline")
    if settings.grid and "trials" in said:
        raise WrongCommand("--grid tries every combination once: leave out --trials")
    # The recipe is in the settings by now; said again, it would fill in what a trial sets to a default.
    first = replace(student_stage.with_recipe(fill_in(student_stage.without_more(settings), said)), recipe="")
    milestones_of(first)
    space = parse_space(settings.search, first, said)
    grid = _grid(space) if settings.grid else []
    material = Material.open(first)
    _check(space, first, material)
    student_stage.say_notes(first, material, console)
    begun = _begun_with(settings, first, material)
    default = f"{row_name(first.data)}-{first.arch.replace(':', '-')}"
    folder = Path(settings.out) if settings.out else free_run(f"tune-{default}")
    look_at(folder, begun)
    if not settings.out:
        for stopped in unfinished(folder, begun):
            console.say(f"'{stopped}' was stopped; the same command with --out {stopped} goes on")
    if not settings.storage:
        make_folder(folder)
    url = settings.storage or f"sqlite:///{folder.resolve()}/{DATABASE}"
    everywhere = {name: value for name, value in begun.items() if name not in _HERE}
    warm = _fewest_epochs(first, space) // 4
    with opened(url, settings.study or default, figure_of(first) != "nll", everywhere, warm) as (study, storage):
        compare(study.user_attrs["begun"], everywhere, f"the study '{study.study_name}'")
        slots, mark = len(grid) or settings.trials, begin(folder, begun)
        shared = SharedStudy(study, storage, folder, mark, space, first.seed, slots, grid)
        try:
            Search(shared, first, material, settings.prune, console).run()
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(f"stopped; the same command with --out {folder} goes on") from None
        rows = rows_of(shared.holders(), space)
    with alone(folder):
        tidy(folder)
        record = write_report(folder, rows, first, space, begun)
    if settings.json:
        return console.result(json.dumps(record))
    say_rows(record, figure_of(first), space, folder, console)


def _begun_with(settings: SearchSettings, first: StudentSettings, material: Material) -> dict[str, Any]:
    """What the trials of a search have in common, as JSON has it; with another of these it is another search."""
    common = {name: value for name, value in asdict(first).items() if name not in ("out", "json", "resume")}
    searched = {name: getattr(settings, name) for name in ("search", "grid", "prune")}
    caches = [cache.manifest.fingerprint for cache in material.teachers.members]
    found: dict[str, Any] = json.loads(json.dumps(common | searched | {"fingerprints": caches}))
    return found


def _fewest_epochs(first: StudentSettings, space: tuple[Searched, ...]) -> int:
    """Of a trial, where epochs are searched."""
    return min([int(v) for one in space if one.name == "epochs" for v in one.ends()] or [first.epochs])


@dataclass(frozen=True)
class Search:
    """Trials of a study, one after the other, in this process. first: the settings of all but for what is searched."""

    shared: SharedStudy
    first: StudentSettings
    material: Material
    prune: bool
    console: Console

    @property
    def figure(self) -> str:
        """By which trials are compared."""
        return figure_of(self.first)

    def run(self) -> None:
        """Until every slot's trial is over, those of other processes included."""
        waiting = False
        while True:
            with self.shared.next_trial() as trial:
                if trial is not None:
                    self._one(trial)
                    continue
            left = [s for s, t in self.shared.holders().items() if not t.state.is_finished() and s < self.shared.slots]
            if not left:
                return
            if not waiting:
                trials = ", ".join(map(str, left))
                self.console.say(f"waiting for other processes, which train: {trials} (Ctrl-C loses nothing)")
            waiting = True
            time.sleep(0.5)

    def _one(self, trial: Trial) -> None:
        """Train one trial, to its end or until it is pruned, and write down what came of it."""
        slot = int(trial.user_attrs["slot"])
        try:
            state, value, facts = self._trained(trial, slot)
            for name, fact in facts.items():
                trial.set_user_attr(name, fact)
            self.shared.study.tell(trial, value, state)
        except UpdateFinishedTrialError:
            return self.console.say(f"trial {slot}: another process has taken it over")
        rows = rows_of(self.shared.holders(), self.shared.space)
        row = next(row for row in rows if row["trial"] == slot)
        self.console.say(line_of(row, rows, self.shared.slots, self.figure))

    def _trained(self, trial: Trial, slot: int) -> tuple[TrialState, float | None, dict[str, Any]]:
        """State and figure of a trial, its seconds and why it failed. One that cannot be trained counts as tried."""
        values = {one.name: one.decimal(trial.params[one.name]) for one in self.shared.space}
        folder = self.shared.folder / f"trial-{slot:04d}"
        own = replace(with_values(self.first, self.shared.space, values), out=str(folder))
        name = first_training(own)
        where = folder if name == "student" else folder / name

        def lines_so_far() -> list[dict[str, Any]]:
            return lines_of(where) if (where / LINES).is_file() else []

        def told(_: dict[str, Any] | None = None) -> None:
            follow(trial, lines_so_far(), self.figure, own.epochs, self.prune)

        def seconds() -> dict[str, Any]:
            return {"seconds": sum(line["seconds"] for line in lines_so_far())}

        try:
            told()  # of an earlier process, which may have been killed before it did
            material = Material.open(own, self.material)
            student = student_stage.train_or_go_on(own, material, self.console, told)["student"]
            told()
        except optuna.TrialPruned:
            return TrialState.PRUNED, None, seconds()
        except (Diverged, WrongCommand, torch.OutOfMemoryError) as error:
            return TrialState.PRUNED, None, seconds() | {"failed": str(error).splitlines()[0][:500]}
        return TrialState.COMPLETE, float(student["val"][self.figure]), {"seconds": student["seconds"]}


def _grid(space: tuple[Searched, ...]) -> list[dict[str, Value]]:
    """Every combination, the last name changing first. Raises WrongCommand where there is no end of them."""
    for one in space:
        if not one.choices and not one.step:
            raise WrongCommand(f"search '{one.spec}' has no steps: --grid wants {one.name}=LOW..HIGH:step=S or a|b|c")
    count = prod(len(one.points()) for one in space)
    if count > _MOST_POINTS:
        raise WrongCommand(f"--grid would be {count:,} trials, more than {_MOST_POINTS:,}: take wider steps")
    return [
        dict(zip([one.name for one in space], values, strict=True))
        for values in product(*(one.points() for one in space))
    ]


def _check(space: tuple[Searched, ...], first: StudentSettings, material: Material) -> None:
    """Find what would stop a trial before anything is made: labels; archs and losses at every end of the space."""
    if not (material.held_out["val"].labels >= 0).any():
        raise WrongCommand(
            "tune compares students on the labels of the validation split, and these pictures have none"
        )
    middle = {one.name: one.ends()[0] for one in space}
    for one in space:
        for value in one.ends():
            own = with_values(first, space, {**middle, one.name: value})
            try:
                material_of = Material.open(own, material)
                material_of.network(own, material_of.losses)
            except WrongCommand as error:
                raise WrongCommand(f"search '{one.spec}': {error}") from None
