"""The folder of a run: settings.json, result.json, metrics.jsonl and the weights."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import make_folder, publish_json, read_input_file, remove_stale_files
from softcache.base.lock import LOCK, hold_lock
from softcache.base.packages import require_extra
from softcache.pipeline.cache.identity import find_differences
from softcache.stages.cli.configs import StudentConfig, TeacherConfig
from softcache.stages.cli.new_folders import make_new_folder
from softcache.stages.cli.option_groups import TrainingOptions
from softcache.stages.cli.options import check_value
from softcache.stages.cli.typed_command import format_resume_command
from softcache.stages.distributed.ranks import barrier, broadcast_from_first, is_first

from .logits import TEACHER_LOGITS
from .named_code import require_named_code, require_named_data, require_named_losses

PASSED_FILE = "passed.json"  # digests of what a caller in Python passed as objects
# Options that do not change what a run computes: where its folder is, what it prints, and extra files.
IGNORED_OPTIONS = ("out", "json", "resume", "tensorboard", "log_every", "index", "rehash")
# Options that may differ when a run is resumed, because they depend on the machine.
RESUME_OPTIONS = {*IGNORED_OPTIONS, "device", "data_root", "workers", "cache", "data", "init"}
# Options that the first runs did not have: a run records them where they are not at their default.
_LATER_OPTIONS = ("width",)
S = TypeVar("S", TeacherConfig, StudentConfig)


def open_run(config: S, explicit_options: set[str], default: str) -> tuple[S, Path]:
    """Find the folder and the settings of a run. No file is written; `start_run` does that.

    A new run gets a new folder. Without --out it is made here, so that no other command takes it. With --resume the
    settings are those that the run was started with. Rank 0 does this for all ranks.

    Args:
        config: the options of the command.
        explicit_options: names of the options on the command line; with --resume they must agree with the run's.
        default: name of the folder without --out: runs/default-1, runs/default-2 …, see `make_new_folder`.

    Returns:
        The settings, with `out` set, and the folder.

    Raises:
        UsageError: for a folder that is not empty, or options that differ from those of the run to resume.
        CacheError: for damaged settings.
    """
    record = broadcast_from_first(lambda: asdict(_resolve_run(config, explicit_options, default)))
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
    config = replace(config, **settings)
    return config, Path(config.out)


def _resolve_run(config: S, explicit_options: set[str], default: str) -> S:
    parse_milestones(config)
    if config.resume:
        config = _resume_config(config, explicit_options)
        check_installed(config)
        return config
    check_installed(config)
    folder = Path(config.out) if config.out else make_new_folder(default)
    if folder.exists() and (not folder.is_dir() or any(not _is_stale(path) for path in folder.iterdir())):
        raise UsageError(f"'{folder}' exists{_describe_existing_run(folder, config)}")
    return replace(config, out=str(folder))


def parse_milestones(config: TrainingOptions) -> list[float]:
    """Return the shares of the training, between 0 and 1, at which the step schedule lowers the learning rate.

    Raises:
        UsageError: for text that is no list of such numbers.
    """
    try:
        shares = [float(text) for text in config.milestones.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < 1 for share in shares):
        raise UsageError(f"--milestones {config.milestones}: shares of the training, such as 0.5,0.75")
    return shares


def check_installed(config: TeacherConfig | StudentConfig) -> None:
    """Raise UsageError for an option whose optional dependency is not installed."""
    if config.tensorboard:
        require_extra("--tensorboard wants", "tensorboard", "tensorboard")


def _is_stale(path: Path) -> bool:
    """Return whether a file is left from a process that was killed before its run started."""
    return path.name in (LOCK, PASSED_FILE) or (path.name.startswith(".settings.json.") and path.suffix == ".tmp")


def find_unfinished_runs(config: TeacherConfig | StudentConfig, folder: Path) -> list[Path]:
    """Find runs with the same settings that were stopped.

    Args:
        config: the settings.
        folder: a folder with a default name, such as runs/digits-mlp-8-2; only those with the same default name count.

    Returns:
        Their folders, without `folder`.
    """
    unfinished = []
    for path in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/settings.json")):
        if path.parent == folder or (path.parent / "result.json").exists():
            continue
        try:
            settings = read_json(path)
        except CacheError:  # damaged: reported when that run is resumed
            continue
        if not _list_differences(settings, config):
            unfinished.append(path.parent)
    return unfinished


@contextmanager
def start_run(config: TeacherConfig | StudentConfig, folder: Path) -> Iterator[None]:
    """Make the folder of a run, lock it and publish its settings.json. Check the options before this call.

    Rank 0 does this; the others wait for it.

    Args:
        config: the settings.
        folder: the run's folder.

    Raises:
        LockedError: when another process has the lock.
        UsageError: when another process has started a run in the folder.
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
                raise UsageError(f"'{folder}' was started by another process just now: choose another --out")
            publish_json(folder / "settings.json", to_settings(config))
        barrier()
        yield


