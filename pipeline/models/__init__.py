"""Archs: the networks that a teacher or a student can be, built by name from one table.

mlp:800,800   cnn   resnet8 14 20 32 44 56 110   torchvision:NAME   timm:NAME   hf:NAME   my_package.module:factory

The archs of the CIFAR benchmark of Tian et al. 2020, "Contrastive representation distillation":
resnet8x4 32x4   wrn_16_1 16_2 40_1 40_2   vgg8 13   mobilenet_v2   shufflenet_v1 v2
In each of these, the outputs of `layer1`, `layer2`, … are those of the stages, and the input of `linear` is the mean
over space of the last feature map: that of `last` where there is such a layer, else of the last stage.

May import base, pipeline.batch and pipeline.taps. Begin with the table MODELS, below.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.user_code import is_out_of_memory, user_code
from softcache.base.user_modules import file_name_error, is_importable_name
from softcache.pipeline.models.archs.cifar_resnet import CifarResNet
from softcache.pipeline.models.archs.cnn import cnn
from softcache.pipeline.models.archs.hf_models import build_hf, check_hf_model
from softcache.pipeline.models.archs.mlp import mlp
from softcache.pipeline.models.archs.mobilenet import MobileNetV2
from softcache.pipeline.models.archs.shufflenet import ShuffleNetV1, ShuffleNetV2
from softcache.pipeline.models.archs.simkd import build_simkd, parse_simkd_arch
from softcache.pipeline.models.archs.timm_models import build_timm, check_timm_model, is_timm_model
from softcache.pipeline.models.archs.torchvision_models import (
    build_torchvision,
    check_torchvision_model,
    is_torchvision_model,
)
from softcache.pipeline.models.archs.vgg import VGG
from softcache.pipeline.models.archs.wide_resnet import WideResNet
from softcache.pipeline.models.other_frameworks.file_network import (
    FILE_TEACHERS,
    find_file_teacher,
    parse_file_teacher,
)
from softcache.pipeline.taps.hooks import capture_features, list_layers
from softcache.pipeline.taps.statistics import compute_statistic, parse_tap

from .custom_networks import build_custom, check_factory, is_live_arch, make_ready, prepare_live_network
from .outputs import LogitsSelector

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
    "timm": build_timm,
    "hf": build_hf,
}
# Rows that have the models of a library: {name: (a form of their argument, the check of it)}.
LIBRARIES: dict[str, tuple[str, Callable[[str], None]]] = {
    "torchvision": ("torchvision:NAME, such as torchvision:resnet18", check_torchvision_model),
    "timm": ("timm:NAME, such as timm:resnet18", check_timm_model),
    "hf": ("hf:NAME or hf:FOLDER, such as hf:microsoft/resnet-18", check_hf_model),
}


def build(
    arch: str,
    classes: int,
    channels: int,
    size: int,
    output: str = "",
    network: nn.Module | None = None,
    shape: tuple[int, ...] = (),
) -> nn.Module:
    """Build the network that an arch names, with fresh weights.

    Args:
        arch: A name of MODELS, with its argument after a colon; the arch of a SimKD student (see archs/simkd.py); or
            `my_package.module:factory` (see custom_networks.py).
        classes: K, the number of classes.
        channels: Of the input.
        size: Of the input, in pixels.
        output: Key or index of the logits in what a network of a user's own returns (see outputs.py); "" to find them.
        network: A network of a user's own that is there already, of which a copy is returned: of the arch `module(…)`
            the one that a caller in Python passed, else what the factory returned.
        shape: Of a row of numbers; () for images. The networks of images take rows [C, S, S]; mlp takes any.

    Returns:
        A network: float32 [B, channels, size, size], or [B, *shape], -> logits [B, classes].

    Raises:
        UsageError: There is no such arch, its argument does not fit, it cannot take such images, there is no memory
            for it, or a user's own code fails.
    """
    shape = shape or (channels, size, size)
    try:
        if parts := parse_simkd_arch(arch):
            return _build_simkd(*parts, classes, shape)
        if not (is_custom_arch(arch) or is_live_arch(arch) or arch.startswith("hf:")):
            if output:
                raise UsageError(f"--output {output} is for networks of your own, and '{arch}' returns one tensor")
            return _build_known(arch, classes, shape)
        network, selector = _build_external(arch, classes, shape, network)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or "CUDA" in str(error):
            raise
        raise UsageError(f"arch '{arch}' takes more memory than there is: choose a smaller one") from error
    selector.key = output
    if not isinstance(network, torch.jit.ScriptModule):  # these take no hooks
        network.register_forward_hook(selector)
    elif output:
        raise UsageError(f"--output {output}: arch '{arch}' is a TorchScript module, which has to return one tensor")
    return network


def is_custom_arch(arch: str) -> bool:
    """Return whether an arch names code of a user's own, which is imported and run when it is built."""
    if arch.startswith("simkd("):
        return is_custom_arch(arch[len("simkd(") :].partition(";")[0])
    name, colon, _ = arch.partition(":")
    return bool(colon) and name not in MODELS and is_importable_name(name) and parse_file_teacher(arch) is None


