"""Any classification model of torchvision, fitted to the data's classes, channels and image size."""

import torch
import torchvision
from torch import nn

from softcache.base.errors import CacheError, UsageError, unknown_name_error

SMALL = 64  # images under so many pixels get a stem that does not shrink them
_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


def build_torchvision(name: str, classes: int, channels: int, size: int) -> nn.Module:
    """`torchvision:resnet18` with fresh weights.

    Under 64 px the first convolution keeps the resolution (3 x 3, stride 1) and a pooling that follows it is
    left out, as is usual for CIFAR. Raises UsageError for a model that cannot take such images.
    """
    if not is_torchvision_model(name):
        raise unknown_name_error("torchvision model", name, torchvision.models.list_models(module=torchvision.models))
    options: dict[str, object] = {"weights": None, "num_classes": classes}
    if name in _SEVERAL_OUTPUTS:
        options |= {"aux_logits": False, "init_weights": True}  # one output; and no FutureWarning
    if name.startswith("vit_"):
        options["image_size"] = size
    try:
        network: nn.Module = torchvision.models.get_model(name, **options)
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
    return name in torchvision.models.list_models(module=torchvision.models)


def load_published_weights(name: str) -> tuple[dict[str, torch.Tensor], int, list[float], list[float], list[str]]:
    """The DEFAULT weights of a torchvision model: state dict, image size, mean, std, classes in order.

    Downloads them when they are not at hand. Raises UsageError or CacheError where there are none.
    """
    if not is_torchvision_model(name):
        raise unknown_name_error("torchvision model", name, torchvision.models.list_models(module=torchvision.models))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # urllib, http, a wrong hash, a damaged file: whatever a download can raise
        why = str(error).partition("\n")[0]
        raise CacheError(
            f"the published weights of torchvision:{name} cannot be downloaded ({why}):"
            f" put {weights.url} into torch's hub folder"
        ) from None
    preset = weights.transforms()
    mean, std = list(preset.mean), list(preset.std)
    if name in _SEVERAL_OUTPUTS:  # with these weights torchvision's own network turns ImageNet's scale into -1 … 1
        state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
        mean = std = [0.5, 0.5, 0.5]
    return state, preset.crop_size[0], mean, std, list(weights.meta["categories"])


def _fit_stem(network: nn.Module, channels: int, size: int) -> None:
    """Replace the first convolution where channels or small images ask for it, keeping its kind."""
    path, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    small = size < SMALL and max(first.stride) > 1 and first.kernel_size != first.stride
    if first.in_channels == channels and not small:
        return
    fitted = nn.Conv2d(
        channels,
        first.out_channels,
        3 if small else first.kernel_size,  # type: ignore[arg-type]
        1 if small else first.stride,  # type: ignore[arg-type]
        1 if small else first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(fitted.weight, mode="fan_out", nonlinearity="relu")
    parent, _, own = path.rpartition(".")
    setattr(network.get_submodule(parent), own, fitted)
    if small:
        modules = dict(network.named_modules())
        for pooling in ("maxpool", "maxpool1", "features.pool0", "features.2"):
            if isinstance(modules.get(pooling), nn.MaxPool2d):
                above, _, last = pooling.rpartition(".")
                setattr(modules[above], last, nn.Identity())