def check_same_config(folder: Path, config: StudentConfig, may_differ: Collection[str] = ()) -> None:
    """Check that a run was started with these settings.

    Args:
        folder: the run's folder.
        config: the settings.
        may_differ: names of options that are not compared.

    Raises:
        CacheError: it was started with other settings; the message names the differences.
    """
    settings = asdict(read_config(folder, type(config)))
    config = replace(config, **{name: value for name, value in settings.items() if name in may_differ})
    if differences := _list_differences(json.loads(json.dumps(settings)), config):
        raise CacheError(
            f"'{folder}' was started with other settings ({'; '.join(differences[:4])}): choose another --out"
        )


def _resume_config(config: S, explicit_options: set[str]) -> S:
    """Return the settings of the run in --out, with the explicit options that may differ."""
    if not config.out:
        raise UsageError("--resume needs the run's folder: --resume --out runs/…")
    folder = Path(config.out)
    settings = read_config(folder, type(config))
    different = [
        f"--{name.replace('_', '-')}"
        for name in sorted(explicit_options - RESUME_OPTIONS)
        if _to_list(getattr(config, name)) != _to_list(getattr(settings, name))
    ]
    if different:
        raise UsageError(
            f"'{folder}' was started with another {', '.join(different)}: leave out what is not to change"
        )
    owner, losses = f"the run '{folder}'", _read_losses(asdict(settings))
    command = format_resume_command(_command_name(config), folder, settings.arch, losses, settings.data)
    explicit_data = config.data if "data" in explicit_options else ""
    require_named_data(settings.data, explicit_data, owner=owner, command=command)
    explicit_arch = config.arch if "arch" in explicit_options else ""
    require_named_code(settings.arch, explicit_arch, owner=owner, option="--arch", command=command)
    require_named_losses(losses, is_explicit="loss" in explicit_options, owner=owner, command=command)
    names = RESUME_OPTIONS & explicit_options & {f.name for f in fields(config)}
    return replace(settings, **{name: getattr(config, name) for name in names})


def _command_name(config: TeacherConfig | StudentConfig) -> str:
    return "teacher" if isinstance(config, TeacherConfig) else "student"


def _read_losses(settings: dict[str, Any]) -> tuple[str, ...]:
    """Return the losses of a student's settings; none for a teacher's, or where they are no list of texts."""
    losses = settings.get("loss", ())
    return tuple(losses) if isinstance(losses, list | tuple) and all(isinstance(x, str) for x in losses) else ()


def _to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _describe_existing_run(folder: Path, config: S) -> str:
    """Describe what a folder that is not empty contains, and what to do, for a message."""
    path = folder / "settings.json"
    if not path.is_file():
        return " and is no run: choose another --out"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return " and its settings.json is damaged: choose another --out"
    command = _command_name(config)
    if not isinstance(settings, dict) or ("cache" in settings) != (command == "student"):
        return f" and is no run of a {command}: choose another --out"
    differences = _list_differences(settings, config)
    description = f"other settings ({'; '.join(differences[:4])})" if differences else "the same settings"
    arch, data = (str(settings.get(name, "")) for name in ("arch", "data"))
    resume = format_resume_command(command, folder, arch, _read_losses(settings), data)
    return f", started with {description}: choose another --out, or continue it with  {resume}"