def is_external_arch(arch: str) -> bool:
    """Return whether building an arch runs code of the user's or opens a folder that the arch names.

    A file from anyone may name one: it is built only where the command line names it too.
    """
    if arch.startswith("simkd("):
        return is_external_arch(arch[len("simkd(") :].partition(";")[0])
    return is_custom_arch(arch) or arch.startswith("hf:")


def _build_known(arch: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a network of the table MODELS. Raises UsageError for another name, or for rows that it cannot take."""
    name, colon, argument = arch.partition(":")
    if name in MODELS:
        if colon and not argument and name != "mlp":
            known = LIBRARIES[name][0] if name in LIBRARIES else f"'{name}'"
            raise UsageError(f"arch '{arch}' has nothing after its colon: {known}")
        if len(shape) == 3 and shape[1] == shape[2]:
            return MODELS[name](argument, classes, shape[0], shape[1])
        if name == "mlp":
            return MODELS[name](argument, classes, math.prod(shape), 1)
        raise UsageError(
            f"arch '{arch}' takes images or rows [C, S, S], these rows have the shape {list(shape)}: take mlp:64, or a"
            " network of your own, my_package.module:factory"
        )
    if name in FILE_TEACHERS:
        raise UsageError(
            f"'{arch}' is a teacher alone, --teacher {name}:{FILE_TEACHERS[name]}: it has no weights to train"
        )
    if kind := find_file_teacher(arch):
        raise UsageError(f"arch '{arch}' names a file: a teacher in it is --teacher {kind}:{arch}")
    if error := file_name_error("arch", arch):
        raise error
    our_names = [name for name in MODELS if name not in LIBRARIES]
    for library, has_model in (("torchvision", is_torchvision_model), ("timm", is_timm_model)):
        if has_model(arch):
            raise UsageError(f"no arch '{arch}'. Did you mean '{library}:{arch}'? There are: {', '.join(our_names)}")
    names = [*our_names, *(f"{library}:NAME" for library in LIBRARIES), "my_package.module:factory"]
    raise unknown_name_error("arch", arch, names)


def check_arch(arch: str) -> None:
    """Check the name of an arch and its argument, where classes and size of the images are not known yet.

    A network of the table is built on PyTorch's device `meta`, which takes no memory. A user's factory is imported and
    not called.

    Raises:
        UsageError: There is no such arch, or its argument does not fit.
    """
    name, _, argument = arch.partition(":")
    if is_custom_arch(arch):
        check_factory(name, argument, _find_similar)
    elif name in LIBRARIES and argument:
        LIBRARIES[name][1](argument)
    else:
        with _without_values():
            build(arch, 10, 3, 224)


def compute_shapes(
    arch: str, classes: int, shape: tuple[int, ...], taps: tuple[str, ...]
) -> tuple[dict[str, list[int]], int]:
    """Compute what a network outputs for a row of a shape, without its weights and without memory.

    Args:
        arch: A name of MODELS, with its argument.
        classes: K, the number of classes.
        shape: Of the input, [C, S, S] of images.
        taps: Layers, or statistics of them, see pipeline/taps.

    Returns:
        {tap: row shape}, and the width of the input of the last linear layer; 0 where there is none.

    Raises:
        UsageError: There is no such arch or layer, or it cannot take such input.
    """
    check_arch(arch)
    with _without_values():
        network = build(arch, classes, shape[0], shape[-1], shape=shape).eval()
        head = find_head(network, classes)
        layers = tuple(dict.fromkeys(parse_tap(tap)[0] for tap in taps))
        with torch.no_grad(), capture_features(network, layers) as maps:
            network(torch.zeros(2, *shape))
        shapes = {}
        for tap, (layer, statistic) in {tap: parse_tap(tap) for tap in taps}.items():
            features = maps[layer] if statistic == "map" else compute_statistic(maps[layer], statistic, layer)
            shapes[tap] = list(features.shape[1:])
    return shapes, head.in_features if head else 0


def list_arch_layers(arch: str) -> list[str]:
    """List the layers of an arch that can be tapped, without memory; empty where that needs the images or user code.

    Raises:
        UsageError: There is no such arch.
    """
    check_arch(arch)
    if arch.partition(":")[0] not in MODELS:
        return []
    try:
        with _without_values():
            return list_layers(build(arch, 10, 3, 224))
    except UsageError:  # a network of torchvision that takes images of another size
        return []


@contextmanager
def _without_values() -> Iterator[None]:
    """Build networks without memory and without values inside `with`."""
    with torch.random.fork_rng(devices=()), torch.device("meta"), _SkipDraws():
        yield


class _SkipDraws(TorchFunctionMode):
    """Leaves out the draws of weights: on the device `meta` they do nothing, and import PyTorch's compiler."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _build_external(
    arch: str, classes: int, shape: tuple[int, ...], network: nn.Module | None = None
) -> tuple[nn.Module, LogitsSelector]:
    """Build a network of a user's own or of transformers; the selector of its logits is not registered yet."""
    if arch.startswith("hf:"):
        selector, network = LogitsSelector(arch, classes), _build_known(arch, classes, shape)
        has_values = not any(p.is_meta for p in network.parameters())  # not where layers are listed alone
        return make_ready(network, selector, shape) if has_values else network, selector
    if network is not None:
        return prepare_live_network(network, arch, classes, shape)
    if is_live_arch(arch):
        raise UsageError(
            f"the network '{arch}' was passed to softcache in Python, and can be built there alone: a command takes"
            " the name of an arch, such as my_package.module:factory"
        )
    module, _, factory = arch.partition(":")
    return build_custom(module, factory, classes, shape, _find_similar)


