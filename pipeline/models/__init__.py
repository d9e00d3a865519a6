"""Archs: the networks that a teacher or a student can be, built by name from one table.

mlp:800,800   cnn   resnet8 14 20 32 44 56 110   torchvision:NAME   my_package.module:factory

The archs of the CIFAR benchmark of Tian et al. 2020, "Contrastive representation distillation":
resnet8x4 32x4   wrn_16_1 16_2 40_1 40_2   vgg8 13   mobilenet_v2   shufflenet_v1 v2
In each of these, the outputs of `layer1`, `layer2`, … are those of the stages, and the input of `linear` is the mean
over space of the last feature map: that of `last` where there is such a layer, else of the last stage.

May import base, pipeline.batch and pipeline.taps. Begin with the table MODELS, below.
"""

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import UsageError, unknown_name_error
from softcache.pipeline.models.archs.cifar_resnet import CifarResNet
from softcache.pipeline.models.archs.cnn import cnn
from softcache.pipeline.models.archs.mlp import mlp
from softcache.pipeline.models.archs.mobilenet import MobileNetV2
from softcache.pipeline.models.archs.shufflenet import ShuffleNetV1, ShuffleNetV2
from softcache.pipeline.models.archs.simkd import build_simkd, parse_simkd_arch
from softcache.pipeline.models.archs.torchvision_models import (
    build_torchvision,
    check_torchvision_model,
    is_torchvision_model,
)
from softcache.pipeline.models.archs.vgg import VGG
from softcache.pipeline.models.archs.wide_resnet import WideResNet
from softcache.pipeline.taps.hooks import list_layers

# build(argument, classes, channels, size) -> a network: float32 [B, channels, size, size] -> logits [B, classes].
# The argument is the part of the arch after the colon.
Build = Callable[[str, int, int, int], nn.Module]

MODELS: dict[str, Build] = {
    "mlp": mlp,
    "cnn": cnn,
    **{f"resnet{depth}": partial(CifarResNet.build, depth, False) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet.build, depth, True) for depth in (8, 32)},
    **{f"wrn_{depth}_{k}": partial(WideResNet.build, depth, k) for depth in (16, 40) for k in (1, 2)},
    **{f"vgg{depth}": partial(VGG.build, depth) for depth in (8, 13)},
    "mobilenet_v2": MobileNetV2.build,
    "shufflenet_v1": ShuffleNetV1.build,
    "shufflenet_v2": ShuffleNetV2.build,
    "torchvision": build_torchvision,
}


def build(arch: str, classes: int, channels: int, size: int) -> nn.Module:
    """Build the network that an arch names, with fresh weights.

    Args:
        arch: A name of MODELS, with its argument after a colon; the arch of a SimKD student (see archs/simkd.py); or
            `my_package.module:factory`, called as factory(classes=…, channels=…, size=…).
        classes: K, the number of classes.
        channels: Of the input.
        size: Of the input, in pixels.

    Returns:
        A network: float32 [B, channels, size, size] -> logits [B, classes].

    Raises:
        UsageError: There is no such arch, its argument does not fit, or it cannot take such images.
    """
    if parts := parse_simkd_arch(arch):
        return _build_simkd(*parts, classes, channels, size)
    name, colon, argument = arch.partition(":")
    if name in MODELS:
        return MODELS[name](argument, classes, channels, size)
    if colon and all(part.isidentifier() for part in name.split(".")):
        return _build_custom_arch(name, argument, classes, channels, size)
    our_names = [name for name in MODELS if name != "torchvision"]
    if is_torchvision_model(arch):
        raise UsageError(f"no arch '{arch}'. Did you mean 'torchvision:{arch}'? There are: {', '.join(our_names)}")
    raise unknown_name_error("arch", arch, [*our_names, "torchvision:NAME", "my_package.module:factory"])


def is_custom_arch(arch: str) -> bool:
    """Whether an arch names a user's own code, `my_package.module:factory`, which building it imports and runs."""
    try:
        parts = parse_simkd_arch(arch)
    except UsageError:  # a name that cannot be built
        return False
    name, colon, _ = (parts[0] if parts else arch).partition(":")
    return bool(colon) and name not in MODELS


