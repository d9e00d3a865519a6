"""A study in a storage that several processes share: which of them trains which trial.

A trial has a slot, 0 … --trials - 1. Whoever begins one adds it to the storage with all its parameters in one
transaction. Of the trials of a slot that have not failed the first holds it, so that of two processes which begin
the same slot at once one gives way; a process that is gone leaves a slot that is free again. While a trial is
trained its process holds a lock of the kernel in its folder, which others see there at once, and counts up `beat` in
the storage, which is how other machines see it.
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

from .folder import trial_lock
from .space import SearchedOption

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
except ImportError as error:
    raise UsageError(f"tune needs Optuna 4.3 or later ({error}): pip install 'softcache[tune]'") from None

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

BEAT_SECONDS = 20.0
DEAD_SECONDS = 180.0  # after so long without a beat a process of another folder is taken to be gone
_PATIENCE = 60  # seconds for which one waits for another process's transaction in SQLite


@dataclass
class SharedStudy:
    """The study and what this process needs to take part. folder: of its trials, with its mark, by which a trial of
    this folder is known; grid: the parameters of every slot, none where they are chosen by what is known so far."""

    study: optuna.Study
    storage: RDBStorage
    folder: Path
    mark: str
    space: tuple[SearchedOption, ...]
    seed: int
    slots: int
    grid: list[dict[str, Any]]
    beats: dict[int, tuple[int, float]] = field(default_factory=dict)

    def holders(self) -> dict[int, FrozenTrial]:
        """{slot: the trial that holds it}. Raises CacheError for trials of another search."""
        found: dict[int, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if set(trial.params) != {one.name for one in self.space} or "slot" not in trial.user_attrs:
                raise CacheError(
                    f"the study '{self.study.study_name}' has trials of another search: name another --study"
                )
            if trial.state != TrialState.FAIL:
                found.setdefault(trial.user_attrs["slot"], trial)
        return dict(sorted(found.items()))

    @contextmanager
    def next_trials(self, most: int) -> Iterator[list[Trial]]:
        """The first trials that are to be trained and that nobody trains, held; none when there are none just now.

        They are of one block of so many slots: then what a sampler knows of finished ones does not depend on kills.
        """
        with ExitStack() as stack:
            trials: list[Trial] = []
            while len(trials) < most and (trial := self._held_trial(stack, [*map(_slot, trials)], most)):
                trials.append(trial)
            yield trials

    def _held_trial(self, stack: ExitStack, have: list[int], most: int) -> Trial | None:
        holders = self.holders()
        first = have[0] // most * most if have else 0
        for slot in range(first, min(first + most, self.slots) if have else self.slots):
            if slot in have or not self._may_be_free(holders.get(slot)):
                continue
            with ExitStack() as own:
                try:
                    own.enter_context(hold_lock(self.folder, trial_lock(slot)))
                except LockedError:
                    continue
                if trial := self._taken(slot):
                    own.enter_context(self._beating(trial._trial_id))
                    stack.enter_context(own.pop_all())
                    return trial
        return None

    def _may_be_free(self, holder: FrozenTrial | None) -> bool:
        if holder is None:
            return True
        return holder.state == TrialState.RUNNING and (self._of_this_folder(holder) or self._silent(holder))

    def _of_this_folder(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs["folder"] == self.mark)

    def _silent(self, trial: FrozenTrial) -> bool:
        """Whether a process elsewhere has not been heard of for too long, by this process's own clock."""
        beat, now = trial.user_attrs["beat"], time.monotonic()
        known = self.beats.get(trial._trial_id)
        if known is None or known[0] != beat:
            self.beats[trial._trial_id] = (beat, now)
            return False
        return now - known[1] > DEAD_SECONDS

    def _taken(self, slot: int) -> Trial | None:
        """The trial of a slot whose lock is held: the one that a dead process left here, or a new one."""
        holder = self.holders().get(slot)
        if holder is not None:
            if not self._may_be_free(holder):
                return None
            if self._of_this_folder(holder):
                return Trial(self.study, holder._trial_id)
            self._fail(holder)
        claim = uuid4().hex
        attributes = {"slot": slot, "folder": self.mark, "beat": 0, "claim": claim}
        trial = create_trial(
            state=TrialState.RUNNING,
            params=self._parameters(slot),
            distributions=self._distributions(),
            user_attrs=attributes,
        )
        self.study.add_trial(trial)
        mine = next(t for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("claim") == claim)
        if self.holders()[slot].number == mine.number:
            return Trial(self.study, mine._trial_id)
        self._fail(mine)  # another process was first
        return None

    def _fail(self, trial: FrozenTrial) -> None:
        with suppress(UpdateFinishedTrialError):  # by another process that saw the same
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {one.name: _distribution(one) for one in self.space}

    def _parameters(self, slot: int) -> dict[str, Any]:
        """Those that the slot had before, or the grid's, or what TPE makes of the trials so far.

        The sampler's seed is the slot's own: a search that was killed goes on as if it had not been.
        """
        before = [t for t in self.study.get_trials(deepcopy=False) if t.user_attrs["slot"] == slot]
        if before:
            return before[0].params
        if self.grid:
            return self.grid[slot]
        sampler = optuna.samplers.TPESampler(seed=crc32(f"{self.seed}/{slot}".encode()), constant_liar=False)
        blank = create_trial(state=TrialState.RUNNING)
        together = sampler.infer_relative_search_space(self.study, blank)
        found = sampler.sample_relative(self.study, blank, together)
        for name, distribution in self._distributions().items():
            if name not in found:
                found[name] = sampler.sample_independent(self.study, blank, name, distribution)
        return found

    @contextmanager
    def _beating(self, trial: int) -> Iterator[None]:
        over = threading.Event()
        beat = int(self.storage.get_trial(trial).user_attrs["beat"])

        def count() -> None:
            number = beat
            while True:
                number += 1
                with suppress(StorageInternalError):  # the next one will do
                    try:
                        self.storage.set_trial_user_attr(trial, "beat", number)
                    except UpdateFinishedTrialError:  # it is over, or was taken over
                        return
                if over.wait(BEAT_SECONDS):
                    self.storage.remove_session()
                    return

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _slot(trial: Trial) -> int:
    return int(trial.user_attrs["slot"])


