"""How long work reports its progress: to nobody, to a function of the caller, or on a progress bar."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .arguments import type_error

# progress(items, total, text) yields the items one by one and shows, under that text, how many of the total are done.
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
# callback(text, done, total) is told how many of the total are done, of the work that the text names.
ProgressCallback = Callable[[str, int, int], object]


def no_progress(items: Iterable[Any], _total: int, _text: str) -> Iterable[Any]:
    """Return the items as they are: the Progress that shows nothing."""
    return items


def resolve_progress(progress: bool | ProgressCallback) -> Progress:
    """Return the Progress of an argument `progress` of the public functions.

    Args:
        progress: False to show nothing, True for a progress bar on standard error, or a function that is called with
            (text, done, total).

    Raises:
        UsageError: It is neither a bool nor callable.
    """
    if progress is False:
        return no_progress
    if progress is True:
        return show_bar
    if not callable(progress):
        raise type_error("progress", progress, "True, False or a function of (text, done, total)")

    def report(items: Iterable[Any], total: int, text: str) -> Iterator[Any]:
        for done, item in enumerate(items, 1):
            yield item
            progress(text, done, total)

    return report


def show_bar(items: Iterable[Any], total: int, text: str) -> Iterator[Any]:
    """Yield the items and count them on a progress bar on standard error, which appears after a second."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=text, delay=1, leave=False)
