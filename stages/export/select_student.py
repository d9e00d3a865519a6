"""Which student of a finished run is exported, and the configuration with which its run is opened on this machine."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.losses import remove_custom_losses
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER, TASK_FIGURES
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.typed_command import format_resume_command
from softcache.stages.runs.figures import get_task, list_columns
from softcache.stages.runs.folder import read_config, read_json
from softcache.stages.student.student_input import use_recorded_input


@dataclass(frozen=True)
class ExportedRun:
    """One student of a finished run.

    Attributes:
        folder: The folder named on the command line; the files are written to it.
        seed_folder: The folder of student.pt.
        config: The configuration of this one seed, with the places of cache and data on this machine, without losses
            that are code of the user.
        run_config: The configuration of the run, as it was trained.
        reason: Why this seed was selected.
    """

    folder: Path
    seed_folder: Path
    config: StudentConfig
    run_config: StudentConfig
    reason: str

    @property
    def baseline(self) -> Path:
        """Where the weights of the baseline are, if one was trained."""
        return self.seed_folder / "baseline/baseline.pt"


def select_student(folder: Path, **overrides: Any) -> ExportedRun:
    """Select a student: the only one of a run, else the seed whose folder is named, else the best seed.

    Args:
        folder: Of a run, or of one seed in it (`runs/r/seed-3`).
        **overrides: Options that replace those of the run.

    Raises:
        UsageError: The folder is not a student's run, or the run does not have the seed.
        CacheError: The run is not finished, or is damaged.
    """
    seed_name = re.fullmatch(r"seed-(\d+)", folder.name)
    root = folder.parent if seed_name and not (folder / "settings.json").is_file() else folder
    if "cache" not in read_json(root / "settings.json"):
        raise UsageError(
            f"'{root}' is not the run of a student: export takes a student's run; a teacher's run is first made into a"
            " cache, with teacher-cache"
        )
    run_config = read_config(root, StudentConfig)
    result = root / "result.json"
    if not result.is_file():
        command = format_resume_command("student", root, run_config.arch, run_config.loss, run_config.data)
        raise CacheError(f"'{root}' is not finished: continue it with  {command}")
    if run_config.seeds == 1:
        seed, reason = run_config.seed, "the only one"
    elif seed_name and root != folder:
        seed, reason = int(seed_name[1]), "as named"
    else:
        seed, reason = _select_best_seed(result, run_config)
    seeds = range(run_config.seed, run_config.seed + run_config.seeds)
    if seed not in seeds:
        raise UsageError(f"'{root}' has no seed {seed}: its seeds are {seeds[0]} to {seeds[-1]}")
    seed_folder = root if run_config.seeds == 1 else root / f"seed-{seed}"
    if not (seed_folder / "student.pt").is_file():
        raise CacheError(f"'{seed_folder}' has no student.pt, though its run is finished: restore it from a copy")
    # Code of the user among the losses is not imported: a student is exported without them.
    losses = remove_custom_losses(run_config.loss, get_task(read_json(result)))
    config = replace(run_config, out=str(root), seed=seed, seeds=1, loss=losses, **overrides)
    config = use_recorded_input(config, seed_folder)
    return ExportedRun(folder=folder, seed_folder=seed_folder, config=config, run_config=run_config, reason=reason)


def read_thresholds(seed_folder: Path, labels: int) -> tuple[float, ...]:
    """Read the thresholds of a student of several labels; 0.5 each where its result.json has none.

    Args:
        seed_folder: The folder of student.pt and result.json.
        labels: K.

    Returns:
        K probabilities.

    Raises:
        CacheError: They are not K numbers from 0 to 1.
    """
    path = seed_folder / "result.json"
    student = read_json(path).get("student")
    values = student.get("thresholds", [0.5] * labels) if isinstance(student, dict) else None
    thresholds = tuple(values) if isinstance(values, list) else ()
    if len(thresholds) != labels or not all(type(x) in (int, float) and 0 <= x <= 1 for x in thresholds):
        raise CacheError(f"'{path}' is damaged: its thresholds are not {labels} numbers from 0 to 1")
    return tuple(map(float, thresholds))


def _select_best_seed(path: Path, run_config: StudentConfig) -> tuple[int, str]:
    """Select the seed with the best validation figure, the first of equal ones.

    That is the main figure of the task, such as accuracy; without labels one that needs none, such as agreement.

    Args:
        path: Of the run's result.json.
        run_config: Of the run.

    Returns:
        The seed, and the reason.
    """
    result = read_json(path)
    try:
        validation = {int(record["seed"]): record["student"]["val"] for record in result["seeds"]}
        task = get_task(result)
        candidates = (TASK_FIGURES[task].main, *list_columns(task, has_labels=False))
        metric = next(x for x in candidates if all(metrics.get(x) is not None for metrics in validation.values()))
        values = {seed: float(metrics[metric]) for seed, metrics in validation.items()}
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise CacheError(f"'{path}' is damaged: it has no validation figures of each seed") from None
    if set(values) != set(range(run_config.seed, run_config.seed + run_config.seeds)):
        raise CacheError(
            f"'{path}' is damaged: it has seeds {sorted(values)[:4]}, and the run {run_config.seeds} seeds from"
            f" {run_config.seed} on"
        )
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = max(sorted(values), key=lambda seed: sign * values[seed])
    return best, f"the best of {len(values)} by {metric} on validation ({values[best]:.4f})"
