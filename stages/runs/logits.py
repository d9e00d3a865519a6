"""The logits of a model on the held-out splits, saved with its run: plots and tests need neither model nor data."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from softcache.base.errors import CacheError, UsageError
from softcache.base.files import publish_bytes
from softcache.data.tasks import CLASSES, LABELS, NUMBERS, TASKS, HardTargets
from softcache.data.transfer_set import TransferSet

LOGITS, TEACHER_LOGITS = "logits.safetensors", "teacher-logits.safetensors"
_FORMAT = "softcache logits 1"


@dataclass(frozen=True)
class SplitLogits:
    """The logits of a model on one split.

    Attributes:
        logits: float32 [N, K], in row order.
        labels: int64 [N], in row order, -1 where there is none; or the hard targets of another task, see
            data/tasks.py.
        content: digest of the split's images and labels, equal for equal rows.
        classes: names of the classes, in the order of the logits; of an embedding, those of the labels.
        task: what the hard targets and the logits are.
    """

    logits: NDArray[np.float32]
    labels: HardTargets
    content: str
    classes: tuple[str, ...]
    task: str = CLASSES

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the K classes, or their numbers where the data have no names."""
        K = self.logits.shape[1]
        return self.classes if len(self.classes) == K else tuple(map(str, range(K)))


def save_logits(path: Path, logits: dict[str, NDArray[np.float32]], transfer_set: TransferSet) -> None:
    """Save logits with the labels and a digest of the rows.

    Args:
        path: a safetensors file.
        logits: {split: logits [N, K]}, in row order.
        transfer_set: the data of these splits.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    for split, values in logits.items():
        arrays[f"{split}.logits"] = np.ascontiguousarray(values, np.float32)
        arrays[f"{split}.labels"] = transfer_set.splits[split].labels
    contents = {split: transfer_set.splits[split].content for split in logits}
    record = {"form": _FORMAT, "content": json.dumps(contents), "classes": json.dumps(transfer_set.classes)}
    if transfer_set.task != CLASSES:
        record["task"] = transfer_set.task
    publish_bytes(path, save(arrays, record))  # save_file makes a file that only its owner can read


def read_logits(path: Path) -> dict[str, SplitLogits]:
    """Read saved logits.

    The format contains no code, and its reader checks every size against the file's before it reads.

    Args:
        path: a file of `save_logits`.

    Returns:
        {split: its logits}.

    Raises:
        UsageError: for a file that does not exist.
        CacheError: for a damaged file.
    """
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist: only a finished training has logits")
    try:
        with safe_open(path, "np") as file:
            record, names = file.metadata() or {}, set(file.keys())
            if record.get("form") != _FORMAT:
                raise ValueError(f"it is no file of the format '{_FORMAT}'")
            task = record.get("task", CLASSES)
            if task not in TASKS:
                raise ValueError("it has no task that is known")
            contents, classes = json.loads(record["content"]), tuple(map(str, json.loads(record["classes"])))
            if names != {f"{split}.{array}" for split in contents for array in ("logits", "labels")}:
                raise ValueError(f"it has the arrays {sorted(names)[:4]}")
            splits = {
                str(split): SplitLogits(
                    file.get_tensor(f"{split}.logits"), file.get_tensor(f"{split}.labels"), str(content), classes, task
                )
                for split, content in contents.items()
            }
        for split_logits in splits.values():
            _check_shapes(split_logits.logits, split_logits.labels, split_logits.task)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"'{path}' is damaged: {str(error)[:120]}") from None
    return splits


def _check_shapes(logits: NDArray[np.float32], labels: HardTargets, task: str) -> None:
    """Raise ValueError for logits and labels whose dtypes, rows or classes do not fit together."""
    rows, K = logits.shape if logits.ndim == 2 else (-1, -1)
    shape, dtype = {LABELS: ((rows, K), np.int8), NUMBERS: ((rows, K), np.float32)}.get(task, ((rows,), np.int64))
    if logits.dtype != np.float32 or labels.dtype != dtype or labels.shape != shape or K < 1:
        raise ValueError(f"logits {logits.dtype} {logits.shape}, labels {labels.dtype} {labels.shape}")
    largest = {CLASSES: K - 1, LABELS: 1}.get(task)
    if rows and largest is not None and not -1 <= labels.min() <= labels.max() <= largest:
        raise ValueError(f"labels {labels.min()} to {labels.max()} of {K} {task}")
