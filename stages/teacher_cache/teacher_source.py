"""Loading the teacher: weights of a file, of a run or of torchvision, or of a teacher that is trained first."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from softcache.base.errors import CacheError, UsageError
from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.models import build
from softcache.pipeline.models.archs.torchvision_models import load_published_weights
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import find_weights_file, hash_weights, load_weights, read_state_dict
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.distributed.ranks import broadcast_from_first
from softcache.stages.runs.folder import read_json
from softcache.stages.teacher.command import fill_defaults, train_teacher
from softcache.stages.teacher.data import FOLDER_OPTIONS, SPLIT_OPTIONS, make_input_spec


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
    if not config.weights:
        folder = broadcast_from_first(lambda: _train_teacher(config, console))  # one of several ranks trains it
        config = replace(config, weights=folder, teacher="", normalize="")
    if config.weights == "DEFAULT":
        return _load_published(config, transfer_set)
    path = Path(config.weights)
    seeds = sorted(path.glob("seed-*"))
    if seeds and find_weights_file(path) == path:
        raise UsageError(f"the run '{path}' has several seeds: name one of them, such as --weights {seeds[0]}")
    if not path.exists():
        raise UsageError(f"there are no weights at '{path}'")
    arch, input_spec = config.teacher, None
    if path.is_dir() and (path / "result.json").is_file():
        arch, input_spec = _read_run(path, config)
        _note_different_split(path, config, console)
    if not arch:
        raise UsageError(f"--weights {path} does not record its arch: name it with --teacher")
    state = read_state_dict(find_weights_file(path))
    if input_spec is None:
        input_spec = make_input_spec(config.normalize or "data", transfer_set, views)
    if input_spec.channels < transfer_set.channels:
        raise UsageError(f"the teacher takes {input_spec.channels} channel, the images have {transfer_set.channels}")
    classes = len(transfer_set.classes) or _count_classes(state, path)
    network = build(arch, classes, input_spec.channels, input_spec.size)
    load_weights(network, state, str(path))
    return PreparedModel(network, input_spec), arch


def load_cache_teacher(cache: Cache, weights: str, arch: str) -> PreparedModel:
    """Load the teacher of a cache.

    Args:
        cache: The cache; its manifest has the arch, the preparation of the input and the digest of the weights.
        weights: A state dict, the folder of a run, or DEFAULT for torchvision's own.
        arch: The teacher's arch; may be empty where it is one of the built-in ones. A user's own code has to be named
            here: what a manifest names is not imported.

    Returns:
        The teacher in eval mode, on the CPU.

    Raises:
        UsageError: arch is not that of the cache, or is a user's code and not named; or the weights do not fit it.
        CacheError: The weights are not those of the cache.
    """
    recorded = cache.teacher
    is_own_code = ":" in recorded and not recorded.startswith(("mlp:", "torchvision:"))
    if arch != recorded and (arch or is_own_code):
        raise UsageError(f"the cache's teacher is {recorded!r}: name it with --teacher, if you trust that code")
    input_spec = cache.input_spec
    network = build(recorded, cache.classes, input_spec.channels, input_spec.size)
    if weights == "DEFAULT":
        state = load_published_weights(recorded.partition(":")[2])[0]
    else:
        state = read_state_dict(find_weights_file(Path(weights)))
    load_weights(network, state, weights)
    digest, cache_digest = hash_weights(network), cache.manifest.identity["teacher"]["weights"]
    if digest != cache_digest:
        raise CacheError(
            f"the weights of '{weights}' are not those of the cache: teacher.weights {digest[:16]}…,"
            f" in the cache {cache_digest[:16]}…"
        )
    return PreparedModel(network, input_spec).eval()


def _count_classes(state: dict[str, torch.Tensor], path: Path) -> int:
    """Count the classes of a teacher by the rows of its last matrix, where the images have no classes."""
    matrices = [weight for weight in state.values() if weight.ndim == 2]
    if not matrices:
        raise UsageError(f"neither the weights of {path} nor the images show how many classes there are")
    return int(matrices[-1].shape[0])


def _read_run(path: Path, config: CacheConfig) -> tuple[str, InputSpec]:
    """Read the arch and the input preparation of a run's teacher or student, and check the options against them."""
    result = read_json(path / "result.json")
    try:
        record = result["student"] if (path / "student.pt").is_file() else result["teacher"]
        arch, input_spec = str(record["arch"]), InputSpec.from_json(record["preparation"])
    except (KeyError, TypeError, ValueError):
        raise CacheError(f"'{path / 'result.json'}' does not have the arch and preparation of its weights") from None
    if config.teacher and config.teacher != arch:
        raise UsageError(f"--teacher {config.teacher}, but the run '{path}' is of {arch}")
    if config.normalize:
        raise UsageError(
            f"--normalize {config.normalize}, but the run '{path}' records how its input is normalised: leave it out"
        )
    return arch, input_spec


