"""Where a command runs: its device, memory and the versions of what it runs on."""

import platform
import resource
from importlib.metadata import version
from typing import Any

import torch

from softcache.base.errors import UsageError
from softcache.stages.distributed.ranks import current_ranks


def library_versions() -> dict[str, str]:
    """Of everything that can change a pixel, a logit or a byte."""
    names = ("torch", "torchvision", "numpy", "pillow", "h5py")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where a result was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} {name}", "threads": torch.get_num_threads(), "system": platform.platform()}


def measure_peak_memory(device: torch.device) -> dict[str, int]:
    """In bytes: of the process, and of the GPU where there is one."""
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.max_memory_allocated(device)
    return found


def select_device(name: str) -> torch.device:
    """`auto` is a GPU when there is one, each rank's own. Raises UsageError for a device that is not there."""
    if name in ("auto", "cuda") and current_ranks().here > 1 and torch.cuda.is_available():
        return torch.device("cuda", current_ranks().local)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0].split('. ')[0]}") from None
    return device
