"""Keep the outputs of named layers, or a statistic of them, while a model runs; the model itself is left alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from softcache.base.errors import UsageError, unknown_name_error

from .statistics import compute_statistic, parse_tap


def list_layers(model: nn.Module) -> list[str]:
    """The module paths that can be tapped."""
    return [name for name, _ in model.named_modules() if name]


@contextmanager
def capture_features(model: nn.Module, taps: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """A dict that holds, after each forward pass, the output of every named layer: `layer3`, or of `layer3:pool`
    its statistic, computed in float32.

    The output is cloned as the layer returns it: a later in-place activation (`ReLU(inplace=True)`) would
    otherwise overwrite it with its own result. Gradients flow through the clone.
    Raises UsageError for a path that the model does not have, whose output is not one tensor, or that it never runs.
    """
    modules = dict(model.named_modules())
    kept: dict[str, torch.Tensor] = {}

    def keep(tap: str) -> RemovableHandle:
        path, kind = parse_tap(tap)
        if path not in modules or not path:
            raise unknown_name_error("tap", path, list_layers(model))

        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not isinstance(output, torch.Tensor):
                raise UsageError(f"tap '{tap}' gives a {type(output).__name__}, not one tensor")
            if kind == "map":
                kept[tap] = output.clone()
                return
            with torch.autocast(output.device.type, enabled=False):  # a product of matrices would be rounded again
                kept[tap] = compute_statistic(output.float(), kind, path)

        handle: RemovableHandle = modules[path].register_forward_hook(hook)
        return handle

    def begin(module: nn.Module, inputs: object) -> None:
        kept.clear()

    def end(module: nn.Module, inputs: object, output: object) -> None:
        for tap in taps:
            if tap not in kept:
                raise UsageError(f"tap '{tap}' is a layer that the network does not run: choose another")

    handles: list[RemovableHandle] = []
    try:
        for tap in taps:
            handles.append(keep(tap))
        handles += [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
        yield kept
    finally:
        for handle in handles:
            handle.remove()
