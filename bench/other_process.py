"""Contenders in a process of their own: the loops of others as their users run them, with default malloc and threads.

The commands of softcache ask malloc to keep large blocks, which also makes the plain loops of others up to 1.5 times
as fast: a live ResNet-56 in float32 goes from 560 to 840 images a second. In their own process those loops have the
defaults that their users have.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from .measurement import NotMeasurable
from .timing import Contender

ContenderFactory = tuple[Callable[..., Contender], tuple[Any, ...]]  # a function and its arguments, both picklable


@contextmanager
def start_in_other_process(factories: Mapping[str, ContenderFactory]) -> Iterator[dict[str, Contender]]:
    """Make contenders in one other process, which ends with the context.

    Args:
        factories: {name: (function that makes the contender, its arguments)}.

    Yields:
        {name: contender}; its turn runs in the other process.

    Raises:
        NotMeasurable: where a contender cannot be made there.
        RuntimeError: for any other error of the other process.
    """
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, dict(factories)))
    process.start()
    child_end.close()
    try:
        _receive(parent_end)
        yield {name: _make_remote_contender(parent_end, name) for name in factories}
        parent_end.send(None)
    finally:
        parent_end.close()
        process.join(10)
        process.terminate()


def _make_remote_contender(connection: Connection, name: str) -> Contender:
    def take_turn() -> float:
        connection.send(name)
        return float(_receive(connection))

    return take_turn


def _receive(connection: Connection) -> Any:
    """Wait for a reply of the other process; raise the error that it reports."""
    kind, value = connection.recv()
    if kind == "not measurable":
        raise NotMeasurable(value)
    if kind == "error":
        raise RuntimeError(value)
    return value


def _serve(connection: Connection, factories: Mapping[str, ContenderFactory]) -> None:
    """Run in the other process: make the contenders, then take a turn for each name that is received, until None."""
    # Workers of a DataLoader are forked, as in a user's script; a spawned process would spawn them.
    multiprocessing.set_start_method("fork", force=True)
    try:
        contenders = {name: make(*arguments) for name, (make, arguments) in factories.items()}
        connection.send(("ready", 0))
        while (name := connection.recv()) is not None:
            connection.send(("seconds", contenders[name]()))
    except NotMeasurable as error:
        connection.send(("not measurable", str(error)))
    except EOFError:
        return
    except Exception as error:  # raised again in the parent, by _receive
        connection.send(("error", f"{type(error).__name__}: {error}"[:300]))
