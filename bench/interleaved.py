"""Measuring side by side: every side takes a turn in every round, and what counts is the ratio within a round.

Rates of one machine drift by 15 to 25 % within minutes; ratios of turns that follow each other do not.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from softcache.stages.runs import environment

Side = Callable[[], float]  # takes its turn, and says how many seconds one unit of it took
OPTIONAL = ("torchdistill", "lmdb", "webdataset")  # of the extra `bench`


class Missing(Exception):
    """A row that cannot be measured here, with the reason: it stands in the table without a number."""


@dataclass(frozen=True)
class Given:
    """What rows are measured with. folder: for what they make, removed afterwards; data_root, cifar, weights: real
    data and a ResNet-56, empty where there are none; quick: a scaled-down run that shows no more than that it runs."""

    folder: Path
    device: torch.device
    data_root: str = ""
    cifar: str = ""
    weights: str = ""
    quick: bool = False
    named: bool = False  # these rows were asked for by name: they may take longer than in a run of all

    def few(self, usual: int, quick: int) -> int:
        """A number that --quick makes smaller."""
        return quick if self.quick else usual


@dataclass(frozen=True)
class Found:
    """What a row found. values: one of each round, or the one there is; why: how it came about, the parts it has."""

    values: Sequence[float]
    why: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def interleaved(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """{side: seconds of a unit in each round}, after a round that is not counted.

    The order turns around from round to round, so that no side always comes behind the same one. Each side finds
    as many CPU threads as there were, whatever the one before it has set.
    """
    threads = torch.get_num_threads()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            torch.set_num_threads(threads)
            seconds = sides[name]()
            if number:
                found[name].append(seconds)
    torch.set_num_threads(threads)
    return found


def timed(work: Callable[[], int], device: torch.device | None = None) -> Side:
    """A side that is its work from beginning to end. work() gives how many units it did."""

    def turn() -> float:
        begun = time.perf_counter()
        units = work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begun) / units

    return turn


def fastest(one: Sequence[float], *others: Sequence[float]) -> list[float]:
    """The least of each round: of several ways to write a baseline, the best."""
    return [min(turns) for turns in zip(one, *others, strict=True)]


def over(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as long one took as the other, round by round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def parts(found: Mapping[str, Sequence[float]], scale: float = 1e6, unit: str = "us a image") -> str:
    """The medians of the sides, in words."""
    said = (f"{name} {statistics.median(seconds) * scale:.3g}" for name, seconds in found.items())
    return f"{', '.join(said)} {unit}"


def machine(device: torch.device) -> dict[str, Any]:
    """Where this is measured."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {**environment.describe_machine(device), "cpu": model[0] if model else "", "cpus": len(model)}


def _lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def versions() -> dict[str, str]:
    """Of what is measured, and of what it is measured against."""
    found = environment.library_versions()
    for name in OPTIONAL:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
