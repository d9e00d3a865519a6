"""What a cache is to hold, worked out before anything is written: data, views, teacher, identity, precision, plan."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.errors import CacheError, CacheMismatchError, UsageError, unknown_name_error
from softcache.base.schema import validate
from softcache.data.long_tail import parse_imbalance
from softcache.data.sources import DATASET, format_placeholder, get_source_name, short_name
from softcache.data.tasks import EMBEDDING, LABELS, NUMBERS, TASKS, require_classes
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy, parse_views
from softcache.pipeline.cache.codec_choice import MAX_NUMBER, SPARSE_EXAMPLES, find_codec, list_codecs
from softcache.pipeline.cache.existing import Complete, read_existing, read_in_progress_file, read_inference_settings
from softcache.pipeline.cache.folder import MANIFEST_FILE
from softcache.pipeline.cache.identity import Identity, compute_fingerprint, make_identity
from softcache.pipeline.cache.manifest_reader import SETTINGS_SCHEMA
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.writer import check_same_identity
from softcache.pipeline.models import is_custom_arch, list_arch_layers
from softcache.pipeline.models.network_checks import check_teacher
from softcache.pipeline.models.other_frameworks.callable_networks import CallableNetwork
from softcache.pipeline.models.other_frameworks.file_network import parse_file_teacher
from softcache.pipeline.models.other_frameworks.onnx_network import OnnxNetwork, parse_value_tap
from softcache.pipeline.models.outputs import find_selector
from softcache.pipeline.models.prepared_model import PreparedModel, parse_normalize
from softcache.pipeline.models.state_dicts import hash_weights
from softcache.pipeline.taps.hooks import list_layers
from softcache.pipeline.taps.statistics import normalize_tap, parse_tap
from softcache.stages.cli.configs import CacheConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import find_free_name, format_command, select_cache_options
from softcache.stages.cli.defaults import find_defaults
from softcache.stages.distributed import ranks
from softcache.stages.runs.environment import select_device
from softcache.stages.runs.output_folder import check_output_folder
from softcache.stages.teacher.data import (
    FOLDER_OPTIONS,
    can_be_rows,
    fill_size,
    find_view_configuration,
    load_data,
    name_all_unreadable,
    print_notes,
)
from softcache.stages.teacher_cache.teachers.class_maps import check_class_map, make_class_map
from softcache.stages.teacher_cache.teachers.file_teachers import (
    check_file_teacher,
    load_file_teacher,
    select_teacher_device,
)
from softcache.stages.teacher_cache.teachers.teacher_source import (
    check_teacher_source,
    load_teacher,
    prepare_live_teacher,
)

from .inference import LOGITS, PROBABILITIES
from .precision import ChosenPrecision, choose_precision, restore_precision, resume_precision
from .targets import TargetGenerator, make_teacher_views
from .trials import TrialViews

# Options that the first caches did not have: a manifest has them where they are not at their default.
_LATER_OPTIONS = (
    *FOLDER_OPTIONS,
    "test_fraction",
    "teacher_size",
    "output",
    "outputs",
    "weights_key",
    "class_map",
    "axes",
)


@dataclass(frozen=True)
class PreparedCache:
    """What a cache is to hold, and how its rows are computed.

    Attributes:
        config: The options of the command, with the defaults of the data set.
        plan: Identity, draws, taps and sizes of the cache.
        generator: Computes the rows: it holds the data, the views and the teacher.
        choice: The arithmetic of the teacher, with what was measured when it was chosen.
    """

    config: CacheConfig
    plan: CachePlan
    generator: TargetGenerator
    choice: ChosenPrecision


@dataclass(frozen=True)
class LiveObjects:
    """What a caller in Python passes instead of naming it.

    Attributes:
        teacher: The network, function or estimator, of the arch `module(…)`; None where the options name it.
        transfer_set: The data; None where the options name them.
    """

    teacher: Any = None
    transfer_set: TransferSet | None = None


NOTHING_LIVE = LiveObjects()


def prepare_cache(config: CacheConfig, console: Console, live: LiveObjects = NOTHING_LIVE) -> PreparedCache:
    """Work out what the cache is to hold. Nothing is written, but for a teacher that has to be trained first.

    Every rank calls this. The first loads the data before the others do and chooses the precision for all.

    Args:
        config: The options of the command, see `fill_defaults`.
        console: Prints which teacher is used, and the choice of the precision.
        live: What a caller in Python passes instead of naming it.

    Raises:
        UsageError: An option does not fit the data or the teacher.
        CacheMismatchError: The folder holds a cache of another identity.
        CacheError: Weights or files of the folder cannot be used, or the ranks see other files.
    """
    check_codec(config.codec)
    if config.normalize:
        parse_normalize(config.normalize, can_be_rows(config.data))
    requested_taps = _list_taps(config)
    views = parse_views(config.views)
    arch = _check_before_images(config, requested_taps, live)
    transfer_set = live.transfer_set or ranks.first_rank_first(lambda: load_data(config))
    print_notes(transfer_set, console)
    if transfer_set.shape and config.teacher_size:
        raise UsageError(f"--teacher-size {config.teacher_size} is for images, the data are rows of numbers")
    config = check_task(config, transfer_set)
    views = fill_size(views, transfer_set, console, find_view_configuration(arch))
    with name_all_unreadable(transfer_set):
        return _prepare_plan(config, transfer_set, views, requested_taps, console, live.teacher)


def _prepare_plan(
    config: CacheConfig,
    transfer_set: TransferSet,
    views: ViewPolicy,
    requested_taps: tuple[str, ...],
    console: Console,
    network: Any,
) -> PreparedCache:
    """Load the teacher, choose its precision, and work out identity and sizes of the cache."""
    if network is not None:
        teacher, arch = prepare_live_teacher(network, config, transfer_set, views), config.teacher
    elif parse_file_teacher(config.teacher):
        teacher, arch = load_file_teacher(config, transfer_set, views, console)
    else:
        teacher, arch = load_teacher(config, transfer_set, views, console)
    teacher = teacher.to(select_teacher_device(teacher, config.device)).eval()
    if isinstance(teacher.network, CallableNetwork):
        config = _set_callable_options(config, teacher.network, transfer_set.task, console)
    has_free_width = config.class_map or transfer_set.task == EMBEDDING
    for note in check_teacher(teacher, arch, 0 if has_free_width else len(transfer_set.classes)):
        console.print(note)
    if config.class_map:
        teacher.class_map = make_class_map(config, teacher, arch, transfer_set, views, console)

    known_teacher = {"arch": arch, "weights": hash_weights(teacher.network), **teacher.input_spec.to_json()}
    if (selector := find_selector(teacher.network)) and selector.key:
        known_teacher["output"] = selector.key
    if isinstance(teacher.network, OnnxNetwork) and config.output:
        known_teacher["output"] = teacher.network.output
    if teacher.features:
        known_teacher["features"] = teacher.features
    if teacher.class_map:
        known_teacher["class_map"] = [list(columns) for columns in teacher.class_map.columns]
    if config.outputs != LOGITS:
        known_teacher["outputs"] = config.outputs
    teacher_views = make_teacher_views(views, teacher.input_spec, config.teacher_size)
    if teacher_views != views:
        known_teacher["view_size"] = config.teacher_size
    identity = make_identity(transfer_set, views, config.seed, known_teacher, config.codec, config.precision)
    identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
    trial_views = TrialViews(transfer_set, teacher_views, config)
    choice = _choose_precision_and_taps(identity, teacher, requested_taps, trial_views, console)
    identity = {**identity, "precision": choice.inference.precision}
    ranks.check_equal("identity of the cache", compute_fingerprint(identity))

    generator = TargetGenerator(transfer_set, views, choice.inference, config)
    check_codec_classes(config.codec, generator.classes)
    if transfer_set.task == EMBEDDING:
        origin = f"the input of layer '{teacher.features}'" if teacher.features else "as the teacher outputs them"
        console.print(f"embedding: {generator.classes:,} numbers, {origin}")
    plan = CachePlan(
        identity=identity,
        classes=generator.classes,
        draws=config.draws,
        splits={split: len(rows) for split, rows in transfer_set.splits.items()},
        taps=generator.shapes,
        shard_rows=config.shard_rows,
        settings=_select_portable_settings(config),
        precision_record=choice.precision_record,
    )
    return PreparedCache(config, plan, generator, choice)


def check_task(config: CacheConfig, transfer_set: TransferSet) -> CacheConfig:
    """Check the options of a cache against the task; return them with the codec of the task.

    Raises:
        UsageError: An option is for another task.
    """
    task = transfer_set.task
    if task == NUMBERS and config.codec == CacheConfig.codec:
        config = replace(config, codec="float32")
    check_codec_task(config.codec, task)
    if config.axes and task != EMBEDDING:
        raise UsageError(f"--axes is for the task {EMBEDDING}, and the task here is {task}: leave it out")
    for option, is_set in (
        (f"--class-map {config.class_map}", bool(config.class_map)),
        (f"--outputs {config.outputs}", config.outputs != LOGITS and task != LABELS),
    ):
        if is_set:
            require_classes(task, option)
    return config


def check_codec(name: str) -> None:
    """Check that there is a codec of this name.

    Raises:
        UsageError: There is none, with those that there are.
    """
    try:
        find_codec(name)
    except KeyError:
        for example in SPARSE_EXAMPLES:
            if name.partition(":")[0] == (kind := example.partition(":")[0]):
                most = f"1 to {MAX_NUMBER:,}"
                raise UsageError(f"codec '{name}' is not {kind} with a number of {most}, such as {example}") from None
        known = list(dict.fromkeys(codec for task in TASKS for codec in list_codecs(task)))
        raise unknown_name_error("codec", name, known) from None


def check_codec_task(codec: str, task: str) -> None:
    """Raise UsageError for a codec that is for other tasks, with those of the task."""
    if task not in find_codec(codec).tasks:
        names = ", ".join(list_codecs(task))
        raise UsageError(f"--codec {codec} is not for the task {task}, which has {names}")


def check_codec_classes(codec: str, classes: int) -> None:
    """Raise UsageError for a codec that is for more classes than there are."""
    if classes < (least := find_codec(codec).min_classes):
        raise UsageError(
            f"--codec {codec} is for {least} classes or more, and there are {classes}: float16 stores all of them"
        )


def _list_taps(config: CacheConfig) -> tuple[str, ...]:
    """List the unique names of the taps that the options name."""
    taps = [tap for tap in config.taps.split(",") if tap]
    if config.teacher.startswith("onnx:"):
        taps = [parse_value_tap(tap) for tap in taps]
    return tuple(dict.fromkeys(map(normalize_tap, taps)))


def _set_callable_options(config: CacheConfig, network: CallableNetwork, task: str, console: Console) -> CacheConfig:
    """Return the options for a teacher that is no network: an estimator outputs probabilities.

    Raises:
        UsageError: An option is for networks alone.
    """
    for option, is_set in (
        (f"--precision {config.precision}", config.precision != "float32"),
        ("--compile", config.compile),
        (f"--taps {config.taps}", bool(config.taps)),
        (f"--output {config.output}", bool(config.output)),
        (f"--weights-key {config.weights_key}", bool(config.weights_key)),
    ):
        if is_set:
            raise UsageError(f"{option} is for networks of PyTorch, and the teacher '{config.teacher}' is none")
    if not network.is_estimator or config.outputs != LOGITS or task == NUMBERS:
        return config
    stored = "log-odds" if task == LABELS else "logarithms"
    console.print(f"the teacher's predict_proba outputs probabilities: their {stored} are stored as logits")
    return replace(config, outputs=PROBABILITIES)


def _check_before_images(config: CacheConfig, taps: tuple[str, ...], live: LiveObjects) -> str:
    """Check, before an image is read or a teacher trained, what needs neither; return the teacher's arch.

    Raises:
        UsageError: There is no such device, long tail, teacher, file of weights or layer, or --out is a file.
        CacheError: --out cannot be written into, or holds a teacher that was trained with other options.
    """
    select_device(config.device)
    if config.imbalance:
        parse_imbalance(config.imbalance)
    if not (Path(config.out) / MANIFEST_FILE).is_file():  # a complete cache may be on a read-only mount
        check_output_folder(Path(config.out))
    arch = config.teacher
    check_class_map(config)
    if live.teacher is not None:
        layers = list_layers(live.teacher) if isinstance(live.teacher, nn.Module) else []
    elif parse_file_teacher(config.teacher):
        layers = check_file_teacher(config)
    else:
        arch = check_teacher_source(config)
        layers = [] if is_custom_arch(arch) else list_arch_layers(arch)
    for tap in taps:
        if layers and (layer := parse_tap(tap)[0]) not in layers:
            raise unknown_name_error("tap", layer, layers)
    return arch


def fill_defaults(config: CacheConfig) -> CacheConfig:
    """Fill in the options that were not given, from the defaults of the data set."""
    data = config.data or "digits"
    defaults = find_defaults(data)
    file_teacher = parse_file_teacher(config.teacher)
    has_plain_views = file_teacher is not None and file_teacher[0] == "logits"  # targets of the images as they are
    return replace(
        config,
        data=data,
        views=config.views or ("none" if has_plain_views else defaults.views),
        draws=config.draws or (1 if has_plain_views else defaults.draws),
        val_fraction=config.val_fraction or defaults.val_fraction,
        out=config.out or f"caches/{short_name(data)}",
    )


@contextmanager
def suggest_other_command(config: CacheConfig) -> Iterator[None]:
    """Where the folder holds another cache, add the command that makes the requested one in another folder."""
    try:
        yield
    except CacheMismatchError as error:
        unfinished = _format_unfinished_command(Path(config.out))
        finish = f"\nFinish the unfinished one with  {unfinished}" if unfinished else ""
        command = format_command("teacher-cache", config, out=find_free_name(config.out))
        raise CacheError(f"{error}{finish}\nMake the requested one with  {command}") from None


def _format_unfinished_command(out: Path) -> str:
    """Format the command that started what is unfinished in a folder; empty where it is not recorded."""
    try:
        options: Any = read_in_progress_file(out).get("options")
        validate(options, SETTINGS_SCHEMA, "options")
    except (CacheError, OSError):
        return ""
    return format_command("teacher-cache", CacheConfig(**select_cache_options(options)))


def _choose_precision_and_taps(
    identity: Identity,
    teacher: PreparedModel,
    requested_taps: tuple[str, ...],
    trial_views: TrialViews,
    console: Console,
) -> ChosenPrecision:
    """Choose the precision as the first rank finds it; add the taps that the cache in the folder has already.

    An existing cache keeps the arithmetic in which it was started: a second timing does not change it.
    """
    config = trial_views.config
    choice: ChosenPrecision | None = None

    def choose() -> dict[str, Any]:
        nonlocal choice
        out = Path(config.out)
        existing = read_existing(out)
        previous = read_inference_settings(out, existing, identity)
        if isinstance(existing, Complete):  # before the teacher computes the layers that another cache holds
            manifest = existing.manifest
            precision = manifest.identity["precision"] if config.precision == "auto" else config.precision
            check_same_identity(out, {**identity, "precision": precision}, {}, manifest)
        taps = tuple(dict.fromkeys((*(previous.taps if previous else ()), *requested_taps)))
        choice = resume_precision(config, previous, teacher, taps, trial_views.transfer_set.task)
        choice = choice or choose_precision(config, trial_views, teacher, taps, console)
        return {"taps": list(taps), **choice.to_json()}

    record = ranks.broadcast_from_first(choose)
    return choice or restore_precision(record, teacher, tuple(record["taps"]), trial_views, console)


def _select_portable_settings(config: CacheConfig) -> dict[str, Any]:
    """Return the options that another machine can repeat: of a path, its last part."""
    local = ("data_root", "device", "workers", "json", "out", "draws", "taps", "index", "rehash")
    settings = {name: value for name, value in asdict(config).items() if name not in local}
    for name in _LATER_OPTIONS:
        if settings[name] == getattr(CacheConfig, name):
            del settings[name]
    if Path(config.classes).is_file():
        settings["classes"] = Path(config.classes).name
    if Path(config.class_map).is_file():
        settings["class_map"] = Path(config.class_map).name
    settings["weights"] = Path(config.weights).name
    if file_teacher := parse_file_teacher(config.teacher):
        settings["teacher"] = f"{file_teacher[0]}:{Path(file_teacher[1]).name}"
    name = DATASET if config.data == DATASET else get_source_name(config.data)
    settings["data"] = DATASET if name == DATASET else format_placeholder(name)
    return settings
