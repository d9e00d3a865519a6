"""What a model says of the held-out splits, kept with its run: its images and tests need neither model nor data."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from softcache.base.errors import CacheError, UsageError
from softcache.base.files import publish_bytes
from softcache.data.transfer_set import Labels, TransferSet

LOGITS, TEACHER_LOGITS = "logits.safetensors", "teacher-logits.safetensors"
_FORM = "softcache logits 1"


@dataclass(frozen=True)
class SplitLogits:
    """Of one split: logits float32 [N, K], labels int64 [N] (-1 where there is none), both in row order; content:
    digest of its images and labels, equal for equal rows; classes: names, in the order of the logits."""

    logits: NDArray[np.float32]
    labels: Labels
    content: str
    classes: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the K classes: their numbers, where the data have no names for them."""
        K = self.logits.shape[1]
        return self.classes if len(self.classes) == K else tuple(map(str, range(K)))


def save_logits(path: Path, logits: dict[str, NDArray[np.float32]], transfer_set: TransferSet) -> None:
    """Keep {split: logits [N, K]} in row order, beside the labels and what tells these rows from others."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for split, said in logits.items():
        arrays[f"{split}.logits"] = np.ascontiguousarray(said, np.float32)
        arrays[f"{split}.labels"] = transfer_set.splits[split].labels
    contents = {split: transfer_set.splits[split].content for split in logits}
    record = {"form": _FORM, "content": json.dumps(contents), "classes": json.dumps(transfer_set.classes)}
    publish_bytes(path, save(arrays, record))  # save_file would make one that its owner alone may read


def read_logits(path: Path) -> dict[str, SplitLogits]:
    """{split: what is kept of it}. Raises UsageError when there is no such file, CacheError for what is damaged.

    The format has no code in it, and its reader checks every size against the file's before it reads.
    """
    if not path.is_file():
        raise UsageError(f"'{path}' is not there: only a training that is over leaves its logits")
    try:
        with safe_open(path, "np") as file:
            record, names = file.metadata() or {}, set(file.keys())
            if record.get("form") != _FORM:
                raise ValueError(f"it is no {_FORM}")
            contents, classes = json.loads(record["content"]), tuple(map(str, json.loads(record["classes"])))
            if names != {f"{split}.{what}" for split in contents for what in ("logits", "labels")}:
                raise ValueError(f"it has {sorted(names)[:4]}")
            found = {
                str(split): SplitLogits(
                    file.get_tensor(f"{split}.logits"), file.get_tensor(f"{split}.labels"), str(content), classes
                )
                for split, content in contents.items()
            }
        for kept in found.values():
            _check(kept)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"'{path}' is damaged: {str(error)[:120]}") from None
    return found


def _check(kept: SplitLogits) -> None:
    """Raise ValueError for logits and labels that are not of the same rows and classes."""
    rows, K = kept.logits.shape if kept.logits.ndim == 2 else (-1, -1)
    if kept.logits.dtype != np.float32 or kept.labels.dtype != np.int64 or kept.labels.shape != (rows,) or K < 1:
        raise ValueError(f"logits {kept.logits.dtype} {kept.logits.shape}, labels {kept.labels.shape}")
    if rows and not -1 <= kept.labels.min() <= kept.labels.max() < K:
        raise ValueError(f"labels {kept.labels.min()} to {kept.labels.max()} of {K} classes")
