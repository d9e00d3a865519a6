"""`stages tune`: a search for a student's loss weights and training settings; a trial costs a student, no teacher."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from data.errors import Held, Interrupted, Refused, WrongCommand
from pipeline.files import make_folder, publish_json, remove_leftovers
from pipeline.identity import differences
from pipeline.lock import LOCK, held

from . import student as student_stage
from .checkpoint import LINES
from .console import Console
from .material import Material
from .recipes import fill_in
from .runs import free_run, milestones_of, read_json
from .search_report import line_of, rows_of, say_rows, write_report
from .search_space import Searched, Value, parse_space, with_values
from .settings import SearchSettings, StudentSettings
from .shared_study import SharedStudy, Trial, TrialState, UpdateFinishedTrialError, follow, opened, optuna
from .teacher import row_name

_MOST_POINTS = 100_000
_HERE = ("cache", "data", "data_root", "device", "workers")  # may differ from machine to machine
_SEARCH, _DATABASE = "search.json", "study.db"


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
    begun = {
        **{name: value for name, value in asdict(first).items() if name not in ("out", "json", "resume")},
        "search": list(settings.search), "grid": settings.grid, "prune": settings.prune,
        "fingerprint": material.cache.manifest.fingerprint,
    }  # fmt: skip
    begun = json.loads(json.dumps(begun))
    default = f"{row_name(first.data)}-{first.arch.replace(':', '-')}"
    folder = Path(settings.out) if settings.out else free_run(f"tune-{default}")
    _look_at(folder, begun)
    if not settings.out:
        for stopped in _unfinished(folder, begun):
            console.say(f"'{stopped}' was stopped; the same command with --out {stopped} goes on")
    if not settings.storage:
        make_folder(folder)
    storage = settings.storage or f"sqlite:///{folder.resolve()}/{_DATABASE}"
    figure = figure_of(first)
    shared_by_machines = {name: value for name, value in begun.items() if name not in _HERE}
    with opened(storage, settings.study or default, figure != "nll", shared_by_machines, first.epochs // 4) as found:
        _compare(found[0].user_attrs["begun"], shared_by_machines, f"the study '{found[0].study_name}'")
        mark, slots = _begin(folder, begun), len(grid) or settings.trials
        shared = SharedStudy(*found, folder, mark, space, first.seed, slots, grid)
        search = Search(shared, first, material, settings.prune, console)
        try:
            search.run()
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(f"stopped; the same command with --out {folder} goes on") from None
        rows = rows_of(shared.holders(), space, folder)
        with _alone(folder):
            record = write_report(folder, rows, first, space, settings, begun)
    if settings.json:
        return console.result(json.dumps(record))
    say_rows(record, figure, space, folder, console)


def figure_of(settings: StudentSettings) -> str:
    """By which figure of the validation split trials are compared."""
    return "accuracy" if settings.select == "last" else settings.select


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
        begun, slot = time.monotonic(), int(trial.user_attrs["slot"])
        try:
            state, value, more = self._trained(trial, slot)
            trial.set_user_attr("seconds", round(time.monotonic() - begun, 3))
            for name, text in more.items():
                trial.set_user_attr(name, text)
            self.shared.study.tell(trial, value, state)
        except UpdateFinishedTrialError:
            return self.console.say(f"trial {slot}: another process has taken it over")
        rows = rows_of(self.shared.holders(), self.shared.space, self.shared.folder)
        row = next(row for row in rows if row["trial"] == slot)
        self.console.say(line_of(row, rows, self.shared.slots, self.figure))

    def _trained(self, trial: Trial, slot: int) -> tuple[TrialState, float | None, dict[str, str]]:
        """State and figure of a trial, and why it has none. One that cannot be trained counts as tried."""
        values = {one.name: one.decimal(trial.params[one.name]) for one in self.shared.space}
        folder = self.shared.folder / f"trial-{slot:04d}"
        own = replace(with_values(self.first, self.shared.space, values), out=str(folder))

        def told(_: dict[str, Any] | None = None) -> None:
            name = student_stage.first_training(own)
            lines = _lines(folder / name / LINES if name != "student" else folder / LINES)
            follow(trial, lines, self.figure, own.epochs, self.prune)

        try:
            told()  # of an earlier process, which may have been killed before it did
            material = Material.open(own, self.material)
            result = student_stage.train_or_go_on(own, material, self.console, told)
            told()
        except optuna.TrialPruned:
            return TrialState.PRUNED, None, {}
        except (Refused, WrongCommand, torch.OutOfMemoryError) as error:
            if isinstance(error, Refused) and "diverged" not in str(error):
                raise
            return TrialState.PRUNED, None, {"failed": str(error).splitlines()[0][:500]}
        return TrialState.COMPLETE, float(result["student"]["val"][self.figure]), {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of the epochs that are done. (The file is whole or absent.)"""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise Refused(f"'{path}' is damaged: it is not a record of epochs") from None


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


def _look_at(folder: Path, begun: dict[str, Any]) -> None:
    """Raise WrongCommand for a folder that holds something else, Refused for one of another search."""
    if "?" in str(folder.resolve()):
        raise WrongCommand(f"--out {folder}: the path of a database has no '?'")
    if (folder / _SEARCH).exists():
        return _compare(read_json(folder / _SEARCH, {"mark", "begun"})["begun"], begun, f"'{folder}'")
    if folder.exists() and not (folder.is_dir() and all(_left_over(path) for path in folder.iterdir())):
        raise WrongCommand(f"'{folder}' exists and is no search: choose another --out")


def _unfinished(folder: Path, begun: dict[str, Any]) -> list[Path]:
    """The same search, stopped, in other folders beside one whose name was chosen for this one."""
    found = []
    for path in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/{_SEARCH}")):
        with suppress(Refused):  # damaged: that is for those who go on with it
            if read_json(path).get("begun") == begun and not (path.parent / "tune.json").exists():
                found.append(path.parent)
    return found


def _left_over(path: Path) -> bool:
    """Whether a process that was killed before it began a search left this."""
    return path.name.startswith((f".{_SEARCH}.", LOCK, _DATABASE))


def _begin(folder: Path, begun: dict[str, Any]) -> str:
    """Make the folder of a search, or go on in it; its mark. Raises Refused when it was begun otherwise."""
    path = folder / _SEARCH
    make_folder(folder)
    with _alone(folder):
        remove_leftovers(folder, (_SEARCH, "tune.json", "tune.png"))
        if not path.exists():
            publish_json(path, {"mark": uuid4().hex, "begun": begun})
        record = read_json(path, {"mark", "begun"})
    _compare(record["begun"], begun, f"'{folder}'")
    return str(record["mark"])


def _compare(theirs: Any, mine: dict[str, Any], what: str) -> None:
    """Raise Refused, naming what differs, when a search was begun otherwise than it is asked for now."""
    if differ := [f"{n} {a} there, {b} asked" for n, a, b in differences(theirs, mine)]:
        other = "another --out" if what.startswith("'") else "another --study"
        raise Refused(f"{what} was begun otherwise ({'; '.join(differ[:4])}): choose {other}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a search's folder for a moment; other processes of it are done with it soon."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(folder))
                break
            except Held:
                time.sleep(0.05)
        yield
