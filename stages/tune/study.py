"""The study of a search in a storage that several processes share, and which of them trains which trial.

A search has slots, 0 … --trials - 1, and each gets one trial. A process adds a trial with all of its parameters in
one transaction of the storage. The slot belongs to the first of its trials that has not failed: if two processes add
one for the same slot at once, the later one is withdrawn; the trial of a process that was killed is set to failed or
continued, and the slot is free again. While a process trains a trial, it holds a kernel lock in its folder, which
processes of the same folder see at once, and it increments the attribute `beat` in the storage, by which other
machines see that it is alive.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

from softcache.base.errors import CacheError, LockedError, UsageError
from softcache.base.lock import hold_lock

from .folder import format_lock_name
from .space import SearchedOption

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
except ImportError as error:
    raise UsageError(f"tune needs Optuna 4.3 or later ({error}): pip install -e '.[tune]'") from None

__all__ = [
    "FrozenTrial",
    "SharedStudy",
    "Trial",
    "TrialState",
    "UpdateFinishedTrialError",
    "open_study",
    "optuna",
    "report_epochs",
]

HEARTBEAT_SECONDS = 20.0
DEAD_SECONDS = 180.0  # without a heartbeat, after which a process of another folder counts as dead
_SQLITE_TIMEOUT = 60  # seconds to wait for the transaction of another process


@dataclass
class SharedStudy:
    """A study as one of its processes sees it.

    Attributes:
        study: the study of Optuna.
        storage: where it is stored.
        folder: the folder of the search, in which this process trains.
        folder_id: identifies the folder in the attributes of its trials.
        space: what is searched.
        seed: of the sampler.
        slots: number of trials of the search.
        grid: the parameters of every slot, empty where a sampler chooses them.
        heartbeats: {trial: (beat, time at which this process read it first)} of other folders.
    """

    study: optuna.Study
    storage: RDBStorage
    folder: Path
    folder_id: str
    space: tuple[SearchedOption, ...]
    seed: int
    slots: int
    grid: list[dict[str, Any]]
    heartbeats: dict[int, tuple[int, float]] = field(default_factory=dict)

    def read_trials(self) -> dict[int, FrozenTrial]:
        """Read the trial of each slot that has one, in the order of the slots.

        Raises:
            CacheError: when the study has trials of another search.
        """
        trials: dict[int, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            has_names = set(trial.params) == {option.name for option in self.space} and "slot" in trial.user_attrs
            # A value from a database is used only where --search names it: an arch can be code to be imported.
            if not has_names or any(o.choices and trial.params[o.name] not in o.choices for o in self.space):
                raise CacheError(
                    f"the study '{self.study.study_name}' has trials of another search: choose another --study"
                )
            if trial.state != TrialState.FAIL:
                trials.setdefault(trial.user_attrs["slot"], trial)
        return dict(sorted(trials.items()))

    @contextmanager
    def take_trials(self, count: int) -> Iterator[list[Trial]]:
        """Take the first trials that have to be trained and that no other process trains, and hold their locks.

        Args:
            count: most trials. All are of the same block of `count` slots, so that which finished trials the sampler
                uses does not depend on when a process was killed.

        Yields:
            The trials, none when there is none at the moment.
        """
        with ExitStack() as locks:
            trials: list[Trial] = []
            while len(trials) < count:
                trial = self._take_trial(locks, [int(taken.user_attrs["slot"]) for taken in trials], count)
                if trial is None:
                    break
                trials.append(trial)
            yield trials

    def _take_trial(self, locks: ExitStack, taken_slots: list[int], count: int) -> Trial | None:
        """Take the first trial that is available, of the block of the slots taken before if there are any."""
        trials = self.read_trials()
        slots = range(self.slots)
        if taken_slots:
            block = taken_slots[0] // count * count
            slots = range(block, min(block + count, self.slots))
        for slot in slots:
            if slot in taken_slots or not self._may_be_available(trials.get(slot)):
                continue
            with ExitStack() as trial_lock:
                try:
                    trial_lock.enter_context(hold_lock(self.folder, format_lock_name(slot)))
                except LockedError:
                    continue
                if trial := self._continue_or_add_trial(slot):
                    trial_lock.enter_context(self._send_heartbeats(trial._trial_id))
                    locks.enter_context(trial_lock.pop_all())
                    return trial
        return None

    def _may_be_available(self, trial: FrozenTrial | None) -> bool:
        """Whether a slot has no trial, or one whose process may be dead. In this folder its lock decides."""
        if trial is None:
            return True
        return trial.state == TrialState.RUNNING and (self._is_of_this_folder(trial) or self._is_silent(trial))

    def _is_of_this_folder(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs["folder"] == self.folder_id)

    def _is_silent(self, trial: FrozenTrial) -> bool:
        """Whether a trial has had no new heartbeat for DEAD_SECONDS, by the clock of this process."""
        beat, now = trial.user_attrs["beat"], time.monotonic()
        last = self.heartbeats.get(trial._trial_id)
        if last is None or last[0] != beat:
            self.heartbeats[trial._trial_id] = (beat, now)
            return False
        return now - last[1] > DEAD_SECONDS

    def _continue_or_add_trial(self, slot: int) -> Trial | None:
        """Return the trial of a slot whose lock is held: that of a dead process of this folder, or a new one.

        None when another process has the slot.
        """
        trial = self.read_trials().get(slot)
        if trial is not None:
            if not self._may_be_available(trial):
                return None
            if self._is_of_this_folder(trial):
                return Trial(self.study, trial._trial_id)
            self._set_failed(trial)
        claim = uuid4().hex
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=self._choose_parameters(slot),
                distributions=self._make_distributions(),
                user_attrs={"slot": slot, "folder": self.folder_id, "beat": 0, "claim": claim},
            )
        )
        added = next(t for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("claim") == claim)
        if self.read_trials()[slot].number == added.number:
            return Trial(self.study, added._trial_id)
        self._set_failed(added)  # another process was first
        return None

    def _set_failed(self, trial: FrozenTrial) -> None:
        with suppress(UpdateFinishedTrialError):  # another process has set it already
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _make_distributions(self) -> dict[str, BaseDistribution]:
        return {option.name: _make_distribution(option) for option in self.space}

    def _choose_parameters(self, slot: int) -> dict[str, Any]:
        """Return the parameters of an earlier trial of the slot, or those of the grid, or those that TPE samples.

        The seed of the sampler depends on the slot alone, so that a search that was killed continues with the
        parameters that it would have had.
        """
        earlier = [t for t in self.study.get_trials(deepcopy=False) if t.user_attrs["slot"] == slot]
        if earlier:
            return earlier[0].params
        if self.grid:
            return self.grid[slot]
        sampler = optuna.samplers.TPESampler(seed=crc32(f"{self.seed}/{slot}".encode()), constant_liar=False)
        trial = create_trial(state=TrialState.RUNNING)
        relative_space = sampler.infer_relative_search_space(self.study, trial)
        parameters = sampler.sample_relative(self.study, trial, relative_space)
        for name, distribution in self._make_distributions().items():
            if name not in parameters:
                parameters[name] = sampler.sample_independent(self.study, trial, name, distribution)
        return parameters

    @contextmanager
    def _send_heartbeats(self, trial_id: int) -> Iterator[None]:
        """Increment the attribute `beat` of a trial, in a thread, until the block ends."""
        is_over = threading.Event()
        first_beat = int(self.storage.get_trial(trial_id).user_attrs["beat"]) + 1

        def send() -> None:
            beat = first_beat
            while True:
                with suppress(StorageInternalError):  # the next one may succeed
                    try:
                        self.storage.set_trial_user_attr(trial_id, "beat", beat)
                    except UpdateFinishedTrialError:  # the trial is finished, or another process has taken it over
                        return
                beat += 1
                if is_over.wait(HEARTBEAT_SECONDS):
                    self.storage.remove_session()
                    return

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


@contextmanager
def open_study(
    url: str, name: str, maximize: bool, settings: dict[str, Any], warmup_epochs: int
) -> Iterator[tuple[Any, RDBStorage]]:
    """Open a study, or create it where there is none of that name.

    Args:
        url: of the database, as SQLAlchemy takes it.
        name: of the study.
        maximize: whether larger figures are better.
        settings: what the trials have in common, recorded in a new study as its attribute `begun`.
        warmup_epochs: epochs of a trial before which it is not pruned.

    Yields:
        The study and its storage.

    Raises:
        CacheError: when the storage cannot be opened, or fails later.
        UsageError: when the text is not the URL of a database.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _open_storage(url)
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=warmup_epochs),
        )
        if "begun" not in study.user_attrs:
            study.set_user_attr("begun", settings)
        yield study, storage
    except StorageInternalError as error:
        raise CacheError(f"the storage failed: {str(error.__cause__ or error).splitlines()[0]}") from None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _open_storage(url: str) -> RDBStorage:
    """Open a database, in several attempts: of two processes that create the tables at once, one gets an error."""
    if url.startswith("sqlite") and (":memory:" in url or url.rstrip("/") == "sqlite:"):
        raise UsageError(f"--storage {url}: a database in memory is lost when its process ends: name a file")
    engine_options = {"connect_args": {"timeout": _SQLITE_TIMEOUT}} if url.startswith("sqlite") else {}
    for attempt in range(10):
        try:
            return RDBStorage(url, engine_kwargs=engine_options)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise UsageError(f"--storage: {str(error).splitlines()[0]}") from None
        except SQLAlchemyError as error:
            reason = str(error).splitlines()[0]
            time.sleep(0.1 * (attempt + 1))
    raise CacheError(f"the storage cannot be opened: {reason}")


