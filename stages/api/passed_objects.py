"""What a run was made of that its settings cannot name: the student and the losses that a caller passed as objects."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn

from softcache.base.errors import CacheError
from softcache.base.files import make_folder, publish_json
from softcache.pipeline.losses import Custom, Loss
from softcache.pipeline.models.state_dicts import hash_weights
from softcache.stages.runs.folder import PASSED_FILE, read_json


def describe_passed(student: nn.Module | None, losses: Sequence[Loss]) -> dict[str, str]:
    """Describe the objects of a call by digests of their code and of their weights.

    Args:
        student: The network, with its initial weights; None where it was named.
        losses: The terms of the loss.

    Returns:
        {what it is, for messages: digest}; empty where everything was named.
    """
    described = {}
    if student is not None:
        described["code of the student"] = _hash_code(student)
        described["initial weights of the student"] = hash_weights(student)
    for number, loss in enumerate(losses):
        if isinstance(loss, Custom):
            name = f"loss {number}, {loss.name},"
            described[f"code of {name}"] = _hash_code(loss.function)
            if isinstance(loss.function, nn.Module):
                described[f"initial weights of {name}"] = hash_weights(loss.function)
    return described


def check_passed(folder: Path, described: dict[str, str]) -> None:
    """Compare the objects of a call with those that a run was started with, where it has a record of them.

    Args:
        folder: Of the run.
        described: What `describe_passed` returned.

    Raises:
        CacheError: Something is another one.
    """
    path = folder / PASSED_FILE
    if not path.is_file():
        return
    recorded = read_json(path)
    different = [name for name in {**recorded, **described} if recorded.get(name) != described.get(name)]
    if different:
        raise CacheError(
            f"'{folder}' was started with other objects ({', '.join(different)}): choose another out. To go on in a"
            " new process, seed PyTorch before the student is made, as in the first"
        )


def record_passed(folder: Path, described: dict[str, str]) -> None:
    """Record the objects of a call in the folder of its run, which is made; nothing where everything was named."""
    if described:
        make_folder(folder)
        publish_json(folder / PASSED_FILE, described)


def _hash_code(value: Any) -> str:
    """Return the SHA-256 of the code of a function, or of the classes of an object and of the modules in it."""
    digest = sha256()
    for text in _list_code(value):
        digest.update(text.encode())
    return digest.hexdigest()


def _list_code(value: Any) -> Iterator[str]:
    if inspect.isfunction(value) or inspect.ismethod(value):
        function = value.__func__ if inspect.ismethod(value) else value
        yield from _list_function(function)
        return
    modules = value.modules() if isinstance(value, nn.Module) else [value]
    for kind in dict.fromkeys(type(module) for module in modules):
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "functools"):
            yield f"{kind.__module__}.{kind.__qualname__}"
            continue
        for name, member in sorted(vars(kind).items()):
            if inspect.isfunction(member):
                yield name
                yield from _list_function(member)
    if isinstance(value, nn.Module):
        yield repr(value)  # the arguments of its layers


def _list_function(function: Callable[..., Any]) -> Iterator[str]:
    yield from _list_byte_code(function.__code__)
    yield _format_constant(function.__defaults__)
    for cell in function.__closure__ or ():
        yield _format_constant(cell.cell_contents)


def _list_byte_code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_byte_code(constant)
        else:
            yield _format_constant(constant)


def _format_constant(value: object) -> str:
    """Format a constant as in every process: a set has no order, and the repr of most objects has an address."""
    if isinstance(value, tuple | frozenset):
        items = [_format_constant(item) for item in value]
        return f"{type(value).__name__}({', '.join(sorted(items) if isinstance(value, frozenset) else items)})"
    is_plain = value is None or value is ... or isinstance(value, int | float | complex | str | bytes)
    return repr(value) if is_plain else type(value).__qualname__
