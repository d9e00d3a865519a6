"""Stage one in one call: run a teacher once over a data set, and keep what it outputs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.arguments import check_names, check_path
from softcache.base.errors import UsageError
from softcache.base.progress import ProgressCallback, no_progress, resolve_progress
from softcache.base.user_modules import name_type
from softcache.data.content_index import open_index
from softcache.data.sources import DATASET
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.pipeline.cache.folder import MANIFEST_FILE
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import check_files, select_damage
from softcache.pipeline.loading.cache import Cache
from softcache.pipeline.models.custom_networks import name_live_arch
from softcache.pipeline.models.other_frameworks.callable_networks import is_estimator, is_regressor
from softcache.pipeline.models.other_frameworks.file_network import parse_file_teacher
from softcache.pipeline.models.prepared_model import format_normalize
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from softcache.stages.check_cache.repair import repair_files
from softcache.stages.cli.configs import CacheConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.defaults import ROW_DEFAULTS
from softcache.stages.teacher.data import FOLDER_OPTIONS, SPLIT_OPTIONS
from softcache.stages.teacher_cache.preparation import LiveObjects, PreparedCache, fill_defaults, prepare_cache
from softcache.stages.teacher_cache.reproducibility import check_reproducibility
from softcache.stages.teacher_cache.writing import write_cache

from .library_call import library_call, make_config

Normalize = str | tuple[Sequence[float], Sequence[float]]


def build_cache(
    path: str | Path,
    teacher: nn.Module | str | Any,
    data: Any,
    *,
    views: str = "",
    draws: int = 0,
    taps: Sequence[str] = (),
    normalize: Normalize | None = None,
    codec: str = "float16",
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
    weights: str | Path = "",
    class_names: Sequence[str] = (),
    task: str = "",
    axes: bool = False,
    seed: int = 0,
    repair: bool = False,
    progress: bool | ProgressCallback = False,
    **options: Any,
) -> Cache:
    """Run a teacher once over a data set, and write its outputs to a cache: `softcache teacher-cache` as a function.

    A call that was stopped goes on where it was when it is made again. A complete cache grows by the draws and taps
    that it does not have. Where it has all of them, the teacher is run on 256 views alone, to compare its outputs.

    Args:
        path: The folder of the cache.
        teacher: A network: images float32 [B, C, H, W] -> logits [B, K]. A copy of it is run in eval mode. Or the name
            of an arch, with `weights`. Its identity is its class, its state dict, and what it outputs for a few views.
            Or a fitted estimator of scikit-learn, whose predict_proba gets rows float32 [B, D]; of the task "numbers"
            a regressor, with predict; or a function of a batch of views, a NumPy array, that returns logits [B, K].
        data: As in `Cache`: a name, `folder:PATH`, or a map-style data set of (image, label) or of images, or a
            mapping of such by split. Images are PIL images, uint8 arrays or tensors, without augmentation: the views
            are made here. Arrays or tensors of one axis, [D], are rows of numbers. A label is an int, the number of a
            class; a float, or an array [D] of floats, numbers to predict; or an array [K] of 0, 1 and -1 (unknown),
            several labels; None where nothing is known. Without a "val", a tenth of the
            training images becomes the validation split (`val_fraction=0.1`); without a "test" there is no test split.
        views: The view policy, such as "crop-flip:pad=4"; "" for the default of the data. Teacher and students get the
            views at their size: that of the images, or "crop-flip:size=64".
        draws: Views of each training image; 0 for the default of the data.
        taps: Layers whose outputs are kept, whole or a statistic of them: "layer3", "layer3:pool".
        normalize: Mean and standard deviation of each channel, for values of 0 … 1; or "imagenet", "data" or "none".
            None for those of a timm model's `pretrained_cfg`, else "data".
        codec: How logits are stored: float16, float32 or sqrt8; some of many classes: top:20, sample:50; int8 for
            embeddings. Numbers are float32.
        batch_size: Views in a batch of the teacher.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: Processes that decode and render; 0 for a thread of this process.
        weights: With the name of an arch, a file of weights, the folder of a run, or "DEFAULT".
        class_names: Names of the classes of a data set that has none, such as one of tensors; needed where the teacher
            has more classes than the labels show. Of several labels or numbers, the names of these.
        task: What the teacher outputs: "classes", "labels" (several of each image), "numbers" or "embedding"; "" for
            what the labels are.
        axes: Keep the principal axes of an embedding as well, for losses with `standardize=axes`.
        seed: Of the views and of the split.
        repair: Read every byte of a complete cache, and compute the files again that are damaged. Files that are
            missing are computed again in any case.
        progress: True to show progress on standard error, or a function of (text, done, total).
        options: Further options of `softcache teacher-cache`, such as `val_fraction=0.2` or `precision="auto"`.

    Returns:
        The cache, opened with its data.

    Raises:
        CacheError: The folder holds another cache, or something cannot be read or written.
        UsageError: An argument does not exist or does not fit the data or the teacher.
        KeyboardInterrupt: On Ctrl-C. What was finished is kept.
    """
    is_teacher = isinstance(teacher, nn.Module | str) or is_estimator(teacher) or is_regressor(teacher)
    is_teacher = is_teacher or callable(teacher)
    if isinstance(teacher, type) or not is_teacher:
        raise UsageError(
            "a teacher is a torch.nn.Module, the name of an arch, a function or an estimator with predict_proba, not"
            f" {name_type(teacher)}"
        )
    if weights and not isinstance(teacher, str):
        raise UsageError("weights are for the name of an arch: load them into the network that you pass as teacher")
    if isinstance(teacher, str) and not weights and not isinstance(data, str) and not parse_file_teacher(teacher):
        raise UsageError(
            f"teacher='{teacher}' has no weights, and is trained on data that have a name alone: give weights=…, or a"
            " network that is trained"
        )
    config = make_config(
        CacheConfig,
        options,
        data=data if isinstance(data, str) else DATASET,
        teacher=teacher if isinstance(teacher, str) else name_live_arch(teacher),
        weights=str(weights),
        views=views,
        draws=draws or None,
        taps=_join_taps(taps),
        normalize=_format_normalize(normalize, teacher),
        codec=codec,
        batch_size=batch_size,
        device=device,
        workers=workers,
        seed=seed,
        task=task,
        axes=axes,
        out=str(check_path("path", path)),
    )
    with library_call(progress):
        config = fill_defaults(config)
        transfer_set = _load_data(data, config, class_names, progress)
        if transfer_set.shape:
            config = replace(config, views=views or ROW_DEFAULTS.views, draws=draws or ROW_DEFAULTS.draws)
        live = LiveObjects(None if isinstance(teacher, str) else teacher, transfer_set)
        console = Console.for_library()
        prepared = prepare_cache(config, console, live)
        if (Path(config.out) / MANIFEST_FILE).is_file():
            _check_existing(CacheReader(Path(config.out)), prepared, repair, console)
        write_cache(prepared, console)
        reader = CacheReader(Path(path))
        reader.check_transfer_set(transfer_set)
        return Cache.from_parts(TeacherEnsemble((reader,)), transfer_set, data=config.data)


def _check_existing(cache: CacheReader, prepared: PreparedCache, repair: bool, console: Console) -> None:
    """Compare what the teacher outputs for some views with what a complete cache holds, and mend its files.

    Args:
        cache: The cache.
        prepared: Its teacher and data.
        repair: Read every byte, to find all files that are damaged; else only those that are missing or cut off.
        console: Prints which files were computed again.

    Raises:
        CacheError: The teacher outputs something else.
    """
    cache.check_transfer_set(prepared.generator.transfer_set)
    if repair:
        bad = list(select_damage(check_files(cache, None, no_progress)))
    else:
        sizes = {record.path: record.bytes for record in cache.manifest.shards}
        bad = [path for path, size in sizes.items() if _get_size(cache.folder / path) != size]
    if bad:
        repair_files(cache, bad, prepared.generator, console)
    else:
        check_reproducibility(cache, prepared.generator).raise_if_different()


def _get_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _load_data(
    data: Any, config: CacheConfig, class_names: Sequence[str], progress: bool | ProgressCallback
) -> TransferSet:
    if isinstance(data, TransferSet):
        if config.task not in ("", data.task):
            raise UsageError(f"task='{config.task}', and the task of the transfer set is {data.task}: leave it out")
        return data
    arguments = {name: getattr(config, name) for name in (*SPLIT_OPTIONS, *FOLDER_OPTIONS)}
    if class_names:
        arguments["classes"] = tuple(check_names("class_names", class_names))
    index = open_index(config.index, config.rehash)
    return load_transfer_set(
        data, Path(config.data_root), **arguments, index=index, progress=resolve_progress(progress)
    )


def _join_taps(taps: Sequence[str]) -> str:
    return ",".join(check_names("taps", taps))


def _format_normalize(normalize: Normalize | None, teacher: object) -> str:
    """Return the option --normalize of a call; "" for the default."""
    if isinstance(normalize, str):
        return normalize
    if normalize is None:
        timm_config = getattr(teacher, "pretrained_cfg", None)
        if not (isinstance(timm_config, dict) and timm_config.get("mean") and timm_config.get("std")):
            return ""
        normalize = (timm_config["mean"], timm_config["std"])
    try:
        mean, std = ([float(value) for value in values] for values in normalize)
    except (TypeError, ValueError):
        raise UsageError(
            f"normalize={normalize!r} is no name and no pair of lists of numbers, such as ((0.5,) * 3, (0.5,) * 3)"
        ) from None
    return format_normalize(mean, std)
