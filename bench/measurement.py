"""What the function of a row receives, returns and raises."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


class NotMeasurable(Exception):
    """Raised by a row that cannot be measured on this machine. Its text is the reason in the table."""


@dataclass(frozen=True)
class BenchOptions:
    """The options of one run of the benchmark, passed to every row.

    Attributes:
        folder: for the files that rows make; removed at the end.
        device: where students and teachers run.
        data_root: folder with MNIST as torchvision lays it out; empty where there is none.
        cifar: folder with CIFAR-10 as train/<class>/*.jpg and test/<class>/*.jpg; empty where there is none.
        weights: state dict of a ResNet-56 for CIFAR-10; empty where there is none.
        quick: every row is scaled down. It shows that the rows run; the numbers mean nothing.
        is_selection: only the rows named by --row are measured; they may take longer than in a run of all rows.
    """

    folder: Path
    device: torch.device
    data_root: str = ""
    cifar: str = ""
    weights: str = ""
    quick: bool = False
    is_selection: bool = False

    def scale(self, full: int, quick: int) -> int:
        """Return the number of a full run, or the smaller one under --quick."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Measurement:
    """The result of a row.

    Attributes:
        values: one value per round of a comparison, or the only one.
        details: the parts that the value was computed from, as text.
    """

    values: Sequence[float]
    details: str = ""

    @property
    def median(self) -> float:
        """The median of the values, which is compared with the goal."""
        return statistics.median(self.values)
