"""What is planned: rows, classes, taps and the teacher's rate, measured here or taken from the options."""

import tempfile
from dataclasses import dataclass, fields, replace

from softcache.base.errors import UsageError, unknown_name_error
from softcache.data.sources import short_name
from softcache.data.tasks import CLASSES, EMBEDDING, NUMBERS
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import parse_views
from softcache.pipeline.cache.manifest import Datasets, list_datasets
from softcache.pipeline.cache.shards import Layout
from softcache.pipeline.models import build, compute_shapes, is_custom_arch, list_arch_layers
from softcache.pipeline.models.configurations import DEFAULT
from softcache.pipeline.models.other_frameworks.file_network import parse_file_teacher
from softcache.pipeline.taps.statistics import normalize_tap, parse_tap
from softcache.stages.cli.configs import CacheConfig, PlanConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.defaults import find_defaults
from softcache.stages.teacher.data import FOLDER_SIZE, fill_size, find_view_configuration, load_data
from softcache.stages.teacher_cache.preparation import (
    LiveObjects,
    check_codec,
    check_codec_classes,
    check_codec_task,
    fill_defaults,
    prepare_cache,
)

from .quantities import parse_rows
from .rate import measure_rate


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        config: The options of teacher-cache, with the defaults of the data.
        data: Name of the data.
        arch: Of the teacher.
        task: See data/tasks.py.
        splits: {split: rows}.
        classes: K.
        class_names: Names of the classes, as far as they are known.
        taps: {tap: row shape}.
        head: Datasets of the file of the last layer; None where there is none.
        rate: Views a second of the teacher.
        rate_source: Where the rate comes from.
    """

    config: CacheConfig
    data: str
    arch: str
    task: str
    splits: dict[str, int]
    classes: int
    class_names: tuple[str, ...]
    taps: dict[str, list[int]]
    head: Layout | None
    rate: float
    rate_source: str

    def list_datasets(self, codec: str, taps: dict[str, list[int]]) -> Datasets:
        """List the datasets of a row with another codec or other taps."""
        return list_datasets(self.classes, codec, taps, self.task)


def read_subject(config: PlanConfig, console: Console) -> Subject:
    """Find out what is planned. Data and teacher are opened where an option does not say what they would.

    Raises:
        UsageError: An option does not exist, or does not fit the data or the teacher.
        CacheError: A file is damaged.
    """
    rows = parse_rows(config.rows) if config.rows else 0
    classes = _parse_classes(config.classes)
    if rows and classes and config.rate and not config.data:  # of none here: the defaults of a user's own images
        config = replace(config, data="folder:DATA")
    names = [field.name for field in fields(CacheConfig) if hasattr(config, field.name)]
    cache_config = CacheConfig(**{name: getattr(config, name) for name in names})
    cache_config = fill_defaults(replace(cache_config, classes="" if classes else config.classes))
    cache_config = replace(cache_config, teacher=cache_config.teacher or find_defaults(cache_config.data).teacher)
    check_codec(cache_config.codec)
    if config.rate:
        return _read_numbers(cache_config, config.rate, rows, classes, console)
    return _time_teacher(cache_config, rows, classes, console)


def _parse_classes(text: str) -> int:
    """Parse a number of classes; 0 for an order of the classes, which is read with the data."""
    if not text.isdecimal():
        return 0
    if not 1 <= int(text) <= 1 << 24:
        raise UsageError(f"--classes {text[:40]} is not between 1 and {1 << 24}")
    return int(text)


def _time_teacher(config: CacheConfig, rows: int, classes: int, console: Console) -> Subject:
    """Load data and teacher as stage one does, and time it."""
    live = LiveObjects()
    if not config.weights and not parse_file_teacher(config.teacher):
        if is_custom_arch(config.teacher):
            config = replace(config, weights=DEFAULT)  # as the factory returns it
        else:
            live = _build_teacher(config, console)
    with tempfile.TemporaryDirectory() as folder:  # stays empty: a folder without a cache
        prepared = prepare_cache(replace(config, out=folder), console, live)
    generator, plan = prepared.generator, prepared.plan
    datasets = list_datasets(plan.classes, prepared.config.codec, plan.taps, generator.transfer_set.task)
    rate, views = measure_rate(generator, datasets)
    head = generator.find_head()
    return Subject(
        config=prepared.config,
        data=short_name(config.data),
        arch=str(plan.identity["teacher"]["arch"]),
        task=generator.transfer_set.task,
        splits=_choose_splits(plan.splits, rows, config),
        classes=classes or plan.classes,
        class_names=() if classes else generator.transfer_set.classes,
        taps=plan.taps,
        head=_make_head(generator.transfer_set.task, classes or plan.classes, head.in_features if head else 0, config),
        rate=rate,
        rate_source=f"measured here on {views:,} views in {prepared.choice.inference.precision}",
    )


def _build_teacher(config: CacheConfig, console: Console) -> LiveObjects:
    """Load the data, and build the teacher with fresh weights, which is as fast as a trained one.

    Raises:
        UsageError: The width of an embedding depends on the weights.
    """
    if config.task == EMBEDDING:
        raise UsageError("--task embedding needs the teacher: name its --weights, or give --rate and --classes")
    list_arch_layers(config.teacher)  # an unknown arch is found before the data are read
    transfer_set = load_data(config)
    views = fill_size(parse_views(config.views), transfer_set, console, find_view_configuration(config.teacher))
    size = config.teacher_size or views.size
    network = build(config.teacher, len(transfer_set.classes), transfer_set.channels, size, shape=transfer_set.shape)
    console.print(f"no --weights: {config.teacher} with fresh weights is timed")
    return LiveObjects(network, transfer_set)


def _read_numbers(config: CacheConfig, rate: float, rows: int, classes: int, console: Console) -> Subject:
    """Take the rate from the options, and of the data what the options do not say."""
    transfer_set = None if rows and classes else load_data(config)
    task = transfer_set.task if transfer_set else config.task or CLASSES
    if task == EMBEDDING and not classes:
        raise UsageError("--task embedding with --rate: the width of the embedding is --classes")
    if task == NUMBERS and config.codec == CacheConfig.codec:
        config = replace(config, codec="float32")
    check_codec_task(config.codec, task)
    K = classes or len(transfer_set.classes if transfer_set else ())
    if not K:
        raise UsageError("the data have no names of classes: give the number of --classes")
    check_codec_classes(config.codec, K)
    taps = tuple(dict.fromkeys(normalize_tap(tap) for tap in config.taps.split(",") if tap))
    shapes, inputs = _find_shapes(config, K, taps, transfer_set, console)
    known = {split: len(part) for split, part in transfer_set.splits.items()} if transfer_set else {}
    return Subject(
        config=config,
        data=short_name(config.data) if transfer_set else "data that are not opened",
        arch=config.teacher,
        task=task,
        splits=_choose_splits(known, rows, config),
        classes=K,
        class_names=transfer_set.classes if transfer_set and not classes else (),
        taps=shapes,
        head=_make_head(task, K, inputs, config),
        rate=rate,
        rate_source="by --rate",
    )


def _find_shapes(
    config: CacheConfig, classes: int, taps: tuple[str, ...], transfer_set: TransferSet | None, console: Console
) -> tuple[dict[str, list[int]], int]:
    """Find the shapes of the taps, and the width of the last layer's input, without the teacher's weights.

    Raises:
        UsageError: The teacher has no such layer, or is none whose layers are known without it.
    """
    is_known = not (is_custom_arch(config.teacher) or parse_file_teacher(config.teacher))
    if taps and not is_known:
        raise UsageError(
            f"--taps {config.taps}: what the layers of '{config.teacher}' output is known once it is run: leave out"
            " --rate"
        )
    if not is_known:
        return {}, 0
    layers = list_arch_layers(config.teacher)
    for tap in taps:
        if layers and (layer := parse_tap(tap)[0]) not in layers:
            raise unknown_name_error("tap", layer, layers)
    views, configuration = parse_views(config.views), find_view_configuration(config.teacher)
    if transfer_set is not None:
        views = fill_size(views, transfer_set, console, configuration)
    size = config.teacher_size or views.size or (configuration.size if configuration else FOLDER_SIZE)
    shape = transfer_set.shape if transfer_set and transfer_set.shape else ()
    channels = transfer_set.channels if transfer_set else 3
    return compute_shapes(config.teacher, classes, shape or (channels, size, size), taps)


def _choose_splits(known: dict[str, int], rows: int, config: CacheConfig) -> dict[str, int]:
    """Return {split: rows}: those that are known, or of so many training images, with the validation rows cut off."""
    if not rows:
        return known
    held_out = max(1, round(rows * config.val_fraction))
    return {"train": max(1, rows - held_out), "val": held_out, **{k: n for k, n in known.items() if k == "test"}}


def _make_head(task: str, classes: int, inputs: int, config: CacheConfig) -> Layout | None:
    """Make the datasets of the file of the last layer, or of the statistics of an embedding."""
    if task == EMBEDDING:
        axes: Layout = {"axes": ((classes, classes), "<f4"), "axis_std": ((classes,), "<f4")} if config.axes else {}
        return {"mean": ((classes,), "<f4"), "std": ((classes,), "<f4"), **axes}
    if not inputs or task == NUMBERS or config.class_map:
        return None
    return {"weight": ((classes, inputs), "<f4"), "bias": ((classes,), "<f4")}
