"""The options of one student, complete: what the command line leaves open comes from the cache's data set."""

from dataclasses import fields, replace
from pathlib import Path
from shlex import quote

from softcache.base.errors import CacheError
from softcache.data.transfer_set import TRANSFER_SETS, find_source, short_name
from softcache.pipeline.cache.reader import Cache
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import program_name
from softcache.stages.runs.folder import check_installed


def to_student_config(config: StudentConfig) -> StudentConfig:
    """The settings of one student, of a command that has more; what it prints is not one JSON object."""
    own = {f.name: getattr(config, f.name) for f in fields(StudentConfig)}
    return StudentConfig(**own | {"json": False})


def fill_defaults(config: StudentConfig) -> StudentConfig:
    """Every setting that was left open, from the recipe of the cache's data set. What is asked for can be had."""
    check_installed(config)
    if config.data:
        find_source(config.data)
    caches = config.cache or (f"caches/{short_name(config.data or 'digits')}",)
    for cache in caches:
        if not Path(cache).exists():
            data = f" --data {quote(config.data)}" if config.data else ""
            make = f"{program_name()} teacher-cache{data} --out {quote(cache)}"
            raise CacheError(f"there is no cache at '{cache}': make one with  {make}")
    opened = Cache(Path(caches[0]))
    name = opened.data
    if name not in TRANSFER_SETS:
        raise CacheError(f"the cache '{caches[0]}' is of '{name}', a data set that this program does not know")
    recipe = TRANSFER_SETS[name].recipe
    return replace(
        config,
        cache=caches,
        data=config.data or ("" if name == "folder" else name),
        draws=config.draws or opened.manifest.draws,
        arch=config.arch or recipe.student,
        loss=config.loss or recipe.losses,
        epochs=config.epochs or recipe.student_epochs,
        batch_size=config.batch_size or recipe.batch_size,
        learning_rate=config.learning_rate or recipe.learning_rate,
        weight_decay=config.weight_decay if config.weight_decay >= 0 else recipe.weight_decay,
    )
