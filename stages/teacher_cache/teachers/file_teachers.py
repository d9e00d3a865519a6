"""Teachers that a file defines: a model in ONNX, or targets that were made elsewhere."""

from dataclasses import replace
from pathlib import Path

import torch

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.packages import require_extra
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy, parse_views
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models.other_frameworks.file_network import FILE_TEACHERS, FileNetwork, parse_file_teacher
from softcache.pipeline.models.other_frameworks.onnx_network import OnnxNetwork, load_onnx_network
from softcache.pipeline.models.prepared_model import PIXEL_STD, PreparedModel
from softcache.pipeline.taps.hooks import list_layers
from softcache.stages.cli.configs import CacheConfig, CheckConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.runs.environment import select_device
from softcache.stages.teacher.data import make_input_spec

from .logit_files import check_logit_file
from .stored_targets import load_stored_targets


def check_file_teacher(config: CacheConfig) -> list[str]:
    """Check, before an image is read, that the file of the teacher exists and that the options fit it.

    Args:
        config: Options of the command, with the defaults of the data set; its teacher is `onnx:FILE` or `logits:FILE`.

    Returns:
        The layers that can be tapped.

    Raises:
        UsageError: There is no such file, or an option does not fit it.
    """
    name, argument = _parse(config.teacher)
    if not argument:
        raise UsageError(f"--teacher {config.teacher} needs a file after its colon: --teacher {_placeholder(name)}")
    for option, is_default in (
        ("--weights", not config.weights),
        ("--weights-key", not config.weights_key),
        (f"--precision {config.precision}", config.precision == "float32"),
        ("--compile", not config.compile),
        (f"--device {config.device}", config.device in ("auto", "cpu")),
    ):
        if not is_default:
            raise UsageError(
                f"{option} is for networks of PyTorch, not for --teacher {_placeholder(name)}, which is read from its"
                " file and runs on the CPU: leave it out"
            )
    if name == "logits":
        _check_stored_targets(config, Path(argument))
        return []
    require_extra("--teacher onnx:FILE needs", "onnx", "onnx", "onnxruntime")
    if not config.normalize:
        raise UsageError(
            f"--teacher {config.teacher} needs --normalize, the input that the model takes: imagenet, none (0 to 1),"
            " pixels (0 to 255), data, or mean=…,std=… for values of 0 to 1"
        )
    return list_layers(load_onnx_network(Path(argument)))


def load_file_teacher(
    config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, console: Console
) -> tuple[PreparedModel, str]:
    """Load the teacher of a file.

    Args:
        config: Options of the command, see `check_file_teacher`.
        transfer_set: The data.
        views: The view policy, with a size.
        console: Prints what of the file is not used.

    Returns:
        The teacher, on the CPU, and its arch.

    Raises:
        UsageError: The file does not fit the data or the options.
        CacheError: The file is damaged.
    """
    name, argument = _parse(config.teacher)
    if name == "onnx":
        return _load_onnx_teacher(Path(argument), config, transfer_set, views), name
    network, notes = load_stored_targets(Path(argument), transfer_set, progress)
    for note in notes:
        console.print(note)
    return PreparedModel(network, make_input_spec(config.normalize or "data", transfer_set, views)), name


