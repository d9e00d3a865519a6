"""The environment of a command: which device it uses, CPU or GPU (`select_device`), memory, versions of libraries."""

import platform
import re
import resource
from importlib.metadata import version
from typing import Any

import torch

from softcache.base.errors import UsageError, make_printable
from softcache.stages.cli.openmp import describe_waiting
from softcache.stages.distributed.ranks import current_ranks


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change a pixel, a logit or a byte."""
    names = ("torch", "torchvision", "numpy", "pillow", "h5py")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine of a result: device, CPU threads, how they wait where that was set, operating system."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    waiting = {"waiting": describe_waiting()} if describe_waiting() else {}
    threads = {"threads": torch.get_num_threads(), **waiting}
    return {"device": f"{device.type} {name}", **threads, "system": platform.platform()}


def measure_peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory in bytes of the process, and of the GPU where there is one."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has done what it was given. On a CPU nothing is left to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def select_device(name: str) -> torch.device:
    """Return the device of an option.

    Args:
        name: as in --device; `auto` is a GPU where there is one. Each rank gets its own GPU.

    Raises:
        UsageError: for a device that does not exist.
    """
    if name in ("auto", "cuda") and current_ranks().local_world > 1 and torch.cuda.is_available():
        return torch.device("cuda", current_ranks().local_rank)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {make_printable(name)}: there are auto, cpu, cuda and cuda:N")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0].split('. ')[0]}") from None
    return device
