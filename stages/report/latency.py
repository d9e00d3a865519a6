"""Measure the latency of networks: in turn, so that all are measured under the same load of the machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.models import MODELS, build, count_parameters, is_external_arch
from softcache.pipeline.models.prepared_model import InputSpec
from softcache.stages.cli.console import progress

_ROUNDS, _IMAGES = 7, 10
_MAX_PARAMETERS = 500_000_000  # the file of a run can come from anyone and name an arch of any size


@dataclass(frozen=True)
class Network:
    """An arch, and the numbers it is built for.

    Attributes:
        arch: Its spec, as `--arch` takes it.
        classes: Number of logits.
        channels: Of the input.
        size: Height and width of the input in pixels.
        shape: Of a row of numbers; () for images.
    """

    arch: str
    classes: int
    channels: int
    size: int
    shape: tuple[int, ...] = ()

    @staticmethod
    def of_input(arch: str, classes: int, input_spec: InputSpec) -> "Network":
        """Return an arch for the inputs of a preparation."""
        return Network(arch, classes, input_spec.channels, input_spec.size, input_spec.shape)

    def make_image(self) -> torch.Tensor:
        """Make a random input, float32 [1, channels, size, size] or [1, *shape]."""
        return torch.rand(1, *(self.shape or (self.channels, self.size, self.size)))

    def build(self) -> nn.Module:
        """Build the network with fresh weights."""
        return build(self.arch, self.classes, self.channels, self.size, shape=self.shape)


def measure_latencies(networks: Sequence[Network]) -> dict[Network, tuple[int, float]]:
    """Measure the forward pass of one image, by PyTorch on one thread of the CPU, with fresh weights.

    In each of 7 rounds every network computes 10 images in turn. Networks whose arch is not in the table of archs are
    left out: a report does not run code of others.

    Args:
        networks: To measure; repeated ones are measured once.

    Returns:
        {network: (parameters, median milliseconds)}.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one image is too little work for two
    try:
        with torch.inference_mode():
            modules: dict[Network, nn.Module] = {}
            for network in dict.fromkeys(networks):
                if (module := _build(network)) is not None:
                    modules[network] = module
            milliseconds: dict[Network, list[float]] = {network: [] for network in modules}
            for _ in progress(range(_ROUNDS), _ROUNDS, "latency"):
                for network, module in modules.items():
                    milliseconds[network].append(_time_images(module, network.make_image()))
    finally:
        torch.set_num_threads(threads)
    return {network: (count_parameters(modules[network]), median(times)) for network, times in milliseconds.items()}


def _build(network: Network) -> nn.Module | None:
    """Build a network; None where its arch is unknown, too large, or cannot take its images."""
    if network.arch.partition(":")[0] not in MODELS or is_external_arch(network.arch):
        return None
    try:
        with torch.device("meta"):
            if count_parameters(network.build()) > _MAX_PARAMETERS:
                return None
        module = network.build().eval()
        _time_images(module, network.make_image())  # a warm-up, which also shows that it takes such images
        return module
    except (UsageError, RuntimeError, ValueError):  # numbers from a damaged file
        return None


def _time_images(module: nn.Module, image: torch.Tensor) -> float:
    """Return the mean milliseconds of one image over 10 forward passes."""
    start = time.perf_counter()
    for _ in range(_IMAGES):
        module(image)
    return 1000 * (time.perf_counter() - start) / _IMAGES
