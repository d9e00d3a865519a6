"""Command lines for people to copy."""

import dataclasses
import re
from pathlib import Path
from shlex import quote
from typing import Any

from softcache.base.errors import make_printable
from softcache.data.sources import DATASET, format_placeholder, has_argument, is_user_dataset
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import is_custom_arch, is_external_arch
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.models.other_frameworks.file_network import parse_file_teacher

from .configs import CacheConfig, CheckConfig, HeadConfig
from .options import to_flag
from .typed_command import program_name


def format_command(command: str, config: Any, *arguments: object, **changes: Any) -> str:
    """Format a command line with every option that is not at its default.

    Args:
        command: its name, such as "student".
        config: its options. Floats are written so that they are read back as the same ones.
        arguments: what comes before the options, such as the folder of a run.
        changes: options that replace those of config.
    """
    config = dataclasses.replace(config, **changes)
    options = [
        text
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
        for text in _format_option(field.name, value)
    ]
    return " ".join([program_name(), command, *(quote(make_printable(text, None)) for text in arguments), *options])


def _format_option(name: str, value: Any) -> list[str]:
    """Format an option; one that may be repeated once for each of its values."""
    if isinstance(value, bool):
        return [to_flag(name) if value else f"--no-{to_flag(name)[2:]}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"{to_flag(name)} {quote(make_printable(item, None))}" for item in values]


def read_cache_config(cache: CacheReader) -> CacheConfig:
    """Return the options of teacher-cache that a cache records, as far as they are of the right type."""
    manifest = cache.manifest
    recorded = select_cache_options(manifest.settings)
    if cache.views.name == "resized-crop-flip" and "revision=" not in recorded.get("views", "revision="):
        views = recorded["views"]  # without a revision, this text would mean the newest one
        recorded["views"] = f"{views}{',' if ':' in views else ':'}revision={cache.views.revision}"
    return CacheConfig(**recorded | {"draws": manifest.draws, "taps": ",".join(manifest.taps)})


def select_cache_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those recorded settings that are options of teacher-cache and of the right type."""
    types = {field.name: type(field.default) for field in dataclasses.fields(CacheConfig)}
    return {name: value for name, value in settings.items() if name in types and type(value) is types[name]}


def format_remake_command(cache: CacheReader, **changes: Any) -> str:
    """Format the command that makes a cache like this one.

    A manifest names the last part of the weights' path alone: where it is not found here, PATH/TO/ stands before it,
    to be replaced.

    Args:
        cache: the cache.
        changes: options that differ; without `out` it is a new folder beside it.

    Returns:
        The command; the call of `softcache.build_cache` where the cache has a teacher or data that were passed in
        Python.
    """
    if "head" in cache.manifest.identity["teacher"]:
        return format_head_command(cache, data=changes.get("data", ""))
    config = read_cache_config(cache)
    defaults = {"out": find_free_name(str(cache.folder)), "weights": _locate_weights(config.weights, cache.folder)}
    if file_teacher := parse_file_teacher(config.teacher):
        defaults["teacher"] = f"{file_teacher[0]}:{_locate_weights(file_teacher[1], cache.folder)}"
    is_unnamed = cache.data == DATASET and not is_user_dataset(changes.get("data", ""))
    if is_unnamed or is_live_arch(cache.teacher):
        return _format_call(cache, defaults | changes)
    return format_command("teacher-cache", config, **defaults | changes)


def format_head_command(cache: CacheReader, data: str = "") -> str:
    """Format the command that made a cache of a cache of embeddings; it adds draws that these have meanwhile.

    Args:
        cache: What the command made.
        data: The data, where the command has to name them; "" for a placeholder.
    """
    settings = {name: cache.manifest.settings.get(name) for name in ("embeddings", "head", "labelled", "seed")}
    head = str(settings["head"] or "")
    config = HeadConfig(
        head=head if head in ("probe", "centroids") else _locate_weights(head, cache.folder),
        labelled=int(settings["labelled"] or 0),
        seed=int(settings["seed"] or 0),
        data=data or (format_placeholder(cache.data) if has_argument(cache.data) else ""),
        out=str(cache.folder),
    )
    return format_command("head-cache", config, _locate_weights(str(settings["embeddings"]), cache.folder))


def _format_call(cache: CacheReader, changes: dict[str, Any]) -> str:
    """Format the call that makes a cache like this one; placeholders stand for what a file cannot name."""
    data = "your_data" if cache.data == DATASET or has_argument(cache.data) else repr(cache.data)
    draws = changes.get("draws", cache.manifest.draws)
    taps = [tap for tap in changes.get("taps", ",".join(cache.manifest.taps)).split(",") if tap]
    names = f", taps={make_printable(taps, None)}" if taps else ""
    out = make_printable(repr(changes["out"]), None)
    return f"softcache.build_cache({out}, your_teacher, {data}, draws={draws}{names}, …)"


def format_repair_command(cache: CacheReader, config: CheckConfig) -> str:
    """Format the command that repairs a cache, with the teacher's weights where they are found here.

    Args:
        cache: the cache, in whose manifest a user's code may be named as the arch: a placeholder stands for it.
        config: the options of `check-cache`.
    """
    recorded = read_cache_config(cache)
    has_own_teacher = Path(f"{cache.folder}-teacher/result.json").is_file()
    file_teacher = parse_file_teacher(recorded.teacher)
    name = file_teacher[1] if file_teacher else recorded.weights
    weights = config.weights or ("" if has_own_teacher else _locate_weights(name, cache.folder))
    config = dataclasses.replace(
        config,
        repair=True,
        deep=False,
        weights=weights or ("" if has_own_teacher or parse_file_teacher(config.teacher) else "PATH/TO/WEIGHTS"),
        data=config.data or (format_placeholder(cache.data) if has_argument(cache.data) else ""),
        teacher=config.teacher or _format_external_arch(cache.teacher),
        json=False,
    )
    return format_command("check-cache", config, cache.folder)


def _format_external_arch(arch: str) -> str:
    """Return what stands for an arch that only a person may name; "" for any other."""
    if not is_external_arch(arch):
        return ""
    return "my_package.module:factory" if is_custom_arch(arch) else "hf:FOLDER"


def _locate_weights(name: str, cache: Path) -> str:
    """Return a path of weights of this name: in the current folder, under runs/ or beside the cache."""
    if name in ("", "DEFAULT"):
        return name
    candidates = (Path(name), Path("runs") / name, cache.parent / name)
    return next((str(path) for path in candidates if path.exists()), f"PATH/TO/{name}")


def find_free_name(path: str) -> str:
    """Return the first of path-2, path-3 … that does not exist."""
    stem = re.sub(r"-[0-9]+$", "", path)
    return next(name for n in range(2, 1_000_000) if not Path(name := f"{stem}-{n}").exists())
