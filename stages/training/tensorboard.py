"""TensorBoard's event file of a training: the numbers of metrics.jsonl."""

import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from softcache.base.files import make_folder, name_file

EVENTS_FOLDER = "tensorboard"  # subfolder of the training's folder


class EventFileWriter:
    """Write the records of a training's epochs, first those so far, then one after each epoch. A step is an epoch.

    Existing event files are replaced: the file of a killed process lacks epochs, or has one more than the checkpoint
    that the training continues from. The file is appended to, not published as a whole, so TensorBoard can read it
    during the training. PyTorch's SummaryWriter would write it in a thread, whose error at a full disk is a traceback.

    Args:
        folder: of the training.
        lines: the records of the epochs so far.

    Raises:
        OSError: when the disk is full.
    """

    def __init__(self, folder: Path, lines: Sequence[dict[str, Any]]):
        events_folder = folder / EVENTS_FOLDER
        make_folder(events_folder)
        for old in events_folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.path = (
            events_folder / f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.0"
        )
        self._file = open(self.path, "wb")  # noqa: SIM115 (open until close())
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # A running TensorBoard discards what it has read from the replaced file, from step 1 on.
        self._write(Event(step=1, file_version="brain.Event:2"))
        self._write(Event(step=1, session_log=SessionLog(status=SessionLog.START)))
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write every number of an epoch's record: `loss_kd` as `loss/kd`, `val_accuracy` as `val/accuracy`."""
        for name, value in line.items():
            if name != "epoch":
                tag = re.sub("^(loss|gradient|val)_", r"\1/", name)
                summary = scalar(tag, value)  # type: ignore[no-untyped-call]
                self._write(Event(summary=summary, step=line["epoch"]))
        with name_file(self.path):
            self._file.flush()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with name_file(self.path):
            self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Write what is buffered and close the file."""
        with name_file(self.path):
            self._file.close()
