"""Capture the outputs of named layers, or statistics of them, in a forward pass. The model itself is not changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from softcache.base.errors import UsageError, unknown_name_error

from .statistics import compute_statistic, parse_tap


def list_layers(model: nn.Module) -> list[str]:
    """The module paths that can be tapped."""
    return [path for path, _ in model.named_modules() if path]


@contextmanager
def capture_features(model: nn.Module, taps: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Capture the outputs of the tapped layers in each forward pass of a model.

    The output is cloned as the layer returns it: a later in-place activation (`ReLU(inplace=True)`) would overwrite
    it. Gradients flow through the clone.

    Args:
        model: The model; its hooks are removed at the end.
        taps: `layer3`, for the output of that module path, or `layer3:pool`, for a statistic of it.

    Yields:
        A dict that holds after each forward pass {tap: [B, …]}: an output in its dtype, a statistic in float32.

    Raises:
        UsageError: The model has no such layer; and, from its forward pass, a layer that was not run, or whose output
            is not one tensor.
    """
    modules = dict(model.named_modules())
    features: dict[str, torch.Tensor] = {}

    def make_hook(tap: str, path: str, statistic: str) -> Callable[[nn.Module, object, object], None]:
        tapped = modules[path]

        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if module is not tapped:  # a copy of the model, such as a moving average of it, has copies of the hooks
                return
            if not isinstance(output, torch.Tensor):
                raise UsageError(
                    f"tap '{tap}' outputs a {type(output).__name__}, not one tensor: choose another layer"
                )
            if statistic == "map":
                features[tap] = output.clone()
                return
            with torch.autocast(output.device.type, enabled=False):  # it would round the matrix product of a gram
                features[tap] = compute_statistic(output.float(), statistic, path)

        return hook

    def clear_features(module: nn.Module, inputs: object) -> None:
        if module is model:
            features.clear()

    def check_features(module: nn.Module, inputs: object, output: object) -> None:
        if module is not model:
            return
        for tap in taps:
            if tap not in features:
                raise UsageError(f"tap '{tap}' is a layer that the network does not run: choose another")

    if isinstance(model, torch.jit.ScriptModule):  # it takes no hooks
        if taps:
            raise UsageError(f"tap '{taps[0]}': the layers of a TorchScript module cannot be read: use the nn.Module")
        yield features
        return
    handles: list[RemovableHandle] = []
    try:
        for tap in taps:
            path, statistic = parse_tap(tap)
            if path not in modules or not path:
                raise unknown_name_error("tap", path, list_layers(model))
            handles.append(modules[path].register_forward_hook(make_hook(tap, path, statistic)))
        handles += [model.register_forward_pre_hook(clear_features), model.register_forward_hook(check_features)]
        yield features
    finally:
        for handle in handles:
            handle.remove()
