"""A cache's transfer set, found and checked."""

from pathlib import Path

from softcache.base.errors import CacheError, CacheMismatchError
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.reader import Cache
from softcache.stages.cli.console import progress
from softcache.stages.cli.copied_commands import format_remake_command


def load_cache_data(cache: Cache, data: str, root: Path) -> TransferSet:
    """The cache's transfer set; when it is another one, the message ends with the command for a cache of that."""
    try:
        return cache.load_transfer_set(data, root, progress)
    except CacheMismatchError as error:
        right = format_remake_command(cache, data=data or cache.data)
        raise CacheError(f"{error}\nMake a cache of these data with  {right}") from None
