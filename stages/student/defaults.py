"""The options of one student, complete: what the command line leaves open comes from the cache's data set."""

from dataclasses import fields, replace
from pathlib import Path
from shlex import quote

from softcache.base.errors import CacheError, UsageError
from softcache.data.sources import DATASET, NAME_DATASET, has_argument, parse_data, short_name
from softcache.data.tasks import EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.cache.reader import CacheReader
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.defaults import DEFAULTS, ROW_DEFAULTS
from softcache.stages.cli.typed_command import program_name
from softcache.stages.runs.data import has_labels
from softcache.stages.runs.folder import check_installed

_UNLABELLED_LOSSES = ("kd:temperature=4",)  # where the training images have no labels
# Of other tasks than classes: with hard targets, and without.
_TASK_LOSSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LABELS: (("kd_sigmoid", "bce:weight=0.1"), ("kd_sigmoid",)),
    NUMBERS: (("kd_mse", "mse:weight=0.1"), ("kd_mse",)),
    EMBEDDING: (("embed",), ("embed",)),
}


def to_student_config(config: StudentConfig) -> StudentConfig:
    """Return the options of one student without those of the command that trains it.

    Args:
        config: the options of `born-again`, `methods` or `tune`, which extend those of `student`.

    Returns:
        A plain StudentConfig. Its `json` is off, because the command prints the one JSON object.
    """
    options = {field.name: getattr(config, field.name) for field in fields(StudentConfig)}
    return StudentConfig(**options | {"json": False})


def fill_defaults(config: StudentConfig) -> StudentConfig:
    """Fill in the options that are not set from the defaults of the cache's data set.

    Args:
        config: the options of a student, in which "", 0 and a weight decay below 0 stand for "not set".

    Returns:
        The options with at least one cache, all of whose draws are used where `draws` was not set.

    Raises:
        CacheError: when a cache does not exist, with the command that makes it; when its data set is not known.
        UsageError: when `data` is not known, or empty for a cache of a dataset of the user's own, or an optional
            package that the options need is not installed.
    """
    check_installed(config)
    if config.data:
        parse_data(config.data)
    folders = config.cache or (f"caches/{short_name(config.data or 'digits')}",)
    for folder in folders:
        if not Path(folder).exists():
            data = f" --data {quote(config.data)}" if config.data else ""
            command = f"{program_name()} teacher-cache{data} --out {quote(folder)}"
            raise CacheError(f"there is no cache at '{folder}': make one with  {command}")
    cache = CacheReader(Path(folders[0]))
    if cache.data == DATASET and not config.data:
        raise UsageError(f"the cache '{folders[0]}' is of a dataset of your own: {NAME_DATASET}")
    return fill_cache_defaults(replace(config, cache=folders), cache)


def fill_cache_defaults(config: StudentConfig, cache: CacheReader) -> StudentConfig:
    """Fill in the options that are not set, those of a cache that is open.

    Args:
        config: as in `fill_defaults`, with its caches.
        cache: the first of them.

    Raises:
        CacheError: when its data set is not known.
    """
    if cache.data not in DEFAULTS:
        raise CacheError(
            f"the cache '{cache.folder}' is of '{cache.data}', a data set that this version of softcache does not have"
        )
    defaults = ROW_DEFAULTS if cache.input_spec.shape else DEFAULTS[cache.data]
    return replace(
        config,
        data=config.data or ("" if has_argument(cache.data) else cache.data),
        draws=config.draws or cache.manifest.draws,
        arch=config.arch or defaults.student,
        loss=config.loss or _choose_losses(cache, defaults.losses),
        epochs=config.epochs or defaults.student_epochs,
        batch_size=config.batch_size or defaults.batch_size,
        learning_rate=config.learning_rate or defaults.learning_rate,
        weight_decay=config.weight_decay if config.weight_decay >= 0 else defaults.weight_decay,
    )


def _choose_losses(cache: CacheReader, of_data: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the losses of a student: those of the data set where it has one class an image, else of the task."""
    with_labels, without = _TASK_LOSSES.get(cache.task, (of_data, _UNLABELLED_LOSSES))
    return with_labels if has_labels(cache.manifest, "train") else without
