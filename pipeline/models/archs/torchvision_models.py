"""The classification models of torchvision, adapted to the classes, channels and image size of the data.

torchvision is imported where it is used: it loads PyTorch's compiler, and commands start in 3 s of a CPU less
without it.
"""

from typing import NamedTuple

import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError, unknown_model_error

from .network_configuration import NetworkConfiguration

SMALL = 64  # px; for smaller images the first layers do not downsample
SMALL_ADVICE = (  # the end of a message
    f": for views under {SMALL} px a torchvision: network gets another first convolution; weights of the published one"
    " need --teacher-size 224, or --views …:size=64"
)
_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")  # models that have some


def build_torchvision(name: str, classes: int, channels: int, size: int) -> nn.Module:
    """Build `torchvision:NAME`, with fresh weights.

    For images under 64 px the first convolution keeps the resolution (3 x 3, stride 1) and the pooling after it is
    left out, as is usual for CIFAR.

    Args:
        name: As torchvision.models.get_model takes it.
        classes, channels, size: As of softcache.pipeline.models.build.

    Raises:
        UsageError: There is no such model, or it cannot take such images.
    """
    from torchvision import models

    check_torchvision_model(name)
    options: dict[str, object] = {"weights": None, "num_classes": classes}
    if name in _AUXILIARY_OUTPUTS:
        options |= {
            "aux_logits": False,
            "init_weights": True,
        }  # the default of the latter warns
    if name.startswith("vit_"):
        options["image_size"] = size
    try:
        network: nn.Module = models.get_model(name, **options)
        _fit_stem(network, channels, size)
        with torch.no_grad():
            network.eval()(torch.zeros(1, channels, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"torchvision:{name} cannot take images of {size} px ({str(error)[:90]}): try another --views size"
        ) from None
    return network.train()


def is_torchvision_model(name: str) -> bool:
    """Whether torchvision has a classification model of that name."""
    return name in list_torchvision_models()


def list_torchvision_models() -> list[str]:
    """List the names of torchvision's classification models."""
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def check_torchvision_model(name: str) -> None:
    """Raise UsageError, with the most similar names, where torchvision has no classification model of that name."""
    names = list_torchvision_models()
    if name not in names:
        raise unknown_model_error("torchvision", name, names, "torchvision.models.list_models()")


def has_other_stem(arch: str, error: UsageError) -> bool:
    """Return whether weights do not fit because the arch has the first convolution for small images, see SMALL."""
    return arch.startswith("torchvision:") and "x3x3 in the arch" in str(error)


class PublishedWeights(NamedTuple):
    """Published weights, with the input they were trained with.

    Attributes:
        state_dict: For the network of build_torchvision.
        size: Side of the input in pixels.
        mean, std: Of each channel of the input, for values of 0 … 1.
        class_names: In the order of the logits.
    """

    state_dict: dict[str, torch.Tensor]
    size: int
    mean: list[float]
    std: list[float]
    class_names: list[str]


def load_published_weights(name: str) -> PublishedWeights:
    """Load the DEFAULT weights of a torchvision model, from torch's hub folder or else from the network.

    Raises:
        UsageError: There is no such model.
        CacheError: The weights cannot be downloaded, or their file is damaged.
    """
    from torchvision import models

    check_torchvision_model(name)
    weights = models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # a download can raise anything: of urllib or http, for a wrong hash, a damaged file …
        why = str(error).partition("\n")[0]
        raise CacheError(
            f"the published weights of torchvision:{name} cannot be downloaded ({why}):"
            f" put {weights.url} into torch's hub folder"
        ) from None
    preset = weights.transforms()
    mean, std = list(preset.mean), list(preset.std)
    if name in _AUXILIARY_OUTPUTS:  # with these weights torchvision's network itself rescales its input to -1 … 1
        state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
        mean = std = [0.5, 0.5, 0.5]
    return PublishedWeights(state, preset.crop_size[0], mean, std, class_names=list(weights.meta["categories"]))


def find_torchvision_configuration(name: str) -> NetworkConfiguration:
    """Find the input and the classes of the DEFAULT weights of `torchvision:NAME`.

    Raises:
        UsageError: There is no such model.
    """
    from torchvision import models

    check_torchvision_model(name)
    weights = models.get_model_weights(name).DEFAULT
    preset, names = weights.transforms(), tuple(weights.meta["categories"])
    rescales_itself = name in _AUXILIARY_OUTPUTS  # see load_published_weights
    return NetworkConfiguration(
        size=preset.crop_size[0],
        mean=(0.5, 0.5, 0.5) if rescales_itself else tuple(preset.mean),
        std=(0.5, 0.5, 0.5) if rescales_itself else tuple(preset.std),
        interpolation=preset.interpolation.value,
        resize=preset.resize_size[0],
        classes=len(names),
        class_names=names,
    )


def _fit_stem(network: nn.Module, channels: int, size: int) -> None:
    """Replace the first convolution if the input has other channels or small images, and leave out its pooling."""
    path, first = next((name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    small = size < SMALL and max(first.stride) > 1 and first.kernel_size != first.stride
    if first.in_channels == channels and not small:
        return
    stem = nn.Conv2d(
        channels,
        first.out_channels,
        3 if small else first.kernel_size,  # type: ignore[arg-type]
        1 if small else first.stride,  # type: ignore[arg-type]
        1 if small else first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule(path, stem)
    if small:
        modules = dict(network.named_modules())
        for pooling in ("maxpool", "maxpool1", "features.pool0", "features.2"):
            if isinstance(modules.get(pooling), nn.MaxPool2d):
                network.set_submodule(pooling, nn.Identity())
