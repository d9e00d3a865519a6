"""A side in a process of its own: the loops of others as their users run them, with malloc and threads as they come.

`stages` asks malloc to keep large blocks, which makes the plain loops of others up to 1.5 times as fast as well: a
live ResNet-56 in float32 goes from 560 to 840 images a second. In their own process they have what they have.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from .interleaved import Missing, Side

Make = Callable[..., Side]


@contextmanager
def apart(sides: Mapping[str, tuple[Make, tuple[Any, ...]]]) -> Iterator[dict[str, Side]]:
    """{name: side} of {name: (make, arguments)}, all in one other process, where make(*arguments) is called first.

    Raises Missing where a side cannot be made there.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, dict(sides)))
    process.start()
    there.close()
    try:
        _answer(here)
        yield {name: _turn(here, name) for name in sides}
        here.send(None)
    finally:
        here.close()
        process.join(10)
        process.terminate()


def _turn(connection: Connection, name: str) -> Side:
    def turn() -> float:
        connection.send(name)
        return float(_answer(connection))

    return turn


def _answer(connection: Connection) -> Any:
    kind, value = connection.recv()
    if kind == "missing":
        raise Missing(value)
    if kind == "error":
        raise RuntimeError(value)
    return value


def _serve(connection: Connection, asked: Mapping[str, tuple[Make, tuple[Any, ...]]]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of a DataLoader's workers, as in a script; else it is spawn
    try:
        sides = {name: make(*arguments) for name, (make, arguments) in asked.items()}
        connection.send(("ready", 0))
        while (name := connection.recv()) is not None:
            connection.send(("seconds", sides[name]()))
    except Missing as missing:
        connection.send(("missing", str(missing)))
    except EOFError:
        return
    except Exception as error:  # told where it is waited for
        connection.send(("error", f"{type(error).__name__}: {error}"[:300]))
