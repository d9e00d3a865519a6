"""Finding the logits in what a network of a user's own returns.

| output | logits |
|---|---|
| a tensor | it; where there is one number to predict also [B] |
| a dict, a dataclass, a named tuple or another object | its `logits`; of a dict without one, its `out` |
| a tuple or list | the one element of shape [B, K]; in training the first of several |
| anything else | an error that lists the elements and names `--output` |

`--output KEY|INDEX` names the element. In training a network may return more than in eval mode, such as the outputs of
auxiliary heads or of a distillation token: the element named in the table is trained, the others are not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from softcache.base.errors import UsageError, make_printable

_NAMES = ("logits", "out")


class LogitsSelector:
    """A forward hook that replaces what a network returns by its logits.

    As a hook of the network itself it changes neither module paths nor state dicts, and it runs wherever the network
    does: in a training, in a vectorised model, in an exported graph.

    Args:
        arch: The network's arch, for messages.
        classes: K, the number of classes.
        key: The key, attribute or index of the logits; "" to find them.
        location: Where the factory is defined, for messages.

    Attributes:
        arch, classes, key, location: As given.
        is_shared: Whether the network is a copy of one module, so that every seed starts from the same weights.
        notes: What to tell the user about the network, one line each.
    """

    def __init__(self, arch: str, classes: int, key: str = "", location: str = ""):
        self.arch, self.classes, self.key, self.location = arch, classes, key, location
        self.is_shared = False
        self.notes: list[str] = []

    def __call__(self, network: nn.Module, inputs: object, output: object) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            output = select_logits(output, self.arch, self.classes, self.key, network.training)
        if output.ndim == 1 and self.classes == 1:  # one number or label of each row
            output = output[:, None]
        if output.ndim != 2:
            raise UsageError(f"arch '{self.arch}' outputs {list(output.shape)}, not logits [B, {self.classes}]")
        images = inputs[0] if isinstance(inputs, tuple) and inputs else None
        if isinstance(images, torch.Tensor) and not torch.compiler.is_compiling() and len(output) != len(images):
            raise UsageError(
                f"arch '{self.arch}' outputs {list(output.shape)} for {len(images)} images, not one row for each"
            )
        return output


def find_selector(network: nn.Module) -> LogitsSelector | None:
    """Return the selector of a network of a user's own; None of a built-in one."""
    return next((hook for hook in network._forward_hooks.values() if isinstance(hook, LogitsSelector)), None)


def select_logits(output: object, arch: str, classes: int, key: str = "", is_training: bool = False) -> torch.Tensor:
    """Select the logits of an output that is not one tensor.

    Args:
        output: What the network returned.
        arch: The network's arch, for messages.
        classes: K.
        key: The key, attribute or index of the logits; "" to find them.
        is_training: Whether the network is in training mode: the first of several possible elements is then the main
            output.

    Raises:
        UsageError: There is no such element, it is not a tensor, or several elements can be the logits.
    """
    elements = dict(_list_elements(output))
    mode = " in training" if is_training else ""
    if key:
        if not isinstance(logits := elements.get(_normalize_index(key, output)), torch.Tensor):
            raise UsageError(f"--output {key}: arch '{arch}' returns{mode} {_describe(output, elements)}")
        return logits
    if not isinstance(output, list | tuple) or hasattr(output, "_fields"):
        names = _NAMES if isinstance(output, Mapping) else _NAMES[:1]
        for name in names:
            if isinstance(logits := elements.get(name), torch.Tensor):
                return logits
    candidates = {
        name: value
        for name, value in elements.items()
        if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == classes
    }
    if isinstance(output, list | tuple) and not hasattr(output, "_fields") and candidates:
        first = next(iter(candidates.values()))
        if len(candidates) == 1 or (is_training and first is elements["0"]):
            return first
    problem = "which of them are the logits is not clear" if len(candidates) > 1 else "which has no logits by itself"
    choice = f"--output {make_printable(next(iter(candidates)))}" if candidates else "--output KEY or INDEX"
    advice = f"name them with {choice}" if any(isinstance(v, torch.Tensor) for v in elements.values()) else ""
    advice = advice or "return a tensor [B, K]"
    raise UsageError(f"arch '{arch}' returns{mode} {_describe(output, elements)}, {problem}: {advice}")


def _list_elements(output: object) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an output with the names by which --output knows them."""
    if isinstance(output, Mapping):
        yield from ((str(key), value) for key, value in output.items())
    elif isinstance(output, list | tuple) and not hasattr(output, "_fields"):
        yield from ((str(i), value) for i, value in enumerate(output))
    elif hasattr(output, "_fields"):  # a named tuple
        yield from ((name, getattr(output, name)) for name in output._fields)
    else:
        names = dict.fromkeys((*getattr(output, "__dict__", {}), *getattr(output, "__slots__", ()), "logits"))
        yield from ((name, getattr(output, name)) for name in names if hasattr(output, name))


def _normalize_index(key: str, output: object) -> str:
    """Return the name of an element: an index may be negative, and also counts in dicts and named tuples."""
    if not key.removeprefix("-").isdecimal():
        return key
    names = [name for name, _ in _list_elements(output)]
    index = int(key)
    return names[index] if key not in names and -len(names) <= index < len(names) else key


def _describe(output: object, elements: Mapping[str, Any]) -> str:
    """Describe an output: its type, and the shape or type of each element."""
    if not elements:
        return f"{'None' if output is None else f'a {type(output).__name__}'}"
    texts = [f"{make_printable(name, 40)}: {_describe_element(value)}" for name, value in elements.items()]
    more = f", and {len(texts) - 6} more" if len(texts) > 6 else ""
    return f"a {type(output).__name__} ({', '.join(texts[:6])}{more})"


def _describe_element(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
