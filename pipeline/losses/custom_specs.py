"""A user's own loss on the command line: `my_package.module:MyLoss:weight=0.5,margin=2`."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import parse_spec
from softcache.base.user_code import locate_definition, user_code
from softcache.base.user_modules import import_attribute, is_importable_name, keep_global_state, name_type

from .base import Ramp
from .custom import Custom, LossFunction

Value = bool | int | float | str


def is_own_loss(spec: str) -> bool:
    """Return whether the text of a loss has the form `module:name` or `module:name:parameters`."""
    module, colon, rest = spec.partition(":")
    attribute = rest.partition(":")[0]
    return bool(colon) and is_importable_name(module) and is_importable_name(attribute)


def split_own_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """Split `my_module:MyLoss:weight=0.5` into ("my_module", "MyLoss", {"weight": "0.5"}).

    Raises:
        UsageError: a parameter has no value, or is given twice.
    """
    module, _, rest = spec.partition(":")
    attribute, colon, parameters = rest.partition(":")
    return module, attribute, parse_spec(f"{module}:{parameters}" if colon else module, "loss")[1]


def import_own_loss(spec: str, weight: float | Ramp) -> Custom:
    """Import a user's loss, and make it where it is a class or a factory.

    A class is called with the parameters of the text. A module or another callable object is used as it is. A function
    that has two positional parameters without defaults is the loss itself, and its other parameters, which have
    defaults, may be set; any other function is a factory, which is called with the parameters and returns the loss.

    Args:
        spec: the text of the loss.
        weight: factor of the term in the sum of losses.

    Raises:
        UsageError: the module cannot be imported, has no such attribute, or the attribute is no loss; it does not take
            the parameters; or the user's code fails.
    """
    module, attribute, texts = split_own_spec(spec)
    name = f"{module}:{attribute}"
    values = {key: _parse_value(name, key, text) for key, text in texts.items() if key != "weight"}
    # What a module or a constructor draws does not change the student's initial weights, which are drawn next.
    with keep_global_state(), torch.random.fork_rng([]):
        torch.manual_seed(0)  # for a module whose weights are drawn when it is imported
        _, value = import_attribute("loss", module, attribute)
        if not callable(value):
            raise UsageError(f"loss '{name}' is {name_type(value)}: neither a function, a class nor a callable object")
        _check_parameters(name, value, values)
        display_name = attribute.rpartition(".")[2]
        if isinstance(value, type) or is_factory(value, values):
            create = partial(_create, name, value, values)
            return Custom(create(), weight, display_name, create)
        return Custom(partial(value, **values) if values else value, weight, display_name)


def is_factory(value: Any, parameters: dict[str, Value]) -> bool:
    """Return whether a callable makes a loss, and is not one itself.

    Args:
        value: what the user's module has.
        parameters: those of the text: a function of two of them makes a loss.
    """
    if not inspect.isfunction(value):
        return False
    required = [p for p in inspect.signature(value).parameters.values() if p.default is p.empty]
    positional = [p.name for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    has_other = any(p.kind is p.KEYWORD_ONLY for p in required)
    return len(positional) != 2 or has_other or any(name in parameters for name in positional)


def list_own_parameters(spec: str) -> dict[str, type]:
    """List the parameters of a user's loss and their types, from its defaults and from the text.

    Args:
        spec: the text of a loss that can be imported.

    Returns:
        {parameter: bool, int, float or str}; float where nothing tells.
    """
    module, attribute, texts = split_own_spec(spec)
    name = f"{module}:{attribute}"
    with keep_global_state():
        _, value = import_attribute("loss", module, attribute)
    types: dict[str, type] = {"weight": float}
    for key, parameter in _get_parameters(value).items():
        is_own_argument = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_own_argument and (inspect.isfunction(value) or isinstance(value, type)):
            types[key] = type(parameter.default) if isinstance(parameter.default, Value) else float
    return types | {key: type(_parse_value(name, key, text)) for key, text in texts.items() if key not in types}


def _check_parameters(name: str, value: Any, parameters: dict[str, Value]) -> None:
    """Check that what is called takes these keyword parameters."""
    if not (isinstance(value, type) or inspect.isfunction(value)):
        if parameters:
            raise UsageError(f"loss '{name}' is {name_type(value)}, made already: it takes weight=… alone")
        return
    known = _get_parameters(value)
    if not known and parameters and not hasattr(value, "__code__"):
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    names = [key for key, parameter in known.items() if parameter.kind is not parameter.VAR_POSITIONAL]
    place = locate_definition(value)
    for parameter in parameters:
        if parameter not in names:
            owner = f"loss '{name}'" + (f" ({place})" if place else "")
            raise unknown_name_error("parameter", parameter, [*names, "weight"], owner=owner)


def _get_parameters(value: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(value).parameters)
    except (TypeError, ValueError):  # some built-in classes have no signature
        return {}


def _create(name: str, maker: Callable[..., Any], parameters: dict[str, Value]) -> LossFunction:
    """Call a class or a factory, and check that it makes a callable."""
    with user_code(f"loss '{name}' cannot be made", locate_definition(maker)):
        loss: Any = maker(**parameters)
    if not callable(loss) or isinstance(loss, type):
        what = "made an object that cannot be called" if isinstance(maker, type) else f"returned {name_type(loss)}"
        raise UsageError(f"loss '{name}' {what}: a loss is called with (outputs, batch) and returns a scalar tensor")
    return loss  # type: ignore[no-any-return]


def _parse_value(name: str, parameter: str, text: str) -> Value:
    """Parse a parameter of a user's own: true or false, an integer, a number, else the text."""
    if "->" in text:
        raise UsageError(f"loss '{name}': {parameter}={text}: of a loss of your own, only weight can be a ramp")
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
