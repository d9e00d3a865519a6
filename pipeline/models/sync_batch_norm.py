"""Batch norm over the rows of all ranks, in place of each rank's own."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .archs.timm_models import synchronize_timm_batch_norm


def has_batch_norm(network: nn.Module) -> bool:
    """Return whether the output for a row depends on the other rows of the batch."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def find_other_batch_norm(network: nn.Module) -> str:
    """Find a batch norm that computes more than PyTorch's, and would lose it as a SyncBatchNorm.

    Returns:
        The name of its class; "" where there is none. Those of timm, which apply an activation too, can be converted.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not _is_of_timm(module) and _computes_more(module):
            return type(module).__name__
    return ""


def synchronize_batch_norm(network: nn.Module) -> None:
    """Replace every batch norm inside a network by one over the rows of all ranks, with the same weights.

    PyTorch's own conversion leaves out what a subclass computes besides: the activations of timm's networks.
    """
    if any(isinstance(module, _BatchNorm) and _is_of_timm(module) for module in network.modules()):
        synchronize_timm_batch_norm(network)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]


def _is_of_timm(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "timm"


def _computes_more(module: nn.Module) -> bool:
    return type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