def _note_different_split(path: Path, config: CacheConfig, console: Console) -> None:
    """Print a line where the run of a teacher split the same data differently from this cache."""
    if not (path / "settings.json").is_file():
        return
    recorded = read_json(path / "settings.json")
    if "val_fraction" not in recorded or recorded.get("data") != config.data:
        return
    differences = _list_differences(recorded, config, [name for name in SPLIT_OPTIONS if name in recorded])
    if differences:
        console.print(
            f"the teacher in '{path}' was trained on another split ({'; '.join(differences)}): validation may hold"
            " rows that it was trained on, and then fits, --select and tune rate it too highly"
        )


def _list_differences(
    recorded: dict[str, Any], config: CacheConfig | TeacherConfig, names: Iterable[str]
) -> list[str]:
    """List the options of these names that differ from those of a run's settings.json."""
    return [
        f"{name} {recorded.get(name)} there, {getattr(config, name)} here"
        for name in names
        if recorded.get(name) != getattr(config, name)
    ]


def _train_teacher(config: CacheConfig, console: Console) -> str:
    """Train a teacher with the defaults of the data, in a folder beside the cache, unless it is there already.

    Returns:
        The folder of its run.
    """
    folder = Path(f"{config.out}-teacher")
    teacher_config = fill_defaults(
        TeacherConfig(
            data=config.data,
            data_root=config.data_root,
            arch=config.teacher,
            normalize=config.normalize or "data",
            device=config.device,
            workers=config.workers,
            out=str(folder),
            **{name: getattr(config, name) for name in (*SPLIT_OPTIONS, *FOLDER_OPTIONS)},
        )
    )
    is_started = (folder / "settings.json").is_file()
    if is_started:
        defaults = {name: getattr(TeacherConfig, name) for name in FOLDER_OPTIONS}
        recorded = defaults | read_json(folder / "settings.json")
        names = ("data", "arch", "normalize", *SPLIT_OPTIONS, *FOLDER_OPTIONS)
        if differences := _list_differences(recorded, teacher_config, names):
            raise CacheError(
                f"the teacher in '{folder}' was trained with other options ({'; '.join(differences)}):"
                " name it with --weights, or choose another --out"
            )
    if (folder / "result.json").is_file():
        console.print(f"no --weights: using the teacher in '{folder}'")
        return str(folder)
    console.print(f"no --weights: training the teacher {teacher_config.arch} first, in '{folder}'")
    teacher_config = replace(teacher_config, resume=is_started)
    result = train_teacher(teacher_config, folder, console, advice="; WEIGHTS=… (--weights) skips it")
    figures = result["teacher"]["test"] or result["teacher"]["val"]
    seconds = format_duration(result["seconds"]["train"])
    console.print(f"teacher {teacher_config.arch}: accuracy {figures['accuracy']:.4f} in {seconds}")
    return str(folder)


def _load_published(config: CacheConfig, transfer_set: TransferSet) -> tuple[PreparedModel, str]:
    """Load torchvision's weights, with their image size and normalisation; grey images are repeated for 3 channels."""
    arch = config.teacher
    if not arch.startswith("torchvision:"):
        raise UsageError("--weights DEFAULT needs --teacher torchvision:NAME")
    state, size, mean, std, names = load_published_weights(arch.partition(":")[2])
    if transfer_set.classes and len(transfer_set.classes) != len(names):
        raise UsageError(
            f"the published weights of {arch} output {len(names)} classes, the data have {len(transfer_set.classes)}"
        )
    network = build(arch, len(names), 3, size)
    load_weights(network, state, f"{arch} DEFAULT")
    return PreparedModel(network, InputSpec(3, size, tuple(mean), tuple(std))), arch
