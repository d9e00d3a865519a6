"""Modules of a user's own: `my_package.module:name`, on a command line, is imported and looked up here."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .current_folder import make_current_folder_importable
from .errors import UsageError, make_printable
from .user_code import describe_error


def is_importable_name(module: str) -> bool:
    """Return whether the part before the colon can be a module's name."""
    return all(part.isidentifier() for part in module.split("."))


def module_exists(module: str) -> bool:
    """Return whether the package of a dotted name is found, here or installed. Nothing is imported."""
    make_current_folder_importable()
    try:
        return find_spec(module.partition(".")[0]) is not None
    except ValueError:  # of a module that is loaded without a file, such as __main__
        return True


def file_name_error(kind: str, spec: str) -> UsageError | None:
    """Return the error for code that is named by the path of its file; None for another text.

    Args:
        kind: What is named, "arch" or "loss", for the message.
        spec: The text, such as `nets/small.py:make`.
    """
    path, colon, rest = spec.partition(":")
    if not colon or not ("/" in path or path.endswith(".py")):
        return None
    module = ".".join(Path(path.removesuffix(".py")).parts).lstrip(".")
    return UsageError(f"{kind} '{spec}' names a file: name the module, as Python imports it: '{module}:{rest}'")


def import_attribute(
    kind: str, module: str, attribute: str, similar: Callable[[str], str] | None = None
) -> tuple[ModuleType, Any]:
    """Import a user's module and look up an attribute of it.

    Args:
        kind: What the attribute is, "arch" or "loss", for messages.
        module: Dotted name of the module, in the current folder or installed.
        attribute: Name of the attribute; dots for an attribute of an attribute.
        similar: Returns a built-in name like the name of a module that does not exist, or "".

    Returns:
        The module, and the value of the attribute.

    Raises:
        UsageError: The module cannot be imported, or has no such attribute.
    """
    spec = f"{module}:{attribute}"
    make_current_folder_importable()
    try:
        user_module = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # a module that theirs imports
            raise UsageError(f"{kind} '{spec}' cannot be imported: {describe_error(error)}") from error
        hint = f". Did you mean '{similar(module)}:{attribute}'?" if similar and similar(module) else ""
        if module.endswith(".py"):
            hint = f". Name the module without .py: '{module[:-3]}:{attribute}'"
        raise UsageError(f"{kind} '{spec}' cannot be imported: {error}{hint}") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"{kind} '{spec}' cannot be imported: {describe_error(error)}") from error
    value: Any = user_module
    for name in attribute.split("."):
        try:
            value = getattr(value, name)
        except AttributeError as error:
            names = [key for key, item in vars(user_module).items() if callable(item) and not key.startswith("_")]
            close = get_close_matches(name, names, n=1)
            hint = f". Did you mean '{module}:{close[0]}'?" if close else ""
            raise UsageError(f"{kind} '{spec}' cannot be imported: {make_printable(error)}{hint}") from None
    return user_module, value


@contextmanager
def keep_global_state() -> Iterator[None]:
    """Undo what a user's module or factory may change of PyTorch, and print what it prints on standard error.

    Standard output may be for one JSON object.
    """
    dtype = torch.get_default_dtype()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()), redirect_stdout(sys.stderr):
            yield
    finally:
        torch.set_default_dtype(dtype)


def name_type(value: object) -> str:
    """Name the type of a value for a message: `a list`, or `None`."""
    return "None" if value is None else f"a {type(value).__name__}"
