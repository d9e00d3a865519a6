"""How long a image takes, each network in turn with the others, so that all are measured on the same machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.models import MODELS, build, count_parameters
from softcache.stages.cli.console import progress

_ROUNDS, _TIMES = 7, 10
_MOST = 500_000_000  # parameters: an arch in a stranger's file may ask for any number


@dataclass(frozen=True)
class Network:
    """An arch and what it is built for."""

    arch: str
    classes: int
    channels: int
    size: int

    def image(self) -> torch.Tensor:
        """An input float32 [1, channels, size, size]."""
        return torch.rand(1, self.channels, self.size, self.size)


def measure_latencies(networks: Sequence[Network]) -> dict[Network, tuple[int, float]]:
    """{network: (parameters, median milliseconds)} of one image alone, by PyTorch on one thread of the CPU.

    The median of 7 rounds in which each network takes its turn of 10 images. Networks that are no arch of the table
    (code of a user's own, which a report does not run) are left out.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one image is too little for two
    try:
        with torch.inference_mode():
            built = {network: made for network in dict.fromkeys(networks) if (made := _built(network)) is not None}
            found: dict[Network, list[float]] = {network: [] for network in built}
            for _ in progress(range(_ROUNDS), _ROUNDS, "latency"):
                for network, made in built.items():
                    found[network].append(_turn(made, network.image()))
    finally:
        torch.set_num_threads(threads)
    return {network: (count_parameters(built[network]), median(times)) for network, times in found.items()}


def _built(network: Network) -> nn.Module | None:
    arch = network.arch
    if arch.partition(":")[0] not in MODELS:
        return None
    try:
        with torch.device("meta"):
            if count_parameters(build(arch, network.classes, network.channels, network.size)) > _MOST:
                return None
        made = build(arch, network.classes, network.channels, network.size).eval()
        _turn(made, network.image())  # warm, and known to take such a image
        return made
    except (UsageError, RuntimeError, ValueError):  # what no command could have asked for
        return None


def _turn(network: nn.Module, image: torch.Tensor) -> float:
    """Milliseconds of one image, the mean of some in a row."""
    begun = time.perf_counter()
    for _ in range(_TIMES):
        network(image)
    return 1000 * (time.perf_counter() - begun) / _TIMES
