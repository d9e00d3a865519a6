"""The transfer set of a cache, and whether it has labels."""

from pathlib import Path

from softcache.base.errors import CacheError, CacheMismatchError
from softcache.data.content_index import ContentIndex
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.manifest import Manifest
from softcache.pipeline.cache.reader import CacheReader
from softcache.stages.cli.console import progress
from softcache.stages.cli.copied_commands import format_remake_command

from .figures import Figures


def load_cache_data(cache: CacheReader, data: str, root: Path, index: ContentIndex) -> TransferSet:
    """Load the transfer set of a cache and check it.

    Args:
        cache: the cache.
        data: name of the transfer set; "" for the one in the cache's manifest.
        root: folder of data sets.
        index: where it is recorded what the files hold.

    Raises:
        CacheError: for another transfer set than the cache's; the message has the command that makes a cache of it.
    """
    try:
        return cache.load_transfer_set(data, root, progress, index)
    except CacheMismatchError as error:
        command = format_remake_command(cache, data=data or cache.data)
        raise CacheError(f"{error}\nMake a cache of these data with  {command}") from None


def format_teacher_accuracies(manifest: Manifest) -> str:
    """Format the teacher's accuracy on each split that has labels, `train 1.0000, val 0.9944`; "" where none has."""
    return ", ".join(
        f"{split} {Figures(figures).format('accuracy')}"
        for split, figures in manifest.teacher.items()
        if has_labels(manifest, split)
    )


def has_labels(manifest: Manifest, split: str) -> bool:
    """Whether a split of a cache has labels, by its manifest: no image is read."""
    return Figures(manifest.teacher.get(split) or {}).has_labels()
