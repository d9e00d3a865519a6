"""TensorBoard's event file of a training: the numbers of metrics.jsonl."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

EVENTS_FOLDER = "tensorboard"  # subfolder of the training's folder


class EventFileWriter:
    """Write the records of a training's epochs, first those so far, then one after each epoch. A step is an epoch.

    Existing event files are replaced: the file of a killed process lacks epochs, or has one more than the checkpoint
    that the training continues from. The file is appended to, not published as a whole, so TensorBoard can read it
    during the training.

    Args:
        folder: of the training.
        lines: the records of the epochs so far.
    """

    def __init__(self, folder: Path, lines: Sequence[dict[str, Any]]):
        for old in (folder / EVENTS_FOLDER).glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step: a running TensorBoard discards what it has read from the replaced file.
        self._writer = SummaryWriter(str(folder / EVENTS_FOLDER), purge_step=1, flush_secs=10)
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write every number of an epoch's record: `loss_kd` as `loss/kd`, `val_accuracy` as `val/accuracy`."""
        for name, value in line.items():
            if name != "epoch":
                tag = re.sub("^(loss|gradient|val)_", r"\1/", name)
                self._writer.add_scalar(tag, value, line["epoch"])

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()
