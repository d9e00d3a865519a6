"""Which student of a finished run is meant, and how it is opened here."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import program_name
from softcache.stages.runs.folder import read_config, read_json


@dataclass(frozen=True)
class ExportedRun:
    """folder: that was named; own: where student.pt lies; settings: of this one seed, with where things lie here;
    begun: those of the whole run; why: the seed was chosen, in words."""

    folder: Path
    seed_folder: Path
    config: StudentConfig
    run_settings: StudentConfig
    reason: str

    @property
    def baseline(self) -> Path:
        """The weights of the same student without a teacher, where they were trained."""
        return self.seed_folder / "baseline/baseline.pt"


def select_student(folder: Path, **here: Any) -> ExportedRun:
    """The one student of a run; of several seeds the best, or the one whose folder is named. here: settings that hold
    in place of the run's. Raises UsageError or CacheError for what is no finished run of a student."""
    named = re.fullmatch(r"seed-(\d+)", folder.name)
    root = folder.parent if named and not (folder / "settings.json").is_file() else folder
    kept = read_json(root / "settings.json")
    if "cache" not in kept:
        raise UsageError(f"'{root}' is no run of a student, and a teacher's becomes a cache first (teacher-cache)")
    begun = read_config(root, StudentConfig)
    result = root / "result.json"
    if not result.is_file():
        raise CacheError(f"'{root}' is not finished: go on with  {program_name()} student --resume --out {root}")
    seed, why = begun.seed, "the only one"
    if begun.seeds > 1:
        seed, why = (int(named[1]), "as named") if named and root != folder else _best(result, begun)
    if not begun.seed <= seed < begun.seed + begun.seeds:
        raise UsageError(f"'{root}' has no seed {seed}: {begun.seed} to {begun.seed + begun.seeds - 1}")
    own = root if begun.seeds == 1 else root / f"seed-{seed}"
    if not (own / "student.pt").is_file():
        raise CacheError(f"'{own}' has no student.pt, though its run is finished: put it back from a copy")
    return ExportedRun(folder, own, replace(begun, out=str(root), seed=seed, seeds=1, **here), begun, why)


def _best(path: Path, begun: StudentConfig) -> tuple[int, str]:
    """The seed with the best accuracy on validation, the first of equals; without labels there, by agreement."""
    result = read_json(path)
    try:
        of_seeds = {int(one["seed"]): one["student"]["val"] for one in result["seeds"]}
        by = "accuracy" if all("accuracy" in figures for figures in of_seeds.values()) else "agreement"
        found = {seed: float(figures[by]) for seed, figures in of_seeds.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CacheError(f"'{path}' is damaged: it has no validation figures of each seed") from None
    if set(found) != set(range(begun.seed, begun.seed + begun.seeds)):
        raise CacheError(f"'{path}' is damaged: it is of seeds {sorted(found)[:4]}, not of the run's {begun.seeds}")
    best = max(sorted(found), key=lambda seed: found[seed])
    return best, f"the best of {len(found)} by {by} on validation ({found[best]:.4f})"
