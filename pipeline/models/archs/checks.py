"""Checks of arguments that several archs share."""

from softcache.base.errors import UsageError


def check_no_argument(arch: str, argument: str) -> None:
    """Raise UsageError unless nothing follows the colon of an arch."""
    if argument:
        raise UsageError(f"arch '{arch}:{argument}': {arch} takes no argument")


def check_image_size(minimum: int, arch: str, size: int) -> None:
    """Raise UsageError for images that are smaller than the minimum, of which pooling would leave nothing."""
    if size < minimum:
        raise UsageError(f"arch '{arch}' needs images of at least {minimum} px, these are {size} px")
