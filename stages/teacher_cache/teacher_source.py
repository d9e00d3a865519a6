"""Loading the teacher: weights of a file, of a run or as published, or of a teacher that is trained first."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.base.errors import CacheError, CacheMismatchError, UsageError, make_printable
from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy
from softcache.pipeline.cache.existing import Complete, Unfinished, read_existing
from softcache.pipeline.cache.identity import format_differences, make_identity
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build, check_arch, is_custom_arch, is_external_arch
from softcache.pipeline.models.callable_networks import load_callable, prepare_callable
from softcache.pipeline.models.checkpoint_files import choose_state_dict, describe_choice, read_checkpoint
from softcache.pipeline.models.class_map import MAP_ADVICE
from softcache.pipeline.models.configurations import (
    DEFAULT,
    find_configuration,
    has_published_weights,
    load_published_state,
)
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.models.prepared_model import PUBLISHED, InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import find_weights_file, hash_weights, load_weights
from softcache.stages.cli.configs import CacheConfig, CheckConfig, TeacherConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.distributed.ranks import broadcast_from_first
from softcache.stages.runs.folder import read_json
from softcache.stages.runs.named_code import require_named_code
from softcache.stages.teacher.command import describe_accuracy, fill_defaults, train_teacher
from softcache.stages.teacher.data import (
    FOLDER_OPTIONS,
    SPLIT_OPTIONS,
    can_be_rows,
    check_normalize,
    make_input_spec,
    make_published_spec,
)

from .recorded_run import check_same_classes, list_differences, note_different_split, read_run


def load_teacher(
    config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, console: Console
) -> tuple[PreparedModel, str]:
    """Load the teacher that the options of `teacher-cache` name.

    Args:
        config: Options of the command. Without weights a teacher is trained first, or one trained before is used.
        transfer_set: The data.
        views: The view policy, with a size.
        console: Prints which teacher is used, where the options do not name one.

    Returns:
        The teacher with its weights, on the CPU, and its arch.

    Raises:
        UsageError: There are no such weights, or they do not fit the arch, the data or another option.
        CacheError: A file is damaged, or a teacher with other options was trained before.
    """
    if is_custom_arch(config.teacher) and config.weights in ("", "DEFAULT"):
        teacher = _load_custom(config, transfer_set, views)
        if teacher is not None:
            return teacher, config.teacher
    if not config.weights:
        if config.teacher_size:
            raise UsageError(
                f"--teacher-size {config.teacher_size} needs --weights: a teacher that is trained here sees the views"
                " of its students"
            )
        # One of several ranks trains it.
        folder = broadcast_from_first(lambda: _train_teacher(config, transfer_set, views, console))
        config = replace(config, weights=folder, normalize="", output="")
    if config.weights_key and (config.weights == DEFAULT or Path(config.weights).is_dir()):
        raise UsageError(f"--weights-key {config.weights_key} is for a file of weights, not for {config.weights}")
    if config.weights == DEFAULT:
        return _load_published(config, transfer_set, views, console)
    path = Path(config.weights)
    _check_weights_exist(path)
    arch, output, input_spec = config.teacher, config.output, None
    if path.is_dir() and (path / "result.json").is_file():
        run = read_run(path, config)
        if not config.class_map:
            check_same_classes(path, run, transfer_set)
        arch, output, input_spec = run.arch, output or run.output, _use_teacher_size(run.input_spec, config)
        note_different_split(path, config, console)
    if not arch:
        raise UsageError(f"--weights {path} does not record its arch: name it with --teacher")
    states = read_checkpoint(find_weights_file(path))
    key, state = choose_state_dict(states, config.weights_key, path)
    if choice := describe_choice(key, states):
        console.print(f"weights: {choice}")
    if input_spec is None:
        normalize = config.normalize or (PUBLISHED if _has_own_input(arch) else "data")
        input_spec = _use_teacher_size(make_input_spec(normalize, transfer_set, views, arch), config)
        if normalize == PUBLISHED:
            console.print(f"input of {arch}: {input_spec.describe()}, as published with it; --normalize changes it")
    if input_spec.shape != transfer_set.shape:
        expected, shape = (f"rows {list(x)}" if x else "images" for x in (input_spec.shape, transfer_set.shape))
        raise UsageError(f"the teacher takes {expected}, the data are {shape}")
    if input_spec.channels < transfer_set.channels:
        raise UsageError(f"the teacher takes {input_spec.channels} channel, the images have {transfer_set.channels}")
    classes = 0 if config.class_map else len(transfer_set.classes)
    classes = classes or _count_classes(state, path)
    network = build(arch, classes, input_spec.channels, input_spec.size, output, shape=input_spec.shape)
    if note := load_weights(network, state, str(path), MAP_ADVICE):
        console.print(f"weights: {note}")
    return PreparedModel(network, input_spec), arch


def _load_custom(config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy) -> PreparedModel | None:
    """Load a teacher of a user's own with what it has learned: an estimator, a function, or with DEFAULT a network.

    Returns:
        The teacher; None for a network without --weights, which is trained.
    """
    input_spec = _use_teacher_size(make_input_spec(config.normalize or "data", transfer_set, views), config)
    classes = len(transfer_set.classes)
    value = load_callable(config.teacher, classes, input_spec.input_shape)
    if not isinstance(value, nn.Module):
        return prepare_callable(value, config.teacher, transfer_set.classes, input_spec, bool(config.normalize))
    if not config.weights:
        return None
    network = build(
        config.teacher, classes, input_spec.channels, input_spec.size, config.output, shape=input_spec.shape
    )
    return PreparedModel(network, input_spec)


def prepare_live_teacher(
    network: Any, config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy
) -> PreparedModel:
    """Prepare what a caller in Python passes as the teacher: a copy of a network, a function or an estimator.

    Args:
        network: images float32 [B, C, H, W] -> logits [B, K]; it is not changed. Or as of CallableNetwork.
        config: Its arch, normalisation and output.
        transfer_set: The data.
        views: The view policy, with a size.

    Raises:
        UsageError: It is none of these, or cannot be copied.
    """
    input_spec = _use_teacher_size(make_input_spec(config.normalize or "data", transfer_set, views), config)
    classes = len(transfer_set.classes)
    if not isinstance(network, nn.Module):
        return prepare_callable(network, config.teacher, transfer_set.classes, input_spec, bool(config.normalize))
    if config.class_map:  # the number of its classes, for messages and where it returns several tensors
        classes = _count_classes(network.state_dict(), config.teacher)
    copied = build(
        config.teacher,
        classes,
        input_spec.channels,
        input_spec.size,
        config.output,
        network,
        shape=input_spec.shape,
    )
    return PreparedModel(copied, input_spec)


def check_teacher_source(config: CacheConfig) -> str:
    """Check, before an image is read, that the teacher of the options exists or can be trained.

    Args:
        config: Options of the command, with the defaults of the data set.

    Returns:
        Its arch.

    Raises:
        UsageError: There is no such arch or file of weights, or the two do not fit.
        CacheError: A teacher with other options was trained before.
    """
    if not config.weights:
        teacher_config, _ = _make_teacher_config(config)
        check_arch(teacher_config.arch)
        check_normalize(config.normalize, teacher_config.arch, can_be_rows(config.data))
        return teacher_config.arch
    path = Path(config.weights)
    if config.weights == DEFAULT:
        if not (has_published_weights(config.teacher) or is_custom_arch(config.teacher)):
            raise UsageError(
                "--weights DEFAULT needs --teacher torchvision:NAME, timm:NAME, hf:NAME or my_package.module:factory"
            )
    else:
        _check_weights_exist(path)
    arch = config.teacher
    if path.is_dir() and (path / "result.json").is_file():
        arch = read_run(path, config).arch
    if not arch:
        raise UsageError(f"--weights {path} does not record its arch: name it with --teacher")
    if arch == config.teacher or not is_external_arch(arch):  # what a folder names is not imported
        check_arch(arch)
    check_normalize(config.normalize, arch, can_be_rows(config.data))
    return arch


def _check_weights_exist(path: Path) -> None:
    """Raise UsageError where there is nothing at a path, or the run of several seeds."""
    seeds = sorted(path.glob("seed-*"))
    if seeds and find_weights_file(path) == path:
        raise UsageError(f"the run '{path}' has several seeds: name one of them, such as --weights {seeds[0]}")
    if not path.exists():
        raise UsageError(f"there are no weights at '{path}'")


def load_cache_teacher(cache: CacheReader, config: CheckConfig) -> PreparedModel:
    """Load the teacher of a cache.

    Args:
        cache: The cache; its manifest has the arch, the preparation of the input and the digest of the weights.
        config: Options of check-cache. `weights` is a file of weights, the folder of a run, or DEFAULT for
            the published ones; `teacher` names a user's own code, which is not imported because a manifest names it.

    Returns:
        The teacher in eval mode, on the CPU.

    Raises:
        UsageError: arch is not that of the cache, or is a user's code and not named; or the weights do not fit it.
        CacheError: The weights are not those of the cache.
    """
    weights, recorded = config.weights, cache.teacher
    if is_live_arch(recorded):
        raise UsageError(
            f"the teacher of '{cache.folder}' is {make_printable(recorded)}, a network that was passed to softcache in"
            " Python: pass it to softcache.build_cache, which runs it again where the cache grows"
        )
    require_named_code(
        recorded,
        config.teacher,
        owner=f"the cache '{cache.folder}'",
        option="--teacher",
        command=format_command("check-cache", config, cache.folder, teacher=recorded),
    )
    input_spec = cache.input_spec
    known = cache.manifest.identity["teacher"]
    if weights == DEFAULT and is_custom_arch(recorded):
        value = load_callable(recorded, cache.classes, input_spec.input_shape)
        if not isinstance(value, nn.Module):
            return _prepare_recorded_callable(value, cache)
        state = _build_recorded(cache, cache.classes).state_dict()
    elif weights == DEFAULT and has_published_weights(recorded):
        state = load_published_state(recorded, input_spec.channels, input_spec.size)
    else:
        states = read_checkpoint(find_weights_file(Path(weights)))
        _, state = choose_state_dict(states, config.weights_key, Path(weights))
    classes = _count_classes(state, weights) if "class_map" in known else cache.classes
    network = _build_recorded(cache, classes)
    load_weights(network, state, weights)
    digest, cache_digest = hash_weights(network), cache.manifest.identity["teacher"]["weights"]
    if digest != cache_digest:
        raise CacheError(
            f"the weights of '{weights}' are not those of the cache: teacher.weights {digest[:16]}…,"
            f" in the cache {cache_digest[:16]}…"
        )
    return PreparedModel(network, input_spec).eval()


def _build_recorded(cache: CacheReader, classes: int) -> nn.Module:
    """Build the network that a cache records, with fresh weights."""
    spec, output = cache.input_spec, str(cache.manifest.identity["teacher"].get("output", ""))
    return build(cache.teacher, classes, spec.channels, spec.size, output, shape=spec.shape)


def _prepare_recorded_callable(value: Any, cache: CacheReader) -> PreparedModel:
    """Prepare the function or estimator of a cache, with the input that the digest in its manifest names.

    Raises:
        CacheError: The cache is of another kind of teacher.
    """
    names = tuple(cache.manifest.identity["transfer_set"]["classes"])
    for is_normalized in (False, True):
        teacher = prepare_callable(value, cache.teacher, names, cache.input_spec, is_normalized)
        if hash_weights(teacher.network) == cache.manifest.identity["teacher"]["weights"]:
            return teacher
    raise CacheError(f"the cache '{cache.folder}' is of a network with weights: '{cache.teacher}' is a function now")


def _count_classes(state: Mapping[str, torch.Tensor], path: Path | str) -> int:
    """Count the classes of a teacher by the rows of its last matrix, or else of its last convolution of 1 x 1."""
    weights = [weight for weight in state.values() if weight.ndim == 4 and weight.shape[2:] == (1, 1)]
    matrices = [weight for weight in state.values() if weight.ndim == 2] or weights
    if not matrices:
        raise UsageError(f"neither the weights of {path} nor the images show how many classes there are")
    return int(matrices[-1].shape[0])


def assumes_normalize(config: CacheConfig) -> bool:
    """Whether the weights come from elsewhere, and neither the command nor the arch has how input is normalised."""
    if _has_own_input(config.teacher):
        return False
    has_own_input = config.weights == DEFAULT and not is_custom_arch(config.teacher)
    is_from_elsewhere = is_live_arch(config.teacher) or (bool(config.weights) and not has_own_input)
    return is_from_elsewhere and not config.normalize and not (Path(config.weights) / "result.json").is_file()


def _train_teacher(config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, console: Console) -> str:
    """Train a teacher with the defaults of the data, in a folder beside the cache, unless it is there already.

    Where the folder holds another cache already, this is found before the training.

    Returns:
        The folder of its run.
    """
    teacher_config, is_started = _make_teacher_config(config)
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


def _make_teacher_config(config: CacheConfig) -> tuple[TeacherConfig, bool]:
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


def _has_own_input(arch: str) -> bool:
    """Whether a file of weights of an arch is run with the published input where --normalize is not given.

    Not of torchvision, whose files were run with the mean and standard deviation of the data from the first version
    on: their caches keep their identity.
    """
    return arch.startswith(("timm:", "hf:"))


def _load_published(
    config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, console: Console
) -> tuple[PreparedModel, str]:
    """Load published weights, with their image size and normalisation; grey images are repeated for 3 channels."""
    arch = config.teacher
    configuration = find_configuration(arch)
    if configuration is None:
        raise UsageError("--weights DEFAULT needs --teacher torchvision:NAME, timm:NAME or hf:NAME")
    classes, size = configuration.classes, config.teacher_size or configuration.size
    if not classes:
        raise UsageError(
            f"the published weights of {arch} have no classifier: the command teacher trains one, with --init DEFAULT"
        )
    if transfer_set.classes and len(transfer_set.classes) != classes and not config.class_map:
        raise UsageError(
            f"the published weights of {arch} output {classes} classes, the data have {len(transfer_set.classes)}:"
            f" {MAP_ADVICE}"
        )
    if config.normalize:
        input_spec = replace(make_input_spec(config.normalize, transfer_set, views, arch), size=size)
        copies = 3 // input_spec.channels
        input_spec = replace(input_spec, channels=3, mean=input_spec.mean * copies, std=input_spec.std * copies)
    else:
        input_spec = make_published_spec(arch, size)
    if not arch.startswith("torchvision:"):  # whose caches were made bilinear from the first version on
        input_spec = replace(input_spec, interpolation=configuration.interpolation)
    source = "by --normalize" if config.normalize else "as published with it"
    console.print(f"input of {arch}: {input_spec.describe()}, {source}")
    network = build(arch, classes, 3, size)
    load_weights(network, load_published_state(arch, 3, size), f"{arch} DEFAULT")
    return PreparedModel(network, input_spec), arch


def _use_teacher_size(input_spec: InputSpec, config: CacheConfig) -> InputSpec:
    """Return the preparation of the teacher's input, at the size of --teacher-size where that is given."""
    return replace(input_spec, size=config.teacher_size or input_spec.size)
