"""Refusals that rows of the table of archs share."""

from softcache.base.errors import UsageError


def check_no_argument(arch: str, argument: str) -> None:
    """Raises UsageError where something follows the colon."""
    if argument:
        raise UsageError(f"arch '{arch}:{argument}': {arch} takes no argument")


def check_image_size(least: int, arch: str, size: int) -> None:
    """Raises UsageError where pooling would leave nothing of a image."""
    if size < least:
        raise UsageError(f"arch '{arch}' needs images of at least {least} px, these are {size} px")
