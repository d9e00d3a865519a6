"""The published configuration of a network that has one: its input and the names of its classes."""

from .archs.hf_models import find_hf_configuration
from .archs.network_configuration import NetworkConfiguration
from .archs.timm_models import find_timm_configuration
from .archs.torchvision_models import find_torchvision_configuration

__all__ = ["NetworkConfiguration", "find_configuration"]

_FINDERS = {
    "torchvision": find_torchvision_configuration,
    "timm": find_timm_configuration,
    "hf": find_hf_configuration,
}


def find_configuration(arch: str) -> NetworkConfiguration | None:
    """Find the published configuration of a network. Nothing is downloaded but, for `hf:NAME`, its two JSON files.

    It is that of the published weights. A file of weights may have been trained with another input, or for other
    classes: `class_names` are then those of the file only where it has as many outputs.

    Args:
        arch: As of softcache.pipeline.models.build.

    Returns:
        Its configuration; None for an arch that has none, such as a built-in one or a user's own.

    Raises:
        UsageError: There is no such model, or the library that has it is not installed.
        CacheError: A file of `hf:NAME` is missing or damaged.
    """
    name, _, argument = arch.partition(":")
    return _FINDERS[name](argument) if name in _FINDERS and argument else None
