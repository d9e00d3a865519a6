"""Loading the teacher: weights of a file, of a run or as published, or of a teacher that is trained first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import EMBEDDING
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.pipeline.models import build, check_arch, is_custom_arch, is_external_arch
from softcache.pipeline.models.archs.torchvision_models import SMALL_ADVICE, has_other_stem
from softcache.pipeline.models.checkpoint_files import choose_state_dict, describe_choice, read_checkpoint
from softcache.pipeline.models.class_map import MAP_ADVICE
from softcache.pipeline.models.configurations import (
    DEFAULT,
    find_configuration,
    has_published_weights,
    load_published_state,
)
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.models.feature_extraction import build_feature_extractor, has_removable_classifier
from softcache.pipeline.models.other_frameworks.callable_networks import load_callable, prepare_callable
from softcache.pipeline.models.prepared_model import PUBLISHED, InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import count_outputs, find_weights_file, load_weights
from softcache.stages.cli.configs import CacheConfig
from softcache.stages.cli.console import Console
from softcache.stages.distributed.ranks import broadcast_from_first
from softcache.stages.teacher.data import (
    can_be_rows,
    check_normalize,
    make_input_spec,
    make_published_spec,
)

from .cache_teacher_training import make_teacher_config, train_cache_teacher
from .recorded_run import check_same_classes, note_different_split, read_run


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
        folder = broadcast_from_first(lambda: train_cache_teacher(config, transfer_set, views, console))
        config = replace(config, weights=folder, normalize="", output="")
    if config.weights_key and (config.weights == DEFAULT or Path(config.weights).is_dir()):
        raise UsageError(f"--weights-key {config.weights_key} is for a file of weights, not for {config.weights}")
    if config.weights == DEFAULT:
        return _load_published(config, transfer_set, views, console)
    path = Path(config.weights)
    _check_weights_exist(path)
    arch, output, input_spec = config.teacher, config.output, None
    is_embedding, gives_features = transfer_set.task == EMBEDDING, True
    if path.is_dir() and (path / "result.json").is_file():
        run = read_run(path, config)
        gives_features = run.task != EMBEDDING
        if not (config.class_map or is_embedding):
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
    channels, size, row_shape, layer = input_spec.channels, input_spec.size, input_spec.shape, ""
    try:
        if is_embedding and gives_features and has_removable_classifier(arch):
            network, layer, note = build_feature_extractor(arch, state, channels, size, str(path), row_shape)
        else:
            classes = 0 if config.class_map or is_embedding else len(transfer_set.classes)
            network = build(arch, classes or count_outputs(state, path), channels, size, output, shape=row_shape)
            note = load_weights(network, state, str(path), "" if is_embedding else MAP_ADVICE)
    except UsageError as error:
        raise UsageError(f"{error}{SMALL_ADVICE if has_other_stem(arch, error) else ''}") from None
    if note:
        console.print(f"weights: {note}")
    return PreparedModel(network, input_spec, features=layer), arch


def _load_custom(config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy) -> PreparedModel | None:
    """Load a teacher of a user's own with what it has learned: an estimator, a function, or with DEFAULT a network.

    Returns:
        The teacher; None for a network without --weights, which is trained.
    """
    input_spec = _use_teacher_size(make_input_spec(config.normalize or "data", transfer_set, views), config)
    classes = len(transfer_set.classes)
    value = load_callable(config.teacher, classes, input_spec.input_shape)
    if not isinstance(value, nn.Module):
        return _prepare_function(value, config, transfer_set, input_spec)
    if not config.weights:
        return None
    network = build(
        config.teacher,
        classes,
        input_spec.channels,
        input_spec.size,
        config.output,
        network=value,
        shape=input_spec.shape,
    )
    return PreparedModel(network, input_spec)


def _prepare_function(
    function: Any, config: CacheConfig, transfer_set: TransferSet, input_spec: InputSpec
) -> PreparedModel:
    """Prepare a function or an estimator, see prepare_callable."""
    return prepare_callable(
        function,
        config.teacher,
        transfer_set.classes,
        input_spec,
        is_normalized=bool(config.normalize),
        task=transfer_set.task,
    )


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
        return _prepare_function(network, config, transfer_set, input_spec)
    if config.class_map:  # the number of its classes, for messages and where it returns several tensors
        classes = count_outputs(network.state_dict(), config.teacher)
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
        teacher_config, _ = make_teacher_config(config)
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


def assumes_normalize(config: CacheConfig) -> bool:
    """Whether the weights come from elsewhere, and neither the command nor the arch has how input is normalised."""
    if _has_own_input(config.teacher):
        return False
    has_own_input = config.weights == DEFAULT and not is_custom_arch(config.teacher)
    is_from_elsewhere = is_live_arch(config.teacher) or (bool(config.weights) and not has_own_input)
    return is_from_elsewhere and not config.normalize and not (Path(config.weights) / "result.json").is_file()


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
    gives_features = transfer_set.task == EMBEDDING and has_removable_classifier(arch)
    if not (classes or gives_features):
        raise UsageError(
            f"the published weights of {arch} have no classifier: the command teacher trains one, with --init DEFAULT"
        )
    has_free_width = config.class_map or transfer_set.task == EMBEDDING
    if transfer_set.classes and len(transfer_set.classes) != classes and not has_free_width:
        raise UsageError(
            f"the published weights of {arch} output {classes} classes, the data have {len(transfer_set.classes)}:"
            f" {MAP_ADVICE}"
        )
    if config.normalize:
        input_spec = make_input_spec(config.normalize, transfer_set, views, arch).with_channels(3)
        input_spec = replace(input_spec, size=size)
    else:
        input_spec = make_published_spec(arch, size)
    if not arch.startswith("torchvision:"):  # whose caches were made bilinear from the first version on
        input_spec = replace(input_spec, interpolation=configuration.interpolation)
    source = "by --normalize" if config.normalize else "as published with it"
    console.print(f"input of {arch}: {input_spec.describe()}, {source}")
    state, name, layer = load_published_state(arch, 3, size), f"{arch} DEFAULT", ""
    if gives_features:
        network, layer, _ = build_feature_extractor(arch, state, 3, size, name)
    else:
        network = build(arch, classes, 3, size)
        load_weights(network, state, name)
    return PreparedModel(network, input_spec, features=layer), arch


def _use_teacher_size(input_spec: InputSpec, config: CacheConfig) -> InputSpec:
    """Return the preparation of the teacher's input, at the size of --teacher-size where that is given."""
    return replace(input_spec, size=config.teacher_size or input_spec.size)