def check_arch(arch: str) -> None:
    """Check the name of an arch and its argument, where classes and size of the images are not known yet.

    A network of the table is built on PyTorch's device `meta`, which takes no memory. A user's factory is imported and
    not called.

    Raises:
        UsageError: There is no such arch, or its argument does not fit.
    """
    name, colon, argument = arch.partition(":")
    if name == "torchvision":
        check_torchvision_model(argument)
    elif colon and name not in MODELS and all(part.isidentifier() for part in name.split(".")):
        _import_factory(name, argument)
    else:
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            build(arch, 10, 3, 224)


def list_arch_layers(arch: str) -> list[str]:
    """List the layers of an arch that can be tapped, without memory; empty where that needs the images or user code.

    Raises:
        UsageError: There is no such arch.
    """
    check_arch(arch)
    if arch.partition(":")[0] not in MODELS:
        return []
    try:
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            return list_layers(build(arch, 10, 3, 224))
    except UsageError:  # a network of torchvision that takes images of another size
        return []


def _build_custom_arch(module: str, factory: str, classes: int, channels: int, size: int) -> nn.Module:
    """Build a network by a user's own function. Raises UsageError where there is none, or it returns no network."""
    build_network = _import_factory(module, factory)
    network = build_network(classes=classes, channels=channels, size=size)
    if not isinstance(network, nn.Module):
        raise UsageError(f"arch '{module}:{factory}' returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def _import_factory(module: str, factory: str) -> Callable[..., object]:
    """Import a user's own function. Raises UsageError where there is none."""
    _make_current_folder_importable()
    try:
        build_network: Callable[..., object] = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        hint = ""
        if close := get_close_matches(module, MODELS, n=1):
            hint = f". Did you mean '{close[0]}:{factory}'?"
        if module.endswith(".py"):
            hint = f". Name the module without .py: '{module[:-3]}:{factory}'"
        raise UsageError(f"arch '{module}:{factory}' cannot be imported: {error}{hint}") from None
    return build_network


def _make_current_folder_importable() -> None:
    """Put the current folder at the front of sys.path, unless it is on it, so that a user's module there is found.

    `python -m softcache` starts with the current folder on the path, the console script `softcache` does not; an
    --arch must mean the same module under both. The folder stays on the path for the rest of the process: the module
    may import its neighbours when it is called, and worker processes import it once more.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _build_simkd(arch: str, layer: str, width: int, classes: int, channels: int, size: int) -> nn.Module:
    """Build a SimKD student around the network that an arch names."""
    backbone = build(arch, classes, channels, size)
    head = find_head(backbone, classes)
    names = [name for name, module in backbone.named_modules() if module is head and name]
    if not names:
        raise UsageError(f"arch '{arch}' has no last linear layer, which SimKD replaces by the teacher's")
    return build_simkd(backbone, names[0], layer, width, classes, example=torch.zeros(1, channels, size, size))


def find_head(network: nn.Module, classes: int) -> nn.Linear | None:
    """The last linear layer with one output per class; None where there is none."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    return layers[-1] if layers else None


def count_parameters(network: nn.Module) -> int:
    """The number of parameters, trainable or not."""
    return sum(p.numel() for p in network.parameters())


def count_multiply_adds(network: nn.Module, channels: int, size: int) -> int:
    """Multiply-adds of one image in eval mode, counted by PyTorch over matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training, device = network.training, next(network.parameters()).device
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, channels, size, size, device=device))
    network.train(was_training)
    return int(counter.get_total_flops()) // 2


def get_head_arrays(head: nn.Linear, classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight float32 [K, D] and bias float32 [K] of a linear layer; zeros for a bias that it does not have."""
    bias = torch.zeros(classes) if head.bias is None else head.bias.detach()
    return head.weight.detach().float().cpu().numpy(), bias.float().cpu().numpy()