def _find_similar(name: str) -> str:
    """Return the name of MODELS that is like another name, or ""."""
    return next(iter(get_close_matches(name, MODELS, n=1)), "")


def _build_simkd(arch: str, layer: str, width: int, classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a SimKD student around the network that an arch names."""
    location = ""
    if is_external_arch(arch):  # what it returns is not read
        backbone, selector = _build_external(arch, classes, shape)
        location = selector.location
    else:
        backbone = _build_known(arch, classes, shape)
    head = find_head(backbone, classes)
    names = [name for name, module in backbone.named_modules() if module is head and name]
    if not names:
        raise UsageError(f"arch '{arch}' has no last linear layer, which SimKD replaces by the teacher's")
    with user_code(f"the forward pass of arch '{arch}' failed", location):
        return build_simkd(backbone, names[0], layer, width, classes, example=torch.zeros(1, *shape))


def find_head(network: nn.Module, classes: int) -> nn.Linear | None:
    """The last linear layer with one output per class; None where there is none."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    return layers[-1] if layers else None


def count_parameters(network: nn.Module) -> int:
    """The number of parameters, trainable or not."""
    return sum(p.numel() for p in network.parameters())


def get_head_arrays(head: nn.Linear, classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight float32 [K, D] and bias float32 [K] of a linear layer; zeros for a bias that it does not have."""
    bias = torch.zeros(classes) if head.bias is None else head.bias.detach()
    return head.weight.detach().float().cpu().numpy(), bias.float().cpu().numpy()