def load_cached_file_teacher(cache: CacheReader, transfer_set: TransferSet, config: CheckConfig) -> PreparedModel:
    """Load the teacher of a cache from its file.

    Args:
        cache: The cache, whose teacher is a file.
        transfer_set: Its data.
        config: Options of check-cache: the file is named by `weights`, or by `teacher` as for teacher-cache.

    Raises:
        UsageError: The file is not named, or is of another kind.
        CacheError: The file is another one than that of the cache, or is damaged.
    """
    name, path = cache.teacher, get_file(config)
    if config.teacher and _parse(config.teacher)[0] != name:
        raise UsageError(f"--teacher {config.teacher}, but '{cache.folder}' is of {_placeholder(name)}")
    if name == "onnx":
        require_extra("a teacher in ONNX format needs", "onnx", "onnx", "onnxruntime")
        network: FileNetwork = load_onnx_network(Path(path))
    else:
        network = load_stored_targets(Path(path), transfer_set, progress)[0]
    recorded = cache.manifest.identity["teacher"]["weights"]
    if network.digest != recorded:
        raise CacheError(
            f"'{make_printable(path)}' is not the teacher of the cache: teacher.weights {network.digest[:16]}…,"
            f" in the cache {recorded[:16]}…"
        )
    if isinstance(network, OnnxNetwork):
        output = str(cache.manifest.identity["teacher"].get("output", ""))
        network.find_logits(output, cache.classes, cache.input_spec.channels, cache.input_spec.size)
    return PreparedModel(network, cache.input_spec).eval()


def get_file(config: CheckConfig) -> str:
    """Return the file of a teacher that the options of check-cache name; "" where they name none."""
    parsed = parse_file_teacher(config.teacher)
    return config.weights or (parsed[1] if parsed else "")


def select_teacher_device(teacher: PreparedModel, device: str) -> torch.device:
    """Select the device of a teacher: the CPU for one that a file defines, else that of --device."""
    return torch.device("cpu") if isinstance(teacher.network, FileNetwork) else select_device(device)


def is_file_arch(arch: str) -> bool:
    """Return whether the arch in an identity is that of a teacher that a file defines."""
    return arch in FILE_TEACHERS


def _load_onnx_teacher(path: Path, config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy) -> PreparedModel:
    """Load a model in ONNX format. Its input has the model's own size and channels, where the model has some."""
    network = load_onnx_network(path)
    spec = make_input_spec(config.normalize, transfer_set, views)
    channels = network.input.channels or spec.channels
    if channels < max(transfer_set.channels, spec.channels):
        text = f"--normalize {config.normalize} has" if transfer_set.channels == 1 else "the images have"
        raise UsageError(f"'{path}' takes {channels} channel, {text} {max(transfer_set.channels, spec.channels)}")
    size = network.input.size or config.teacher_size or views.size
    if config.teacher_size not in (0, size):
        raise UsageError(f"--teacher-size {config.teacher_size}: '{path}' takes {size} pixels alone")
    spec = replace(spec.with_channels(channels), size=size)
    if network.input.dtype == "uint8" and (set(spec.mean), set(spec.std)) != ({0.0}, {PIXEL_STD}):
        raise UsageError(f"'{path}' takes uint8 pixels, not normalised values: say --normalize pixels")
    network.find_logits(config.output, len(transfer_set.classes), spec.channels, spec.size)
    return PreparedModel(network, spec)


def _check_stored_targets(config: CacheConfig, path: Path) -> None:
    """Raise UsageError where the options need a network, or other views than the images themselves."""
    views = parse_views(config.views)
    if views != views.without_augmentation():
        raise UsageError(
            f"--views {config.views}: targets that were made elsewhere are of the plain images alone: --views none"
        )
    if config.draws > 1:
        raise UsageError(f"--draws {config.draws}: targets that were made elsewhere are of one view: --draws 1")
    size = str(config.teacher_size or "")
    for option, value in (("--taps", config.taps), ("--output", config.output), ("--teacher-size", size)):
        if value:
            raise UsageError(
                f"{option} {value}: targets that were made elsewhere are of no network that is run here: leave it out"
            )
    check_logit_file(path)


def _parse(teacher: str) -> tuple[str, str]:
    parsed = parse_file_teacher(teacher)
    if parsed is None:
        raise UsageError(f"--teacher {teacher} is no file: there are {', '.join(map(_placeholder, FILE_TEACHERS))}")
    return parsed


def _placeholder(name: str) -> str:
    return f"{name}:{FILE_TEACHERS.get(name, 'FILE')}"
