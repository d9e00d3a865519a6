"""Training the teacher of a cache first, where the command names no weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, CacheMismatchError, make_printable
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.pipeline.cache.existing import Complete, Unfinished, read_existing
from softcache.pipeline.cache.identity import format_differences, make_identity
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.runs.folder import read_json
from softcache.stages.teacher.command import describe_accuracy, fill_defaults, train_teacher
from softcache.stages.teacher.data import (
    FOLDER_OPTIONS,
    SPLIT_OPTIONS,
)

from .recorded_run import list_differences


def train_cache_teacher(config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, console: Console) -> str:
    """Train a teacher with the defaults of the data, in a folder beside the cache, unless it is there already.

    Where the folder holds another cache already, this is found before the training.

    Returns:
        The folder of its run.
    """
    teacher_config, is_started = make_teacher_config(config)
    folder = Path(teacher_config.out)
    if (folder / "result.json").is_file():
        console.print(f"no --weights: using the teacher in '{folder}'")
        return str(folder)
    _check_known_identity(config, transfer_set, views, teacher_config.arch)
    console.print(f"no --weights: training the teacher {teacher_config.arch} first, in '{folder}'")
    teacher_config = replace(teacher_config, resume=is_started)
    result = train_teacher(teacher_config, folder, console, advice="; WEIGHTS=… (--weights) skips it")
    seconds = format_duration(result["seconds"]["train"])
    console.print(f"teacher {teacher_config.arch}: {describe_accuracy(result)} in {seconds}")
    return str(folder)


def make_teacher_config(config: CacheConfig) -> tuple[TeacherConfig, bool]:
    """Return the options of the teacher that is trained for a cache, and whether its training was started before.

    Raises:
        CacheError: It was started with other options.
    """
    folder = Path(f"{config.out}-teacher")
    teacher_config = fill_defaults(
        TeacherConfig(
            data=config.data,
            data_root=config.data_root,
            index=config.index,
            arch=config.teacher,
            normalize=config.normalize or "data",
            output=config.output,
            device=config.device,
            workers=config.workers,
            out=str(folder),
            **{name: getattr(config, name) for name in (*SPLIT_OPTIONS, *FOLDER_OPTIONS)},
        )
    )
    is_started = (folder / "settings.json").is_file()
    if is_started:
        defaults = {name: getattr(TeacherConfig, name) for name in (*FOLDER_OPTIONS, "test_fraction")}
        recorded = defaults | read_json(folder / "settings.json")
        names = ("data", "arch", "normalize", *SPLIT_OPTIONS, *FOLDER_OPTIONS)
        if differences := list_differences(recorded, teacher_config, names):
            raise CacheError(
                f"the teacher in '{folder}' was trained with other options ({'; '.join(differences)}):"
                " name it with --weights, or choose another --out"
            )
    return teacher_config, is_started


def _check_known_identity(config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, arch: str) -> None:
    """Compare what is known of a cache before its teacher is trained with the cache in the folder.

    Raises:
        CacheMismatchError: Data, views, codec, precision or arch differ, or that cache is of weights that were named.
    """
    out = Path(config.out)
    identity: Any
    options: Any
    match read_existing(out):
        case Complete(manifest):
            identity, options = manifest.identity, manifest.settings
        case Unfinished(in_progress):
            identity, options = in_progress.get("identity"), in_progress.get("options")
        case _:
            return
    recorded: dict[str, Any] = identity if isinstance(identity, dict) else {}
    teacher = recorded.get("teacher")
    recorded = {**recorded, "teacher": {"arch": teacher.get("arch") if isinstance(teacher, dict) else None}}
    known = make_identity(transfer_set, views, config.seed, {"arch": arch}, config.codec, config.precision)
    known = json.loads(json.dumps(known))
    if config.precision == "auto":
        known["precision"] = recorded.get("precision")
    if known != recorded:
        differences = format_differences(known, recorded, ("requested", "in the cache"))
        raise CacheMismatchError(f"'{out}' holds another cache:{differences}")
    weights = options.get("weights") if isinstance(options, dict) else None
    if isinstance(weights, str) and weights:
        raise CacheMismatchError(
            f"'{out}' holds the cache of the teacher '{make_printable(weights)}', and without --weights another one"
            " would be trained: name it with --weights"
        )