@contextmanager
def open_study(
    url: str, name: str, maximize: bool, begun: dict[str, Any], warm: int
) -> Iterator[tuple[Any, RDBStorage]]:
    """The study of that name, made where there is none, and its storage. begun: what it is of, kept as `begun`.

    warm: epochs of a trial before which it is not pruned. Raises CacheError when it was begun otherwise.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _storage(url)
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=warm),
        )
        if "begun" not in study.user_attrs:
            study.set_user_attr("begun", begun)
        yield study, storage
    except StorageInternalError as error:
        raise CacheError(f"the storage failed: {str(error.__cause__ or error).splitlines()[0]}") from None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _storage(url: str) -> RDBStorage:
    """Raises UsageError for what is no URL of a database, CacheError for one that does not answer."""
    if url.startswith("sqlite") and (":memory:" in url or url.rstrip("/") == "sqlite:"):
        raise UsageError(f"--storage {url}: a database in memory is gone with its process: name a file")
    more = {"connect_args": {"timeout": _PATIENCE}} if url.startswith("sqlite") else {}
    for attempt in range(10):
        try:
            return RDBStorage(url, engine_kwargs=more)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise UsageError(f"--storage: {str(error).splitlines()[0]}") from None
        except SQLAlchemyError as error:  # also of two processes that make the same tables at once
            why = str(error).splitlines()[0]
            time.sleep(0.1 * (attempt + 1))
    raise CacheError(f"the storage cannot be opened: {why}")


def _distribution(one: SearchedOption) -> BaseDistribution:
    if one.choices:
        return CategoricalDistribution(one.choices)
    if isinstance(one.low, int):
        return IntDistribution(one.low, int(one.high), log=one.log, step=int(one.step) or 1)
    return FloatDistribution(one.low, one.high, log=one.log, step=one.step or None)


def report_epochs(trial: Trial, lines: Sequence[dict[str, Any]], figure: str, epochs: int, prune: bool) -> None:
    """Tell the storage the figure of every epoch that it does not know. Raises optuna.TrialPruned where the trial is
    to end; a trial that has come to its last epoch is not pruned."""
    known = trial.storage.get_trial(trial._trial_id).intermediate_values
    for line in lines[max(len(known) - 1, 0) :]:  # the last known one too: it may not have been judged
        if line["epoch"] not in known:
            trial.report(line[f"val_{figure}"], line["epoch"])
        if prune and line["epoch"] < epochs and trial.should_prune():
            raise optuna.TrialPruned
