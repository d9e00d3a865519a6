"""TensorBoard's event file of a training: the numbers of metrics.jsonl, as that program reads them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

EVENTS_FOLDER = "tensorboard"  # in that of the training


class EventFileWriter:
    """Of a training in a folder: written from its lines so far, then line by line. A step is an epoch.

    Files that are there are replaced: one that a killed process left has too few epochs, or one more than the
    checkpoint that is gone on from. A log that is appended to is not published whole; a reader may look on.
    """

    def __init__(self, folder: Path, lines: Sequence[dict[str, Any]]):
        for old in (folder / EVENTS_FOLDER).glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step: a TensorBoard that is looking on forgets what it had read of the file before.
        self._writer = SummaryWriter(str(folder / EVENTS_FOLDER), purge_step=1, flush_secs=10)
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Every number of an epoch's line: `loss_kd` as `loss/kd`, `val_accuracy` as `val/accuracy`."""
        for name, value in line.items():
            if name != "epoch":
                tag = re.sub("^(loss|gradient|val)_", r"\1/", name)
                self._writer.add_scalar(tag, value, line["epoch"])

    def close(self) -> None:
        """Everything is on disk."""
        self._writer.close()
