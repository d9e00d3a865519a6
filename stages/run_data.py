"""A cache's transfer set, found and checked."""

from pathlib import Path

from softcache.data.errors import OtherCache, Refused
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache import Cache

from .command_line import remake
from .console import progress


def data_of(cache: Cache, data: str, root: Path) -> TransferSet:
    """The cache's transfer set; when it is another one, the message ends with the command for a cache of that."""
    try:
        return cache.transfer_set(data, root, progress)
    except OtherCache as error:
        right = remake(cache, data=data or cache.data)
        raise Refused(f"{error}\nMake a cache of these data with  {right}") from None
