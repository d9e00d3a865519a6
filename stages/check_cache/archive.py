"""`softcache cache-pack` and `cache-unpack`: a cache as one file, for another machine."""

import json
from contextlib import ExitStack
from pathlib import Path
from shlex import quote

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.cache.archive import OnProgress, pack_cache, unpack_cache
from softcache.pipeline.cache.manifest import Manifest
from softcache.pipeline.cache.reader import CacheReader
from softcache.stages.cli.configs import ArchiveConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.cli.copied_commands import find_free_name
from softcache.stages.cli.typed_command import program_name


def run_pack(name: str, file: str, config: ArchiveConfig) -> None:
    """Pack a cache into a tar file, and print the command that unpacks it.

    Args:
        name: Folder of the cache.
        file: The tar file to write.
        config: Options of the command.

    Raises:
        UsageError: The file exists, or its folder does not.
        CacheError: The cache is damaged.
    """
    console, cache, out = Console(config.json), CacheReader(Path(name)), Path(file)
    if out.exists():
        raise UsageError(f"'{file}' exists: choose another name")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder '{out.parent}'")
    with progress_bar(cache.manifest.bytes, "cache-pack", "B", scale=True) as bar:
        pack_cache(cache.folder, cache.manifest, out, bar.update)
    size = out.stat().st_size
    if config.json:
        return console.print_json(json.dumps({"file": file, "bytes": size, "manifest": cache.manifest.digest}))
    target = f"caches/{cache.folder.resolve().name}"
    target = find_free_name(target) if Path(target).exists() else target
    console.print(f"'{file}': {size / 1e6:.1f} MB, every byte checked")
    console.print(f"unpack it with:  {program_name()} cache-unpack {quote(file)} {quote(target)}")


def run_unpack(file: str, name: str, config: ArchiveConfig) -> None:
    """Unpack a tar file into the folder of a cache.

    Args:
        file: The tar file.
        name: Folder of the cache to write.
        config: Options of the command.

    Raises:
        UsageError: There is no such file.
        CacheError: It does not hold a complete cache, or the folder holds something else.
    """
    console, source, folder = Console(config.json), Path(file), Path(name)
    if not source.is_file():
        raise UsageError(f"there is no file '{file}'")
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"'{folder}' is a file: a cache is a folder")
    with ExitStack() as stack:

        def start_progress(manifest: Manifest) -> OnProgress:
            """Show a progress bar, once the manifest says how many bytes there are."""
            bar = stack.enter_context(progress_bar(manifest.bytes, "cache-unpack", "B", scale=True))

            def on_progress(count: int) -> None:
                bar.update(count)

            return on_progress

        manifest = unpack_cache(source, folder, start_progress)
    if config.json:
        return console.print_json(json.dumps({"cache": name, "bytes": manifest.bytes, "manifest": manifest.digest}))
    console.print(f"'{name}': {manifest.bytes / 1e6:.1f} MB, {manifest.draws} draws, every byte checked")
