"""Choosing the numeric precision of the teacher: tried on some of its own views, compared with plain float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from softcache.base.errors import CacheError, make_printable
from softcache.data.tasks import CLASSES
from softcache.pipeline.cache.existing import InferenceSettings
from softcache.pipeline.cache.manifest import PrecisionRecord
from softcache.pipeline.cache.manifest_reader import parse_precision_record
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import CacheConfig
from softcache.stages.cli.console import Console

from .inference import TeacherInference, restore_inference
from .trials import Trial, TrialViews, run_trials


@dataclass(frozen=True)
class ChosenPrecision:
    """How the teacher is run for a cache.

    Attributes:
        inference: The teacher and the way in which it is run.
        precision_record: This way and its cost, for the manifest; None where the teacher is run simply in its
            precision.
        is_resumed: Whether an existing cache decided it.
    """

    inference: TeacherInference
    precision_record: PrecisionRecord | None = None
    is_resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the choice as plain JSON values, from which `restore_precision` makes it again on another rank."""
        return {
            "precision": self.inference.precision,
            "folded": self.inference.is_folded,
            "compiled": self.inference.is_compiled,
            "arithmetic": self.precision_record.to_json() if self.precision_record else None,
            "begun": self.is_resumed,
        }


def resume_precision(
    config: CacheConfig,
    previous: InferenceSettings | None,
    teacher: PreparedModel,
    taps: tuple[str, ...],
    task: str = CLASSES,
) -> ChosenPrecision | None:
    """Run the teacher as for the rows that a cache has already, so that a timing cannot change it half-way.

    A precision that the command names is kept; the writer refuses it where it is not that of the cache.

    Args:
        config: Options of the command.
        previous: How the rows of the cache were computed; None where there are none.
        teacher: In eval mode, on its device.
        taps: Layers whose outputs are written.
        task: What the teacher predicts, see data/tasks.py.

    Returns:
        The choice; None where there are no rows yet.

    Raises:
        CacheError: Batch norm was folded then, and cannot be folded now without changing the outputs.
    """
    if previous is None:
        return None
    precision = previous.precision if config.precision == "auto" else config.precision
    fold = previous.record is not None and previous.record.folded
    return ChosenPrecision(
        restore_inference(teacher, taps, precision, fold, config.outputs, task), previous.record, is_resumed=True
    )


def choose_precision(
    config: CacheConfig, trial_views: TrialViews, teacher: PreparedModel, taps: tuple[str, ...], console: Console
) -> ChosenPrecision:
    """Choose how to run the teacher for a new cache.

    `float32` is the teacher as it is, to the last bit, and needs no trial. `bfloat16` is run with batch norm folded.
    `auto` is the fastest of bfloat16 and float32, both with batch norm folded, and plain float32, among those whose KL
    is within the tolerance at T = 1 and at T = 4; of another task than classes, whose cost, see PrecisionRecord.
    Both are needed: what a student learns from soft targets lies in the classes below the first one, and only the
        higher temperature shows those.

    Args:
        config: Options of the command; precision, compile and tolerance are read.
        trial_views: Views to try it on.
        teacher: In eval mode, on its device.
        taps: Layers whose outputs are written.
        console: Prints the choice and its cost.

    Raises:
        CacheError: The teacher fails in the precision that the command names, or its logits are not finite.
    """
    task = trial_views.transfer_set.task
    plain = Trial(TeacherInference(teacher, taps, outputs=config.outputs, task=task))
    if config.precision == "float32" and not config.compile:
        return ChosenPrecision(plain.inference)
    candidates = [Trial(inference) for inference in _list_candidates(config, teacher, taps, task)]
    batches = trial_views.render()
    run_trials([plain, *candidates], batches)
    if config.precision == "auto":
        preferable = [trial for trial in candidates if trial.is_preferable(plain, config.tolerance)]
        best = min(preferable, key=lambda trial: trial.seconds, default=plain)
    else:
        best = candidates[0] if candidates else plain
        if best.problem:
            raise CacheError(
                f"the teacher cannot be run with --precision {config.precision}: {make_printable(best.problem)}"
            )
    if config.compile:
        best = _try_compiled(best, plain, trial_views, batches, console)
    precision_record = best.make_record(plain) if best is not plain else None
    if config.precision != "float32" or precision_record:
        _print_choice(best, plain, candidates, precision_record, console)
    return ChosenPrecision(best.inference, precision_record)


