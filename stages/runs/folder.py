"""Folders of runs: settings.json, result.json, metrics.jsonl and the weights."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import make_folder, publish_json, remove_stale_files
from softcache.base.lock import LOCK, hold_lock
from softcache.pipeline.cache.identity import find_differences
from softcache.stages.cli.configs import StudentConfig, TeacherConfig, TrainingOptions
from softcache.stages.cli.extras import require_extra
from softcache.stages.distributed.ranks import barrier, broadcast_from_first, is_first

from .logits import TEACHER_LOGITS

# Settings that say where a run lies and what it prints and keeps besides: with others it is the same run.
IGNORED_OPTIONS = ("out", "json", "resume", "tensorboard")
S = TypeVar("S", TeacherConfig, StudentConfig)


def open_run(config: S, said: set[str], default: str) -> tuple[S, Path]:
    """The folder of a run and the settings it goes by. Nothing is written yet: see begin_run.

    A new run gets a new folder (default-1, default-2 … when --out does not name one). With --resume the
    settings are those the run was begun with, and what the command says besides must agree with them.
    Raises UsageError for a folder that holds something else. Of several ranks the first looks, for all.
    """
    record = broadcast_from_first(lambda: asdict(_resolve_run(config, said, default)))
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    config = replace(config, **plain)
    return config, Path(config.out)


def _resolve_run(config: S, said: set[str], default: str) -> S:
    parse_milestones(config)
    if config.resume:
        kept = _resume_config(config, said)
        check_installed(kept)
        return kept
    check_installed(config)
    folder = Path(config.out) if config.out else find_free_folder(default)
    if folder.exists() and (not folder.is_dir() or any(not _is_stale(path) for path in folder.iterdir())):
        other = _describe_other_run(folder, config)
        raise UsageError(f"'{folder}' exists{other}: continue it with --resume, or choose another --out")
    return replace(config, out=str(folder))


def parse_milestones(config: TrainingOptions) -> list[float]:
    """The shares of the training at which the schedule goes down. Raises UsageError for what is none."""
    try:
        shares = [float(text) for text in config.milestones.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < 1 for share in shares):
        raise UsageError(f"--milestones {config.milestones}: shares of the training, such as 0.5,0.75")
    return shares


def check_installed(config: TeacherConfig | StudentConfig) -> None:
    """Raise UsageError for an optional part that is asked for and is not there, before anything is done."""
    if config.tensorboard:
        require_extra("--tensorboard wants", "tensorboard", "tensorboard")


def _is_stale(path: Path) -> bool:
    """Whether a process that was killed before it began a run left this: no more than a lock, or half its settings."""
    return path.name == LOCK or (path.name.startswith(".settings.json.") and path.suffix == ".tmp")


def find_unfinished_runs(config: TeacherConfig | StudentConfig, folder: Path) -> list[Path]:
    """Other runs with the same settings that were stopped, beside a folder whose name was chosen for this one."""
    found = []
    for path in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/settings.json")):
        if path.parent == folder or (path.parent / "result.json").exists():
            continue
        try:
            kept = read_json(path)
        except CacheError:  # damaged: that is for those who go on with it
            continue
        if not _list_differences(kept, config):
            found.append(path.parent)
    return found


@contextmanager
def start_run(config: TeacherConfig | StudentConfig, folder: Path) -> Iterator[None]:
    """Make the folder of a run, hold it, and publish its settings.json, once all that can be refused has been checked.

    Raises CacheError when another process holds it. Of several ranks the first does all this; the others wait for it.
    """
    if not is_first():
        barrier()
        yield
        return
    make_folder(folder)
    with hold_lock(folder):
        remove_stale_files(folder, ("settings.json", "result.json", "cache.json", TEACHER_LOGITS))
        if not config.resume:
            if (folder / "settings.json").exists():
                raise UsageError(f"'{folder}' was begun by another process just now: choose another --out")
            publish_json(folder / "settings.json", asdict(config))
        barrier()
        yield


def check_same_config(folder: Path, config: StudentConfig) -> None:
    """Raise CacheError, naming what differs, when a run was begun with other settings than these."""
    kept = asdict(read_config(folder, type(config)))
    if differ := _list_differences(json.loads(json.dumps(kept)), config):
        raise CacheError(f"'{folder}' was begun with other settings ({'; '.join(differ[:4])}): choose another --out")


def find_free_folder(default: str) -> Path:
    """runs/default-1, -2 …: the first that is not there."""
    numbers = range(1, 1_000_000)
    return next(p for n in numbers if not (p := Path("runs") / f"{default}-{n}").exists())


def _resume_config(config: S, said: set[str]) -> S:
    if not config.out:
        raise UsageError("--resume wants the run's folder: --resume --out runs/…")
    folder = Path(config.out)
    kept = read_config(folder, type(config))
    own = {"out", "resume", "json", "device", "data_root", "workers", "cache", "data", "tensorboard"}
    wrong = [
        f"--{n.replace('_', '-')}"
        for n in sorted(said - own)
        if _plain(getattr(config, n)) != _plain(getattr(kept, n))
    ]
    if wrong:
        raise UsageError(f"'{folder}' was begun with another {', '.join(wrong)}: leave out what is not to change")
    here = {n: getattr(config, n) for n in own & {f.name for f in fields(config)} if n in said}
    return replace(kept, **here)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _describe_other_run(folder: Path, config: S) -> str:
    path = folder / "settings.json"
    if not path.is_file():
        return " and is no run"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return " and its settings.json is damaged"
    differ = _list_differences(kept, config)
    return f", begun with other settings ({'; '.join(differ[:4])})" if differ else ", begun with the same settings"


def _list_differences(kept: Any, config: TeacherConfig | StudentConfig) -> list[str]:
    """The settings in which a run differs from what is asked, in words; where it lies and what it prints aside."""
    asked = json.loads(json.dumps(asdict(config)))
    return [f"{n} {a} there, {b} asked" for n, a, b in find_differences(kept, asked) if n not in IGNORED_OPTIONS]


def read_config(folder: Path, kind: type[S]) -> S:
    """The settings of a run. Raises UsageError when it is none, CacheError for what no command could have given."""
    path = folder / "settings.json"
    record = read_json(path, {f.name for f in fields(kind)})
    if wrong := [f"{f.name} {record[f.name]!r}" for f in fields(kind) if not _is_valid_value(f, record[f.name])]:
        raise CacheError(f"'{path}' is damaged: {make_printable(', '.join(wrong))}")
    return kind(**record)


def _is_valid_value(field: Field[Any], value: Any) -> bool:
    """Whether a value of settings.json is the default, or one that the command line would have taken."""
    kinds = (int, float) if isinstance(field.default, float) else (type(field.default),)
    if type(value) not in kinds or (isinstance(value, tuple) and not all(isinstance(v, str) for v in value)):
        return False
    least, most = field.metadata.get("least", -math.inf), field.metadata.get("most", math.inf)
    number = not isinstance(value, int | float) or (least <= value <= most and math.isfinite(value))
    return bool(value == field.default or (number and value in field.metadata.get("choices", (value,))))


def read_json(path: Path, known: set[str] | None = None) -> dict[str, Any]:
    """A record from a run's folder. Raises UsageError when it is not there, CacheError when it is damaged."""
    if not path.is_file():
        raise UsageError(f"'{path.parent}' is no run: it has no {path.name}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CacheError(f"'{path}' is damaged: it is no JSON") from None
    if not isinstance(record, dict):
        raise CacheError(f"'{path}' is damaged: it is no record")
    if known is not None and set(record) != known:
        raise CacheError(f"'{path}' is not of this program's making: {sorted(set(record) ^ known)[:4]}")
    return {k: tuple(v) if isinstance(v, list) and known else v for k, v in record.items()}


def read_fingerprints(record: dict[str, Any], path: Path) -> list[str]:
    """Of the caches that a run was trained from, in its order. record: cache.json, which lies at path. Raises
    CacheError where it names none."""
    try:
        return [str(one["fingerprint"]) for one in (record, *record.get("others", ()))]
    except (KeyError, TypeError):
        raise CacheError(f"'{path}' is damaged: it names no fingerprint") from None
