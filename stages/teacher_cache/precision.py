"""Which arithmetic the teacher is asked in: tried on some of its own views, compared with plain float32."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy, render
from softcache.pipeline.cache.codecs import measure_fidelity
from softcache.pipeline.cache.existing import InferenceSettings
from softcache.pipeline.cache.manifest import PrecisionRecord
from softcache.pipeline.cache.manifest_reader import parse_precision_record
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import CacheConfig
from softcache.stages.cli.console import Console

from .inference import TeacherInference, restore_inference

_VIEWS, _BATCHES = 512, 2
_TURNS, _QUICK = 3, 1.0  # at most so many rounds over the views, and no further one after one of so many seconds
# How much faster something must be to be taken in place of plain float32, which is the teacher to the last bit.
_WORTH = 1.05


@dataclass(frozen=True)
class ChosenPrecision:
    """What answers, and what there is to write down about it; None for the teacher as it is. begun: goes on so."""

    inference: TeacherInference
    precision_record: PrecisionRecord | None = None
    is_resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, for other ranks; see chosen_as."""
        a, arithmetic = self.inference, self.precision_record.to_json() if self.precision_record else None
        how = {"precision": a.precision, "folded": a.is_folded, "compiled": a.is_compiled}
        return {**how, "arithmetic": arithmetic, "begun": self.is_resumed}


