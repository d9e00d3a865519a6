"""`softcache tune`: search a student's loss weights and training options. Each trial trains one student."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from softcache.base.errors import Interrupted, UsageError
from softcache.base.files import make_folder
from softcache.data.sources import short_name
from softcache.data.tasks import EMBEDDING
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import ZeroLossError
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER
from softcache.stages.cli.configs import StudentConfig, TuneConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.new_folders import make_new_folder
from softcache.stages.cli.typed_command import format_typed_command
from softcache.stages.runs.data import has_labels
from softcache.stages.runs.folder import IGNORED_OPTIONS
from softcache.stages.student.command import print_notes
from softcache.stages.student.defaults import fill_defaults, to_student_config
from softcache.stages.student.early_checks import check_before_images, check_names
from softcache.stages.student.own_losses import check_own_losses
from softcache.stages.student.recipes import apply_recipe
from softcache.stages.student.requirements import check_task_options
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.student.teachers import open_caches

from .folder import (
    DATABASE,
    check_folder,
    check_same_search,
    clean_up,
    find_unfinished_searches,
    lock_search,
    start_search,
)
from .space import SearchedOption, Value, apply_values, parse_space
from .study import SharedStudy, open_study
from .summary import make_rows, print_rows, validation_figure, write_report
from .trials import Search

_MAX_GRID = 100_000  # trials
_LOCATION_OPTIONS = ("cache", "data", "data_root", "device", "workers")  # may differ between the machines of a search


def run(config: TuneConfig, explicit: set[str]) -> None:
    """Train trials, beside other processes of the same search, until all are finished; then report the best.

    The same command with the same --out continues a search that was stopped.

    Args:
        config: the options of the command.
        explicit: the names of the options that were typed on the command line.
    """
    console = Console(config.json, epoch_lines=False)
    if config.resume or config.seeds > 1 or config.baseline:
        raise UsageError("tune takes no --resume (run it again with the same --out), --seeds or --baseline")
    if config.grid and "trials" in explicit:
        raise UsageError("--grid tries every combination once: leave out --trials")
    # The recipe is applied here and removed: in the command of a trial it would replace a searched value that equals
    # the default of its option.
    base_config = replace(apply_recipe(to_student_config(config), explicit), recipe="")
    check_names(base_config)
    base_config = fill_defaults(base_config)
    space = parse_space(config.search, base_config, explicit)
    grid = _list_grid(space) if config.grid else []
    caches = open_caches(base_config.cache)
    check_task_options(replace(base_config, recipe=config.recipe), caches[0].task)
    figure = validation_figure(base_config, caches[0].task)
    _check_before_images(space, base_config, caches)
    settings = _describe_search(config, base_config, caches)
    default_name = f"{short_name(base_config.data)}-{base_config.arch.replace(':', '-')}"
    folder = Path(config.out) if config.out else make_new_folder(f"tune-{default_name}")
    check_folder(folder, settings)
    if not config.out:
        for unfinished in find_unfinished_searches(folder, settings):
            command = format_typed_command(str(unfinished))
            console.print(f"'{unfinished}' was stopped; continue it with  {command}")
    setup = DistillationSetup.open(base_config)
    _check_space(space, base_config, setup)
    print_notes(base_config, setup, console)
    if not config.storage:
        make_folder(folder)
    shared_settings = {name: value for name, value in settings.items() if name not in _LOCATION_OPTIONS}
    with open_study(
        config.storage or f"sqlite:///{folder.resolve()}/{DATABASE}",
        config.study or default_name,
        maximize=figure not in LOWER_IS_BETTER,
        settings=shared_settings,
        warmup_epochs=_find_fewest_epochs(base_config, space) // 4,
    ) as (study, storage):
        check_same_search(study.user_attrs["begun"], shared_settings, f"the study '{study.study_name}'")
        shared_study = SharedStudy(
            study=study,
            storage=storage,
            folder=folder,
            folder_id=start_search(folder, settings),
            space=space,
            seed=base_config.seed,
            slots=len(grid) or config.trials,
            grid=grid,
        )
        search = Search(
            shared_study=shared_study,
            base_config=base_config,
            setup=setup,
            prune=config.prune,
            trials_at_once=config.together,
            figure=figure,
            console=console,
        )
        try:
            search.run()
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(f"stopped; continue with  {format_typed_command(str(folder))}") from None
        rows = make_rows(shared_study.read_trials(), space)

    with lock_search(folder):
        clean_up(folder)
        record = write_report(folder, rows, base_config, space=space, settings=settings, figure=figure)
    if config.json:
        return console.print_json(json.dumps(record))
    print_rows(record, figure, space, folder, console)


def _describe_search(config: TuneConfig, base_config: StudentConfig, caches: Sequence[CacheReader]) -> dict[str, Any]:
    """Return what all trials of a search have in common, as plain JSON values; two searches are one if it is equal."""
    common = {name: value for name, value in asdict(base_config).items() if name not in IGNORED_OPTIONS}
    searched = {name: getattr(config, name) for name in ("search", "grid", "prune")}
    fingerprints = [cache.manifest.fingerprint for cache in caches]
    settings: dict[str, Any] = json.loads(json.dumps(common | searched | {"fingerprints": fingerprints}))
    return settings


def _find_fewest_epochs(base_config: StudentConfig, space: tuple[SearchedOption, ...]) -> int:
    """Return the epochs of the shortest possible trial: the number may itself be searched."""
    for option in space:
        if option.name == "epochs":
            return min(int(value) for value in option.list_bounds())
    return base_config.epochs


def _list_grid(space: tuple[SearchedOption, ...]) -> list[dict[str, Value]]:
    """List every combination as {name: value}; the value of the last name changes first.

    Raises:
        UsageError: for a range without steps, or too many combinations.
    """
    for option in space:
        if not option.choices and not option.step:
            raise UsageError(
                f"search '{option.spec}' has no steps, which --grid needs: {option.name}=LOW..HIGH:step=S or a|b|c"
            )
    count = prod(len(option.list_points()) for option in space)
    if count > _MAX_GRID:
        raise UsageError(f"--grid would be {count:,} trials, more than {_MAX_GRID:,}: use wider steps")
    names = [option.name for option in space]
    return [dict(zip(names, values, strict=True)) for values in product(*(option.list_points() for option in space))]


def _check_before_images(
    space: tuple[SearchedOption, ...], base_config: StudentConfig, caches: Sequence[CacheReader]
) -> None:
    """Check, before an image is read, that the students at all bounds of the space can be built.

    Raises:
        UsageError: when one cannot, or the validation split has no labels.
        CacheError: when a cache lacks what a loss reads.
    """
    if caches[0].task != EMBEDDING and not has_labels(caches[0].manifest, "val"):
        raise UsageError(
            "tune compares students on the labels of the validation split, and these images have none: train them with"
            " student --losses, and compare their agreement with the teacher"
        )
    for option, student_config in _list_bounds(space, base_config):
        try:
            check_before_images(student_config, caches)
        except ZeroLossError:  # such a trial fails with this reason; the rest of the space can be trained
            continue
        except UsageError as error:
            raise UsageError(f"search '{option.spec}': {error}") from None


def _check_space(space: tuple[SearchedOption, ...], base_config: StudentConfig, setup: DistillationSetup) -> None:
    """Check, before anything is written, that the students at all bounds of the space fit the labels.

    Raises:
        UsageError: when one does not.
    """
    for option, student_config in _list_bounds(space, base_config):
        try:
            student_setup = setup.with_options(student_config)
            student_setup.check_student(
                student_setup.build_student(student_config, student_setup.losses), student_config
            )
            check_own_losses(student_config, student_setup)
        except ZeroLossError:
            continue
        except UsageError as error:
            raise UsageError(f"search '{option.spec}': {error}") from None


def _list_bounds(
    space: tuple[SearchedOption, ...], base_config: StudentConfig
) -> Iterator[tuple[SearchedOption, StudentConfig]]:
    """Yield the options of a student at each bound of each searched option, the others being at their first one."""
    values = {option.name: option.list_bounds()[0] for option in space}
    for option in space:
        for value in option.list_bounds():
            yield option, apply_values(base_config, space, {**values, option.name: value})
