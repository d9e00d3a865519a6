"""Command lines for people to copy."""

import dataclasses
import re
import sys
from pathlib import Path
from shlex import quote
from typing import Any

from softcache.base.errors import make_printable
from softcache.pipeline.cache.reader import Cache

from .configs import CacheConfig
from .options import to_flag


def program_name() -> str:
    """Return how this program was called: `softcache`, or `.venv/bin/python -m softcache`."""
    if Path(sys.argv[0]).name == "softcache":
        return "softcache"
    python, folder = Path(sys.executable), Path.cwd()
    return f"{python.relative_to(folder) if python.is_relative_to(folder) else python} -m softcache"


def format_command(command: str, config: Any, **changes: Any) -> str:
    """Format a command line with every option that is not at its default.

    Args:
        command: its name, such as "student".
        config: its options. Floats are written so that they are read back as the same ones.
        changes: options that replace those of config.
    """
    config = dataclasses.replace(config, **changes)
    options = [
        text
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
        for text in _format_option(field.name, value)
    ]
    return " ".join([program_name(), command, *options])


def _format_option(name: str, value: Any) -> list[str]:
    """Format an option; one that may be repeated once for each of its values."""
    if isinstance(value, bool):
        return [to_flag(name) if value else f"--no-{to_flag(name)[2:]}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"{to_flag(name)} {quote(make_printable(item, None))}" for item in values]


def read_cache_config(cache: Cache) -> CacheConfig:
    """Return the options of teacher-cache that a cache records, as far as they are of the right type."""
    manifest = cache.manifest
    recorded = select_cache_options(manifest.settings)
    return CacheConfig(**recorded | {"draws": manifest.draws, "taps": ",".join(manifest.taps)})


def select_cache_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those recorded settings that are options of teacher-cache and of the right type."""
    types = {field.name: type(field.default) for field in dataclasses.fields(CacheConfig)}
    return {name: value for name, value in settings.items() if name in types and type(value) is types[name]}


def format_remake_command(cache: Cache, **changes: Any) -> str:
    """Format the command that makes a cache like this one.

    Args:
        cache: the cache.
        changes: options that differ; without `out` it is a new folder beside it.
    """
    defaults = {"out": find_free_name(str(cache.folder))}
    return format_command("teacher-cache", read_cache_config(cache), **defaults | changes)


def find_free_name(path: str) -> str:
    """Return the first of path-2, path-3 … that does not exist."""
    stem = re.sub(r"-[0-9]+$", "", path)
    return next(name for n in range(2, 1_000_000) if not Path(name := f"{stem}-{n}").exists())