@dataclass(frozen=True)
class TrialViews:
    """Views of the first draw, 512 or all, that a teacher is tried on: those of the first rows that are written."""

    transfer_set: TransferSet
    views: ViewPolicy
    config: CacheConfig

    @property
    def batch_rows(self) -> int:
        """The largest batch of stage one."""
        rows = max(len(split) for split in self.transfer_set.splits.values())
        return min(self.config.batch_size, self.config.shard_rows or rows, rows)

    def render(self) -> list[torch.Tensor]:
        """uint8 [B, C, S, S], two at least: the first ones of everything also warm up."""
        rows = self.transfer_set.splits["train"]
        index = make_row_order(self.config.seed, "train", len(rows))[:_VIEWS]
        size = min(self.batch_rows, -(-len(index) // _BATCHES))
        parts = [index[i : i + size] for i in range(0, len(index), size)]
        return [render(rows.images, self.views, self.config.seed, part, 0) for part in parts]


@dataclass
class _Trial:
    """What one answering said about the views, float32 [n, K] by batch, and the least seconds of a view."""

    inference: TeacherInference
    outputs: list[NDArray[np.float32]] = field(default_factory=list)
    seconds: float = float("inf")
    failure: str = ""

    def run(self, views: torch.Tensor, keep: bool) -> None:
        """One batch more. What another arithmetic than the teacher's own raises is noted, and it is asked no more."""
        if self.failure:
            return
        try:
            logits, seconds = time_inference(self.inference, views)
        except (RuntimeError, TypeError, ValueError) as error:  # a network is anyone's code
            if self.inference.is_plain:
                raise
            self.failure = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            return
        self.seconds = min(self.seconds, seconds / len(views))
        self.outputs += [logits] * keep

    def pace(self) -> float:
        """Seconds a view."""
        return self.seconds

    def cost(self, plain: "_Trial") -> tuple[float, float, float]:
        """Mean KL to plain float32 at T = 1 and 4, in nats, and the share of flips of the first class."""
        if self.failure or not all(np.isfinite(said).all() for said in self.outputs):
            return float("inf"), float("inf"), 1.0
        sums = measure_fidelity(np.concatenate(plain.outputs), np.concatenate(self.outputs))
        return sums["kl_1"] / sums["rows"], sums["kl_4"] / sums["rows"], sums["flips"] / sums["rows"]

    def compared(self, plain: "_Trial") -> PrecisionRecord:
        """What there is to write down."""
        return PrecisionRecord(
            self.inference.is_folded, self.inference.is_compiled, sum(map(len, self.outputs)), *self.cost(plain)
        )

    def is_worth_it(self, plain: "_Trial", tolerance: float) -> bool:
        """Whether it is faster than plain float32, and says the same within the tolerance, in nats."""
        return self.seconds * _WORTH < plain.seconds and max(self.cost(plain)[:2]) <= tolerance


def resume_precision(
    config: CacheConfig, previous: InferenceSettings | None, teacher: PreparedModel, taps: tuple[str, ...]
) -> ChosenPrecision | None:
    """As a cache in the folder was begun: a timing does not change it half-way. None where there is nothing begun.

    A precision that is asked for by name stays: another one there is refused later, by name.
    """
    if previous is None:
        return None
    precision = previous.precision if config.precision == "auto" else config.precision
    fold = previous.record is not None and previous.record.folded
    return ChosenPrecision(restore_inference(teacher, taps, precision, fold), previous.record, is_resumed=True)


def choose_precision(
    config: CacheConfig, probe: TrialViews, teacher: PreparedModel, taps: tuple[str, ...], console: Console
) -> ChosenPrecision:
    """For a new cache. Plain float32 is the teacher as it is, to the last bit, and asks nothing; bfloat16 is folded.

    auto is the fastest of bfloat16 and float32, both with batch norm folded, and plain float32, that is within the
    tolerance at T = 1 and at T = 4: what is worth learning from a teacher is beside its first class, which only the
    higher temperature shows. What is taken is said with its cost, and written down.
    """
    plain = _Trial(TeacherInference(teacher, taps))
    if config.precision == "float32" and not config.compile:
        return ChosenPrecision(plain.inference)
    others = [_Trial(a) for a in _list_faster(config, teacher, taps)]
    batches = probe.render()
    _time_trials([plain, *others], batches)
    if config.precision == "auto":
        best = min(filter(lambda t: t.is_worth_it(plain, config.tolerance), others), key=_Trial.pace, default=plain)
    else:
        best = (others or [plain])[0]
        if max(best.cost(plain)) == float("inf"):
            why = best.failure or "its logits are not finite"
            raise CacheError(f"--precision {config.precision}: the teacher cannot be asked so ({make_printable(why)})")
    if config.compile:
        best = _try_compiled(best, plain, probe, batches, console)
    arithmetic = best.compared(plain) if best is not plain else None
    if config.precision != "float32" or arithmetic:
        _print_choice(best, plain, others, config, console)
    return ChosenPrecision(best.inference, arithmetic)


def restore_precision(
    record: dict[str, Any], teacher: PreparedModel, taps: tuple[str, ...], probe: TrialViews, console: Console
) -> ChosenPrecision:
    """As another rank has chosen: the inverse of Chosen.record."""
    answering = restore_inference(teacher, taps, record["precision"], record["folded"])
    if record["compiled"]:
        compile_teacher(answering, probe, console)
    return ChosenPrecision(answering, parse_precision_record(record["arithmetic"]), record["begun"])


def compile_teacher(answering: TeacherInference, probe: TrialViews, console: Console) -> bool:
    """Compile, or say in one line why not."""
    console.print("compiling the teacher, 5 to 25 s")
    try:
        answering.compile(probe.render()[0], probe.batch_rows)
    except Exception as error:  # no compiler, or a network that it cannot take: whatever it raises, there is a way
        why = str(error).strip().splitlines() or [""]
        console.print(f"not compiled, it goes on as it is: {type(error).__name__}: {make_printable(why[0], 120)}")
        return False
    return True


def _list_faster(config: CacheConfig, teacher: PreparedModel, taps: tuple[str, ...]) -> Iterator[TeacherInference]:
    """What is tried beside plain float32."""
    if config.precision != "float32":
        yield TeacherInference(teacher, taps, "bfloat16", fold=True)
    if config.precision == "auto":
        folded = TeacherInference(teacher, taps, "float32", fold=True)
        if folded.is_folded:
            yield folded


def _time_trials(trials: list[_Trial], batches: list[torch.Tensor]) -> None:
    """Every trial about every batch, in turns, so that a busy moment meets all; again while that is quick."""
    for turn in range(_TURNS):
        begun = time.monotonic()
        for views in batches:
            for trial in trials:
                trial.run(views, keep=turn == 0)
        if time.monotonic() - begun > _QUICK:
            return


def time_inference(answering: TeacherInference, views: torch.Tensor) -> tuple[NDArray[np.float32], float]:
    """logits float32 [B, K], and the seconds that they took."""
    with answering.open() as answer:
        begun = time.perf_counter()
        logits = answer(views.to(answering.device))[0].cpu()
        return logits.numpy(), time.perf_counter() - begun


def _try_compiled(
    best: _Trial, plain: _Trial, probe: TrialViews, batches: list[torch.Tensor], console: Console
) -> _Trial:
    """The same compiled, where that works and is faster and not another function; the trial as it was elsewhere."""
    a, config = best.inference, probe.config
    trial = _Trial(TeacherInference(a.teacher, a.taps, a.precision, a.is_folded))
    if not compile_teacher(trial.inference, probe, console):
        return best
    again = _Trial(a)  # in turns with the other: what it took before, it took on a machine that was less busy
    _time_trials([trial, again], batches)
    if max(trial.cost(plain)) == float("inf"):
        console.print(f"not compiled: {make_printable(trial.failure or 'its logits are not finite')}")
        return best
    found = trial.compared(plain)
    if config.precision == "auto" and max(found.kl_1, found.kl_4) > config.tolerance:
        console.print(f"not compiled: {found.describe()}, more than --tolerance {config.tolerance:g}")
    elif trial.pace() >= again.pace():
        console.print(f"not compiled: {1 / trial.pace():,.0f} images a second, {1 / again.pace():,.0f} as it was")
    else:
        return trial
    return best


def _print_choice(best: _Trial, plain: _Trial, others: list[_Trial], config: CacheConfig, console: Console) -> None:
    """One line: what was chosen, what it costs, and what it brings."""
    pace = f"{1 / best.pace():,.0f} images a second"
    if best is plain:
        tried = "; ".join(
            f"{t.inference.precision}: {make_printable(t.failure)}"
            if t.failure
            else f"{t.inference.precision} {1 / t.pace():,.0f} a second, KL {max(t.cost(plain)[:2]):.1e}"
            for t in others
        )
        return console.print(f"precision: float32, the teacher as it is, {pace}; not taken: {tried or 'nothing else'}")
    console.print(
        f"precision: {best.inference.precision}, {best.compared(plain).describe()};"
        f" {pace} instead of {1 / plain.pace():,.0f}"
    )
