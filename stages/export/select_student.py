"""Which student of a finished run is exported, and the configuration with which its run is opened on this machine."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.losses import remove_custom_losses
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.typed_command import format_resume_command
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
    losses = remove_custom_losses(run_config.loss)
    config = replace(run_config, out=str(root), seed=seed, seeds=1, loss=losses, **overrides)
    config = use_recorded_input(config, seed_folder)
    return ExportedRun(folder=folder, seed_folder=seed_folder, config=config, run_config=run_config, reason=reason)


def _select_best_seed(path: Path, run_config: StudentConfig) -> tuple[int, str]:
    """Select the seed with the best validation accuracy, or agreement without labels; the first of equal ones.

    Args:
        path: Of the run's result.json.
        run_config: Of the run.

    Returns:
        The seed, and the reason.
    """
    result = read_json(path)
    try:
        validation = {int(record["seed"]): record["student"]["val"] for record in result["seeds"]}
        metric = "accuracy" if all("accuracy" in metrics for metrics in validation.values()) else "agreement"
        values = {seed: float(metrics[metric]) for seed, metrics in validation.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CacheError(f"'{path}' is damaged: it has no validation figures of each seed") from None
    if set(values) != set(range(run_config.seed, run_config.seed + run_config.seeds)):
        raise CacheError(
            f"'{path}' is damaged: it has seeds {sorted(values)[:4]}, and the run {run_config.seeds} seeds from"
            f" {run_config.seed} on"
        )
    best = max(sorted(values), key=lambda seed: values[seed])
    return best, f"the best of {len(values)} by {metric} on validation ({values[best]:.4f})"