def restore_precision(
    record: dict[str, Any], teacher: PreparedModel, taps: tuple[str, ...], trial_views: TrialViews, console: Console
) -> ChosenPrecision:
    """Run the teacher as the first rank has chosen; the inverse of `ChosenPrecision.to_json`.

    Args:
        record: What `to_json` returned.
        teacher: In eval mode, on its device.
        taps: Layers whose outputs are written.
        trial_views: Views to compile it with, where the first rank has compiled it.
        console: Prints that it is being compiled.
    """
    outputs, task = trial_views.config.outputs, trial_views.transfer_set.task
    inference = restore_inference(teacher, taps, record["precision"], record["folded"], outputs, task)
    if record["compiled"]:
        compile_teacher(inference, trial_views, console)
    return ChosenPrecision(inference, parse_precision_record(record["arithmetic"]), record["begun"])


def compile_teacher(inference: TeacherInference, trial_views: TrialViews, console: Console) -> bool:
    """Compile a teacher, or load what was compiled before; print in one line which of these, and why it failed.

    Returns:
        Whether it was compiled. If not, it runs as before.
    """
    try:
        inference.compile(trial_views.render()[0], trial_views.batch_rows, console.print)
    except Exception as error:  # no compiler, or a network that it cannot compile: the teacher runs without
        reason = make_printable((str(error).strip().splitlines() or [""])[0], 120)
        console.print(f"not compiled, the teacher runs as it is: {type(error).__name__}: {reason}")
        return False
    return True


def _list_candidates(
    config: CacheConfig, teacher: PreparedModel, taps: tuple[str, ...], task: str
) -> Iterator[TeacherInference]:
    """Yield the ways to run the teacher that are compared with plain float32."""
    if config.precision != "float32":
        yield TeacherInference(teacher, taps, "bfloat16", fold=True, outputs=config.outputs, task=task)
    if config.precision == "auto":
        folded = TeacherInference(teacher, taps, "float32", fold=True, outputs=config.outputs, task=task)
        if folded.is_folded:
            yield folded


def _try_compiled(
    best: Trial, plain: Trial, trial_views: TrialViews, batches: list[torch.Tensor], console: Console
) -> Trial:
    """Return the best trial compiled, if it can be compiled, is faster so and within the tolerance; else as it was."""
    inference, config = best.inference, trial_views.config
    compiled = Trial(
        TeacherInference(
            inference.teacher,
            inference.taps,
            inference.precision,
            fold=inference.is_folded,
            outputs=inference.outputs,
            task=inference.task,
        )
    )
    if not compile_teacher(compiled.inference, trial_views, console):
        return best
    uncompiled = Trial(inference)  # timed again, in turns with the other: the machine may have been less busy before
    run_trials([compiled, uncompiled], batches)
    if compiled.problem:
        console.print(f"not compiled: {make_printable(compiled.problem)}")
        return best
    record = compiled.make_record(plain)
    if config.precision == "auto" and record.cost > config.tolerance:
        console.print(f"not compiled: {record.describe()}, more than --tolerance {config.tolerance:g}")
        return best
    if compiled.seconds >= uncompiled.seconds:
        console.print(f"not compiled: {compiled.rate:,.0f} images a second, {uncompiled.rate:,.0f} without")
        return best
    return compiled


def _print_choice(
    best: Trial, plain: Trial, candidates: list[Trial], precision_record: PrecisionRecord | None, console: Console
) -> None:
    """Print in one line what was chosen, what it costs and how fast it is."""
    if precision_record:
        return console.print(
            f"precision: {best.inference.precision}, {precision_record.describe()};"
            f" {best.rate:,.0f} images a second instead of {plain.rate:,.0f}"
        )
    rejected = []
    for trial in candidates:
        if trial.failure:
            rejected.append(f"{trial.inference.precision}: {make_printable(trial.failure)}")
        else:
            cost = trial.problem or trial.make_record(plain).format_cost()
            rejected.append(f"{trial.inference.precision} {trial.rate:,.0f} a second, {cost}")
    console.print(
        f"precision: float32, the teacher as it is, {plain.rate:,.0f} images a second;"
        f" rejected: {'; '.join(rejected) or 'none'}"
    )
