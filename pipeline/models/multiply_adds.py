"""How many multiply-adds a network has."""

from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)  # the last two arguments of each are multiplied
_COUNTED = ("mm", "conv", "attention")  # in the names of the operations that PyTorch's own counter counts


def count_multiply_adds(network: nn.Module, channels: int, size: int, shape: tuple[int, ...] = ()) -> int:
    """Multiply-adds of one image, or row of a shape, in eval mode, counted over matrix products and convolutions.

    A network that does not take a batch of one image is run on two, and half is counted.
    """
    was_training, first = network.training, next(network.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    network.eval()
    for rows in (1, 2):
        try:
            with torch.no_grad():
                counted = _count(network, torch.zeros(rows, *(shape or (channels, size, size)), device=device))
            break
        except Exception:  # whatever a user's own code raises
            if rows == 2:
                raise
    network.train(was_training)
    return counted // rows


def _count(network: nn.Module, images: torch.Tensor) -> int:
    """Count the multiply-adds of a batch.

    PyTorch's own counter imports Triton and the compiler, which takes 1.5 s: it counts where there is another product
    than those of most networks. It leaves out attention on a CPU.
    """
    with _Counter() as counter:
        network(images)
    if not counter.has_other_products:
        return int(counter.multiply_adds)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as flops:
        network(images)
    return int(flops.get_total_flops()) // 2


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-adds of all operations inside `with`, and notes whether one is left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiply_adds: int = 0
        self.has_other_products = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside: marking the method as left out would import the compiler

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = function.overloadpacket
        if operation in _PRODUCTS:
            a, b = args[-2:]
            self.multiply_adds += a.numel() * b.shape[-1]
        elif operation.__name__.startswith("_scaled_dot_product_"):
            query, key, value = args[:3]
            self.multiply_adds += query[..., 0].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        elif operation is not _aten.convolution:
            if any(word in operation.__name__ for word in _COUNTED):
                self.has_other_products = True
            if function is not torch.ops.prim.device.default:
                with self:
                    if (decomposed := function.decompose(*args, **kwargs)) is not NotImplemented:
                        return decomposed
        result = function(*args, **kwargs)
        if operation is _aten.convolution:
            images, weight, is_transposed = args[0], args[1], args[6]
            self.multiply_adds += weight.numel() * len(images) * prod((images if is_transposed else result).shape[2:])
        return result
