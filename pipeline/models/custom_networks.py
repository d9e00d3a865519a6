"""Networks of a user's own: `my_package.module:factory` is imported, called, and made ready for training.

A factory is a function or a class that is called with those of the keyword arguments `classes`, `channels`, `size` and
`shape` that it takes, and returns a torch.nn.Module. It may also be a module itself, whose copies are used. `shape` is
that of an input without the batch: (channels, size, size) of images; of rows of numbers `size` is 0.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from softcache.base.errors import UsageError
from softcache.base.user_code import locate_definition, user_code
from softcache.base.user_modules import import_attribute, keep_global_state, name_type

from .outputs import LogitsSelector

# Attribute of a network that computes with contiguous tensors alone, although it has convolutions.
NEEDS_CONTIGUOUS_INPUT = "_softcache_needs_contiguous_input"
_CALL = "factory(classes=…, channels=…, size=…, shape=…), of which it may leave out any"


def build_custom(
    module: str,
    factory: str,
    classes: int,
    shape: tuple[int, ...],
    similar: Callable[[str], str] | None = None,
) -> tuple[nn.Module, LogitsSelector]:
    """Build a network by a user's factory.

    Its weights are float32 and on the CPU, and lazy layers have their shapes.

    Args:
        module: Dotted name of the module, in the current folder or installed.
        factory: Name of the factory in it; dots for an attribute of an attribute.
        classes: K, the number of classes.
        shape: Of an input without the batch.
        similar: Returns a built-in arch like the name of a module that does not exist, or "".

    Returns:
        The network, and the selector of its logits, which is not registered yet. It has notes on the network.

    Raises:
        UsageError: The module cannot be imported, has no such factory, the factory fails, takes other arguments or
            returns no network, or the network cannot be made ready.
    """
    arch = f"{module}:{factory}"
    # What a module draws when it is imported does not change the weights of the seed, which are drawn next.
    with keep_global_state(), torch.random.fork_rng([]):
        user_module, maker = import_attribute("arch", module, factory, similar)
    selector = LogitsSelector(arch, classes, location=locate_definition(maker))
    if isinstance(maker, nn.Module):
        network, is_ready = maker, True
    else:
        with keep_global_state():
            network = call_factory(arch, maker, classes, shape)
        if not isinstance(network, nn.Module):
            raise UsageError(f"arch '{arch}' returned {name_type(network)}, not a torch.nn.Module")
        # A module that the factory keeps would be shared by all students of this process.
        is_ready = hasattr(maker, "cache_info") or any(value is network for value in vars(user_module).values())
    if is_ready:
        network = _copy_shared(network, selector)
    return make_ready(network, selector, shape), selector


def prepare_live_network(
    network: nn.Module, arch: str, classes: int, shape: tuple[int, ...]
) -> tuple[nn.Module, LogitsSelector]:
    """Prepare a copy of a network that a caller in Python passes; the network itself is not changed.

    Args:
        network: inputs float32 [B, *shape] -> logits [B, classes].
        arch: Its name, see `name_live_arch`.
        classes: K, the number of classes.
        shape: Of an input without the batch.

    Returns:
        As `build_custom`.

    Raises:
        UsageError: It is no network, or it cannot be copied or made ready.
    """
    if not isinstance(network, nn.Module):
        raise UsageError(f"a network is a torch.nn.Module or the name of an arch, not {name_type(network)}")
    selector = LogitsSelector(arch, classes, location=locate_definition(getattr(type(network), "forward", None)))
    return make_ready(_copy_shared(network, selector), selector, shape), selector


def name_live_arch(network: Any) -> str:
    """Return the name of the arch of a network, estimator or function that a caller passes: `module(nets.Net)`."""
    kind = network if inspect.isroutine(network) else type(network)
    return f"module({kind.__module__}.{kind.__qualname__})"


def is_live_arch(arch: str) -> bool:
    """Return whether an arch is a network that a caller in Python passed, which no name can build."""
    return arch.startswith("module(") and arch.endswith(")")


def _copy_shared(network: nn.Module, selector: LogitsSelector) -> nn.Module:
    """Copy a module that others hold too, so that every student starts from its weights."""
    selector.is_shared = True
    with user_code(f"the module of arch '{selector.arch}' cannot be copied", selector.location):
        return copy.deepcopy(network)


def make_ready(network: nn.Module, selector: LogitsSelector, shape: tuple[int, ...]) -> nn.Module:
    """Give a network float32 weights on the CPU, and lazy layers their shapes.

    Args:
        network: Changed in place.
        selector: The selector of its logits; it gets notes on what was changed.
        shape: Of a row of its input.

    Raises:
        UsageError: Weights have no values, or the first forward pass fails.
    """
    arch = selector.arch
    _check_real(arch, network)
    wide = {str(x.dtype).removeprefix("torch.") for x in network.state_dict(keep_vars=True).values() if _is_other(x)}
    if wide:
        network = network.float()
        selector.notes.append(f"arch '{arch}' has weights in {', '.join(sorted(wide))}: they are used in float32")
    if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        _give_shapes(network, shape, selector)
    if _needs_contiguous_input(network, shape):
        setattr(network, NEEDS_CONTIGUOUS_INPUT, True)
    return network


def check_factory(module: str, factory: str, similar: Callable[[str], str] | None = None) -> None:
    """Import a user's factory, without calling it; see `build_custom`.

    Raises:
        UsageError: The module cannot be imported, or has no such factory.
    """
    with keep_global_state():
        import_attribute("arch", module, factory, similar)


def call_factory(arch: str, factory: Any, classes: int, shape: tuple[int, ...]) -> Any:
    """Call a factory with those of its arguments that are known, and return what it returns.

    Args:
        arch: `my_package.module:factory`, for messages.
        factory: The function or class.
        classes: K, the number of classes.
        shape: Of an input without the batch.

    Raises:
        UsageError: It cannot be called, takes other arguments, or fails.
    """
    is_square = len(shape) == 3 and shape[1] == shape[2]
    sizes = {"classes": classes, "channels": shape[0], "size": shape[1] if is_square else 0, "shape": shape}
    if not callable(factory):
        raise UsageError(f"arch '{arch}' is {name_type(factory)}, neither a function nor a torch.nn.Module")
    positional, named = _choose_arguments(arch, factory, sizes)
    with user_code(f"the factory of arch '{arch}' failed", locate_definition(factory)):
        return factory(*positional, **named)


def _choose_arguments(arch: str, factory: Any, sizes: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the keyword arguments of a factory, by its signature.

    One that takes any keyword gets the shape where it names it, and where the input is no square image.
    """
    any_keyword = {name: value for name, value in sizes.items() if name != "shape" or not sizes["size"]}
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return [], any_keyword
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: sizes[p.name] for p in parameters if p.name in sizes and p.kind in keyword}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        named = any_keyword | named
    positional = []
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.name in sizes:
            positional.append(sizes[parameter.name])
            named.pop(parameter.name, None)
    other = [
        p.name
        for p in parameters
        if p.name not in sizes and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if other:
        raise UsageError(
            f"arch '{arch}' takes {', '.join(other)}, which softcache does not know: it calls {_CALL}. Write a"
            " function that takes these and calls yours"
        )
    return positional, named


def _is_other(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float32


def _check_real(arch: str, network: nn.Module) -> None:
    """Refuse weights that have shapes but no values, and weights that are not on the CPU are moved there."""
    tensors = (*network.parameters(), *network.buffers())
    if any(x.is_meta for x in tensors if not is_lazy(x)):
        raise UsageError(f"arch '{arch}' has weights on the device 'meta', which have no values: make them on the CPU")
    if any(x.device.type != "cpu" for x in tensors):
        network.cpu()


def _give_shapes(network: nn.Module, shape: tuple[int, ...], selector: LogitsSelector) -> None:
    """Run a network once, in eval mode, so that lazy layers get their shapes and their initial weights."""
    was_training = network.training
    task = f"arch '{selector.arch}' has lazy layers, and its first forward pass failed"
    with user_code(task, selector.location, lambda error: describe_input(error, shape)), torch.no_grad():
        network.eval()(make_noise(shape, 2))
    network.train(was_training)
    if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        raise UsageError(f"arch '{selector.arch}' has lazy layers that its forward pass does not run")


def _needs_contiguous_input(network: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network with convolutions cannot be laid out channels-last: `x.view(len(x), -1)` then fails.

    A copy is run on random input; whatever else fails in it is reported by the checks of the command.
    """
    if len(shape) != 3 or not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return False
    try:
        trial = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
        x = make_noise(shape, 2).contiguous(memory_format=torch.channels_last)
        with torch.random.fork_rng([]), torch.no_grad():
            trial(x)
    except Exception as error:
        return "view size is not compatible" in str(error)
    return False


def make_noise(shape: tuple[int, ...], rows: int) -> torch.Tensor:
    """Make random input, float32 [rows, *shape], the same each time, by a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, *shape, generator=generator)


def describe_input(error: BaseException, shape: tuple[int, ...]) -> str:
    """Return what a message adds of a failed forward pass: the input, and the option that changes its size."""
    if not isinstance(error, RuntimeError | ValueError | TypeError | IndexError | AssertionError):
        return ""
    text = f"; its input is [B, {', '.join(map(str, shape))}]"
    if len(shape) != 3 or shape[1] != shape[2]:  # no images
        return f"{text}, the shape of the rows"
    return f"{text}, of the size of the views: --views …:size=N of teacher and teacher-cache changes it"
