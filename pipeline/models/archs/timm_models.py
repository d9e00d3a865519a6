"""The classification models of timm, by name: `timm:resnet18`, or with the tag of its weights `timm:resnet18.a1_in1k`.

A network is used as timm has it: it is not adapted to small images. timm is imported where it is used: that takes
seconds.
"""

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError, make_printable, unknown_model_error
from softcache.base.packages import require_extra

from .network_configuration import NetworkConfiguration

_INTERPOLATIONS = ("bilinear", "bicubic")


def build_timm(name: str, classes: int, channels: int, size: int) -> nn.Module:
    """Build `timm:NAME`, with fresh weights.

    Args:
        name: A model that timm has registered, with or without the tag of its published weights.
        classes, channels, size: As of softcache.pipeline.models.build.

    Raises:
        UsageError: There is no such model, timm is not installed, or the model cannot take such images.
    """
    check_timm_model(name)
    return _create(name, channels, size, num_classes=classes)


def load_timm_weights(name: str, channels: int, size: int) -> dict[str, torch.Tensor]:
    """Load the published weights of `timm:NAME` by timm, from the hub's local cache or else from the network.

    Args:
        name: As of `build_timm`; without a tag the weights are those that timm takes by default.
        channels, size: Of the input; timm adapts the first convolution and the positions of patches.

    Returns:
        The state dict of `build_timm` for the classes of the weights.

    Raises:
        UsageError: There is no such model, or it cannot take such images.
        CacheError: There are no weights, or they can neither be found nor downloaded.
    """
    check_timm_model(name)
    import timm

    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise CacheError(f"timm has no published weights of timm:{name}: give a file")
    options: dict[str, Any] = {}
    if path := _find_local_file(config):  # timm would ask the hub for it, and wait for that where there is no network
        options["pretrained_cfg_overlay"] = {"file": path, "custom_load": False}
    elif config.hf_hub_id:
        _check_network(name, config)
    try:
        with _weights_only():
            network = _create(name, channels, size, pretrained=True, **options)
    except UsageError:
        raise
    except Exception as error:  # a download can raise anything
        raise _download_error(name, config, str(error).partition("\n")[0]) from None
    state: dict[str, torch.Tensor] = network.state_dict()
    return state


def _find_local_file(config: Any) -> str:
    """Find the file of published weights in the hub's local cache; "" where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if not config.hf_hub_id:
        return ""
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    paths = (try_to_load_from_cache(config.hf_hub_id, file) for file in files)
    return next((path for path in paths if isinstance(path, str)), "")


def _check_network(name: str, config: Any) -> None:
    """Raise CacheError where the hub has no address: its library tries for most of a minute, with a line each time."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname or ""
    if constants.HF_HUB_OFFLINE:
        raise _download_error(name, config, "HF_HUB_OFFLINE is set")
    if getproxies():
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise _download_error(name, config, f"{host}: {error.strerror or error}") from None


def _download_error(name: str, config: Any, why: str) -> CacheError:
    file = config.hf_hub_filename or "model.safetensors"
    return CacheError(
        f"the published weights of timm:{name} cannot be downloaded ({make_printable(why, 120)}): where there is a"
        f" network,  hf download {config.hf_hub_id} {file}  gets them; then name the file"
    )


@contextmanager
def _weights_only() -> Iterator[None]:
    """Let every torch.load read tensors alone, whatever the version of timm asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _create(name: str, channels: int, size: int, **options: Any) -> nn.Module:
    """Create a model of timm for an input, and run it once on zeros."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    options["in_chans"] = channels
    try:
        if config is not None and config.input_size[1:] == (size, size):
            network: nn.Module = timm.create_model(name, **options)
        else:
            try:
                network = timm.create_model(name, img_size=size, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                network = timm.create_model(name, **options)
        if next(network.parameters()).device.type != "meta":
            with torch.no_grad():
                network.eval()(torch.zeros(1, channels, size, size))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, ZeroDivisionError) as error:
        why = make_printable(" ".join(str(error).split()), 90)
        raise UsageError(
            f"timm:{name} cannot take images of {channels} channel{'s' * (channels > 1)} and {size} px"
            f" ({why}): try another --views size"
        ) from None
    return network.train()


def synchronize_timm_batch_norm(network: nn.Module) -> None:
    """Replace the batch norms inside a network with layers of timm by synchronised ones, which keep activations."""
    from timm.layers import convert_sync_batchnorm

    convert_sync_batchnorm(network)


def is_timm_model(name: str) -> bool:
    """Whether timm is installed and has a model of that name."""
    if find_spec("timm") is None:
        return False
    import timm

    return bool(timm.is_model(name))


def check_timm_model(name: str) -> None:
    """Raise UsageError, with the most similar names, where timm has no model of that name or no such tag of it."""
    require_extra(f"arch timm:{name} needs", "timm", "timm")
    import timm

    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        raise unknown_model_error("timm", name, timm.list_models(), "timm.list_models()")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
    if "." in name and tag not in tags:
        known_tags = f"it has {', '.join(tags)}" if tags else "it has none"
        raise UsageError(f"timm model '{model}' has no weights '{make_printable(tag, 80)}': {known_tags}")


def find_timm_configuration(name: str) -> NetworkConfiguration:
    """Find the input and the classes of the published weights of `timm:NAME`, from its `pretrained_cfg`.

    Raises:
        UsageError: There is no such model, or timm is not installed.
    """
    check_timm_model(name)
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config

    record = timm.models.get_pretrained_cfg(name).to_dict()
    data = resolve_data_config({}, pretrained_cfg=record)
    size = max(data["input_size"][1:])
    classes = int(record.get("num_classes") or 0)
    names: tuple[str, ...] = tuple(record.get("label_names") or ())
    if subset := infer_imagenet_subset(record):
        info = ImageNetInfo(subset)
        names = tuple(info.index_to_description(i) for i in range(info.num_classes()))
    return NetworkConfiguration(
        size=size,
        mean=tuple(map(float, data["mean"])),
        std=tuple(map(float, data["std"])),
        interpolation=data["interpolation"] if data["interpolation"] in _INTERPOLATIONS else "bilinear",
        resize=math.floor(size / data["crop_pct"]),
        classes=classes,
        class_names=names if len(names) == classes else (),
    )