def _list_differences(settings: Any, config: TeacherConfig | StudentConfig) -> list[str]:
    """List the differences between the settings of a run and those of the command, without IGNORED_OPTIONS."""
    requested = json.loads(json.dumps(asdict(config)))
    if isinstance(settings, dict):
        settings = add_new_options(settings, type(config))
    return [
        f"{name} {a} there, {b} asked"
        for name, a, b in find_differences(settings, requested)
        if name not in IGNORED_OPTIONS
    ]


def read_config(folder: Path, kind: type[S]) -> S:
    """Read the settings of a run.

    Args:
        folder: the run's folder.
        kind: TeacherConfig or StudentConfig.

    Raises:
        UsageError: for a folder without settings.json.
        CacheError: for names or values that the command line would not have accepted.
    """
    path = folder / "settings.json"
    record = add_new_options(read_json(path), kind)
    if missing := sorted({f.name for f in fields(kind)} - record.keys()):
        raise CacheError(f"'{path}' is damaged: it has no {', '.join(missing[:4])}")
    if unknown := sorted(record.keys() - {f.name for f in fields(kind)}):
        raise CacheError(
            f"'{path}' has options that this version does not know: {make_printable(', '.join(unknown[:4]))}."
            " Use the version of softcache that wrote it"
        )
    record = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    if invalid := [f"{f.name} {record[f.name]!r}" for f in fields(kind) if not _is_valid_value(f, record[f.name])]:
        raise CacheError(f"'{path}' is damaged: {make_printable(', '.join(invalid))}")
    return kind(**record)


def add_new_options(settings: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return settings that an older version recorded, completed by the defaults of the options added since.

    An option whose default is that of a data set is not completed: every version has recorded its value.

    Args:
        settings: {option: value} as read from JSON.
        kind: the config class of the command.
    """
    defaults = {
        f.name: list(f.default) if isinstance(f.default, tuple) else f.default
        for f in fields(kind)
        if not f.metadata.get("by_recipe")
    }
    return {**defaults, **settings}


def to_settings(config: TeacherConfig | StudentConfig) -> dict[str, Any]:
    """Return {option: value} as it is recorded: options of _LATER_OPTIONS only where they are not at their default."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in _LATER_OPTIONS or getattr(config, f.name) != f.default
    }


def _is_valid_value(field: Field[Any], value: Any) -> bool:
    """Return whether a value of settings.json is the default, or one that the command line would have accepted."""
    try:
        check_value(field, value)
    except UsageError:
        return False
    return True


def read_json(path: Path, keys: set[str] | None = None) -> dict[str, Any]:
    """Read a JSON object from a run's folder.

    Args:
        path: the file.
        keys: the keys that it must have; None for any.

    Raises:
        UsageError: for a file that does not exist.
        CacheError: for a file that is no JSON object, or has other keys.
    """
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder '{make_printable(path.parent)}'")
    if not path.exists():
        raise UsageError(f"'{path.parent}' is no run: it has no {path.name}")
    try:
        record = json.loads(read_input_file(path).decode())
    except (ValueError, RecursionError):
        raise CacheError(f"'{path}' is damaged: it is no JSON") from None
    if not isinstance(record, dict):
        raise CacheError(f"'{path}' is damaged: it is no JSON object")
    if keys is not None and set(record) != keys:
        raise CacheError(
            f"'{path}' has other keys than this version writes: {sorted(set(record) ^ keys)[:4]} missing or unknown"
        )
    return record


def read_fingerprints(record: dict[str, Any], path: Path) -> list[str]:
    """Return the fingerprints of the caches that a run was trained from, in its order.

    Args:
        record: the content of cache.json.
        path: of that file, for the message.

    Raises:
        CacheError: for a record without a fingerprint.
    """
    try:
        return [str(cache["fingerprint"]) for cache in (record, *record.get("others", ()))]
    except (KeyError, TypeError):
        raise CacheError(f"'{path}' is damaged: it names no fingerprint") from None
