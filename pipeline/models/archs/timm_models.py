"""The classification models of timm, by name: `timm:resnet18`, or with the tag of its weights `timm:resnet18.a1_in1k`.

A network is used as timm has it: it is not adapted to small images. timm is imported where it is used: that takes
seconds.
"""

import math
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from softcache.base.errors import UsageError, make_printable

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
        raise UsageError(
            f"timm:{name} cannot take images of {channels} channel{'s' * (channels > 1)} and {size} px"
            f" ({make_printable(error, 90)}): try another --views size"
        ) from None
    return network.train()


def check_timm_model(name: str) -> None:
    """Raise UsageError, with the most similar names, where timm has no model of that name or no such tag of it."""
    if find_spec("timm") is None:
        raise UsageError(f"arch timm:{name} needs timm, which is not installed: pip install -e '.[timm]'")
    import timm

    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        names = timm.list_models()
        similar = get_close_matches(model, names, n=6, cutoff=0.5)
        hint = f" Did you mean '{similar[0]}'?" if similar else ""
        others = f" Others: {', '.join(similar[1:])}." if similar[1:] else ""
        raise UsageError(
            f"no timm model '{make_printable(name, 80)}'.{hint}{others} timm.list_models() lists all {len(names)}"
        )
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
