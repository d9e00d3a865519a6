"""Interleaved timing: the contenders of a comparison take turns, and only times of the same round are compared.

The speed of one machine drifts by 15 to 25 % within minutes; the ratio of two turns that follow each other does not.
So a comparison runs in rounds. In each round every contender takes one turn. The first round is a warm-up and is not
counted (on a GPU two are). A row's values are the ratios of times within each counted round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from softcache.stages.runs.environment import wait_for_device

Contender = Callable[[], float]  # takes one turn, and returns the seconds per unit (an image or a row) of that turn


def time_in_turns(
    contenders: Mapping[str, Contender], rounds: int, warm_up: int = 1, on_turn: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Let contenders take turns for some rounds, after one round of warm-up or more.

    The order is reversed from round to round, so that no contender always follows the same one. Each turn begins with
    the number of CPU threads that was set before the first, whatever the contender before it has set.

    Args:
        contenders: {name: contender}.
        rounds: how many rounds are counted.
        warm_up: how many rounds come before them.
        on_turn: called after each turn.

    Returns:
        {name: seconds per unit in each counted round}.
    """
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            torch.set_num_threads(threads)
            seconds_per_unit = contenders[name]()
            if number >= warm_up:
                seconds[name].append(seconds_per_unit)
            on_turn()
    torch.set_num_threads(threads)
    return seconds


def make_contender(work: Callable[[], int], device: torch.device | None = None) -> Contender:
    """Return a contender whose turn is one call of work.

    Args:
        work: does the work and returns how many units it was.
        device: where the work runs; a GPU is waited for before the clock stops.
    """

    def take_turn() -> float:
        start = time.perf_counter()
        units = work()
        if device is not None:
            wait_for_device(device)
        return (time.perf_counter() - start) / units

    return take_turn


def take_fastest(first: Sequence[float], *others: Sequence[float]) -> list[float]:
    """Return the least time of each round: of several variants of a baseline, the best one counts."""
    return [min(times) for times in zip(first, *others, strict=True)]


def divide(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def format_medians(seconds: Mapping[str, Sequence[float]], scale: float = 1e6, unit: str = "us per image") -> str:
    """Return the median of each contender as text, as in `cached 535, hard 530 us per image`."""
    medians = (f"{name} {statistics.median(times) * scale:.3g}" for name, times in seconds.items())
    return f"{', '.join(medians)} {unit}"
