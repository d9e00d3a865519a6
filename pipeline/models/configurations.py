"""What is published of a network of torchvision, timm or transformers: its input, its classes, its weights."""

import torch

from .archs.hf_models import find_hf_configuration, load_hf_weights
from .archs.network_configuration import NetworkConfiguration
from .archs.timm_models import find_timm_configuration, load_timm_weights
from .archs.torchvision_models import find_torchvision_configuration, load_published_weights

__all__ = ["NetworkConfiguration", "find_configuration", "has_published_weights", "load_published_state"]

DEFAULT = "DEFAULT"  # in place of a file: the published weights

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


def has_published_weights(arch: str) -> bool:
    """Whether an arch is a model of a library that publishes weights."""
    name, _, argument = arch.partition(":")
    return name in _FINDERS and bool(argument)


def load_published_state(arch: str, channels: int, size: int) -> dict[str, torch.Tensor]:
    """Load the published weights of a network: of `hf:` from its folder, of the others from a cache or the network.

    Args:
        arch: One that has_published_weights.
        channels, size: Of the network's input.

    Returns:
        Its state dict, with as many classes as were published, see `find_configuration`.

    Raises:
        UsageError: There is no such model, or it cannot take such images.
        CacheError: The weights cannot be downloaded, or a file is missing or damaged.
    """
    name, _, argument = arch.partition(":")
    if name == "torchvision":
        return load_published_weights(argument).state_dict
    return load_timm_weights(argument, channels, size) if name == "timm" else load_hf_weights(argument, channels, size)
