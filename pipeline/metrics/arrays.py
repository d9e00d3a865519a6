"""Arguments of metrics, arrays or tensors of numbers that are checked; and means of figures that may be unknown."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.arguments import type_error
from softcache.base.errors import UsageError

Array = NDArray[Any] | torch.Tensor


def to_numpy(name: str, x: Any) -> NDArray[Any]:
    """Return numbers as a NumPy array; bfloat16, which NumPy does not have, as float32.

    Raises:
        UsageError: They are no numbers.
    """
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return np.asarray(x.float() if x.dtype == torch.bfloat16 else x)
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError):
        raise type_error(name, x, "an array or a tensor of numbers") from None
    if array.dtype.kind not in "iuf":
        raise type_error(name, x, "an array or a tensor of numbers")
    return array


def check_finite(owner: str, outputs: NDArray[Any], name: str = "logits") -> None:
    """Raise UsageError for outputs [N, K] of the "student" or the "teacher" that are not finite."""
    if rows := int((~np.isfinite(outputs)).any(1).sum()):
        raise UsageError(
            f"the {owner}'s {name} are not finite in {rows} of {len(outputs)} rows (NaN or infinite): they have no"
            " metrics"
        )


def check_outputs(outputs: NDArray[Any], labels: NDArray[Any], teacher: NDArray[Any] | None) -> None:
    """Raise UsageError for outputs [N, K], hard targets [N, K] and a teacher's outputs [N, K] of other shapes."""
    if outputs.ndim != 2 or not outputs.shape[1] or labels.shape != outputs.shape:
        raise UsageError(f"outputs {list(outputs.shape)} and labels {list(labels.shape)} are not [N, K] both")
    if teacher is not None and teacher.shape != outputs.shape:
        raise UsageError(f"outputs {list(outputs.shape)} and the teacher's {list(teacher.shape)} differ in shape")
    check_finite("student", outputs, "outputs")
    if teacher is not None:
        check_finite("teacher", teacher, "outputs")


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Compute the mean of the figures that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