def _make_distribution(option: SearchedOption) -> BaseDistribution:
    if option.choices:
        return CategoricalDistribution(option.choices)
    if isinstance(option.low, int):
        return IntDistribution(option.low, int(option.high), log=option.log, step=int(option.step) or 1)
    return FloatDistribution(option.low, option.high, log=option.log, step=option.step or None)


def report_epochs(trial: Trial, lines: Sequence[dict[str, Any]], figure: str, epochs: int, prune: bool) -> None:
    """Write the figure of every epoch that the study does not have yet.

    Args:
        trial: the trial.
        lines: metrics of its finished epochs.
        figure: the figure of the validation split to report.
        epochs: of the whole training; a trial is not pruned after the last one.
        prune: whether it is pruned at all.

    Raises:
        optuna.TrialPruned: when the trial is below the median of the others.
        UpdateFinishedTrialError: when another process has taken it over.
    """
    known = trial.storage.get_trial(trial._trial_id).intermediate_values
    # Begins with the last known epoch: a process killed after the report had not yet decided whether to prune.
    for line in lines[max(len(known) - 1, 0) :]:
        if line["epoch"] not in known and f"val_{figure}" in line:
            trial.report(line[f"val_{figure}"], line["epoch"])
        if prune and line["epoch"] < epochs and trial.should_prune():
            raise optuna.TrialPruned
