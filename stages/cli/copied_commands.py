"""Commands in words, for lines that are to be copied."""

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
    """How the commands are called here, for lines that are to be copied."""
    if Path(sys.argv[0]).name == "softcache":
        return "softcache"
    python, here = Path(sys.executable), Path.cwd()
    return f"{python.relative_to(here) if python.is_relative_to(here) else python} -m softcache"


def format_command(stage: str, config: Any, **changes: Any) -> str:
    """The command of a stage: every setting that is not its default, with changes put in.

    Floats are written so that they are read back as the same ones.
    """
    config = dataclasses.replace(config, **changes)
    said = [
        word
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != f.default
        for word in _format_option(f.name, value)
    ]
    return " ".join([program_name(), stage, *said])


def _format_option(name: str, value: Any) -> list[str]:
    """A setting as the command line says it; one that may be repeated once for each of its values."""
    if isinstance(value, bool):
        return [to_flag(name) if value else f"--no-{to_flag(name)[2:]}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"{to_flag(name)} {quote(make_printable(one, None))}" for one in values]


def read_cache_config(cache: Cache) -> CacheConfig:
    """The settings of stage one that a cache says it was made with, as far as they are of the right kind."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(CacheConfig)}
    manifest = cache.manifest
    said: dict[str, Any] = {k: v for k, v in manifest.settings.items() if k in kinds and type(v) is kinds[k]}
    return CacheConfig(**said | {"draws": manifest.draws, "taps": ",".join(manifest.taps)})


def format_remake_command(cache: Cache, **changes: Any) -> str:
    """The command that makes a cache like this one, but for changes, in a new folder unless they name one."""
    return format_command(
        "teacher-cache", read_cache_config(cache), **{"out": find_free_name(str(cache.folder)), **changes}
    )


def find_free_name(path: str) -> str:
    """path-2, path-3 …: the first that is not there."""
    stem = re.sub(r"-[0-9]+$", "", path)
    return next(name for n in range(2, 1_000_000) if not Path(name := f"{stem}-{n}").exists())
