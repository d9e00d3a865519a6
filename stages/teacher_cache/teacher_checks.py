"""Checks of a teacher on a few views, before its first output is stored.

The plain float32 teacher is run on two fixed groups of views, on the first group twice and on both together in another
order. Outputs that change are refused: what a cache holds of a view is a function of that view alone. The outputs for
8 views are kept in unfinished.json, so that a teacher whose code has changed does not finish the cache.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.base.schema import validate
from softcache.data.tasks import LABELS
from softcache.data.views.render import render
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.models.other_frameworks.file_network import StoredTargets
from softcache.stages.cli.console import Console

from .inference import LOGITS, PROBABILITIES, TeacherInference
from .targets import TargetGenerator

_GROUP = 8  # views of each of the two groups
_MIN_ROWS = 8  # rows that must all be probabilities before the teacher is refused
# As shares of the range of the logits. The same batch twice gives the same bits on a CPU; another batch moves float32
# outputs by 7e-7 at most, over 23 archs with random weights.
_RANDOM_TOLERANCE, _BATCH_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.01, 0.1
_SAME_TEACHER_TOLERANCE = 0.02  # between machines, or with TF32; the code of another teacher differs by far more
_SUM_TOLERANCE, _LOG_SUM_TOLERANCE = 5e-3, 0.02  # of rows of probabilities that were rounded to bfloat16
_LEAST_CERTAIN, _CERTAIN = 0.5, 0.9  # outputs of a sigmoid exceed the first; of a trained one also the second
_MAX_STORED_ROWS = 65_536  # of each split, of targets that were made elsewhere, that are looked at
_MAX_LOGITS, _MAX_FEATURES = 1024, 64  # values of a row that unfinished.json keeps

Outputs = dict[str, NDArray[np.float32]]  # {"logits": [n, K], "tap 'layer3'": [n, values]}
_RANDOM_ADVICE = "Call .eval() on every part of the network, and use F.dropout(x, training=self.training)"
_BATCH_ADVICE = "Call .eval() on every part of the network, and use F.batch_norm(…, training=self.training)"


def check_stable(generator: TargetGenerator) -> Outputs:
    """Check that the teacher's outputs for a view are the same each time and in any batch.

    Args:
        generator: The teacher, its views and the options of the command.

    Returns:
        The outputs for both groups of views, the first group first; of targets that were made elsewhere, those of many
        rows.

    Raises:
        UsageError: The outputs are random, or they depend on the other views of the batch.
    """
    if generator.has_stored_targets:
        return _read_stored_targets(generator)
    first, second = _render_groups(generator)
    outputs, of_second = _run_teacher(generator, first), _run_teacher(generator, second)
    _check_deterministic(generator, outputs, _run_teacher(generator, first))
    reversed_views = torch.cat([second, first]).flip(0)
    in_both = {name: np.concatenate([of_second[name], rows]) for name, rows in outputs.items()}
    mixed = _run_teacher(generator, reversed_views)
    in_order = {name: rows[::-1] for name, rows in mixed.items()}
    if change := _find_change(in_both, in_order, _batch_tolerance(generator)):
        _check_deterministic(generator, mixed, _run_teacher(generator, reversed_views))
        name, share = change
        raise UsageError(
            f"the teacher's {name} for a view depend on the other views of its batch: in another batch they differ by"
            f" {share:.1%} of their range, as with batch norm in train mode{_name_train_mode(generator)}."
            f" {_BATCH_ADVICE}"
        )
    return {name: np.concatenate([rows, of_second[name]]) for name, rows in outputs.items()}


def check_kind(generator: TargetGenerator, outputs: Outputs, console: Console) -> None:
    """Check that the outputs are what --outputs says: logits, or probabilities or their logarithms.

    Args:
        generator: The teacher and the options of the command.
        outputs: For both groups of views. Where the training split has few, held-out views are run as well.
        console: Prints a line where the outputs look like those of a sigmoid.

    Raises:
        UsageError: They are not.
    """
    rows, kind = outputs["logits"], generator.config.outputs
    if len(rows) < _MIN_ROWS and not generator.has_stored_targets:
        held_out = [split for split in generator.transfer_set.splits if split != "train"]
        views = [_render_views(generator, split, _GROUP) for split in held_out]
        rows = np.concatenate([rows, *(_run_teacher(generator, x)["logits"] for x in views)])
    if len(rows) < _MIN_ROWS or np.isnan(rows).any():
        return
    if generator.transfer_set.task == LABELS:
        return _check_kind_of_labels(rows, kind, console)
    if rows.shape[1] < 2:
        return
    sums, log_sums = rows.sum(1, dtype=np.float64), np.logaddexp.reduce(rows.astype(np.float64), 1)
    is_probability = (rows >= 0).all(1) & (np.abs(sums - 1) <= _SUM_TOLERANCE)
    is_log_probability = (rows <= 1e-6).all(1) & (np.abs(log_sums) <= _LOG_SUM_TOLERANCE)
    if kind == PROBABILITIES and not (is_probability | is_log_probability).all():
        row = int(np.flatnonzero(~(is_probability | is_log_probability))[0])
        raise UsageError(
            f"--outputs {PROBABILITIES}, but a row of the teacher's outputs sums to {sums[row]:.4g}, and its smallest"
            f" value is {rows[row].min():.4g}: these are no probabilities, leave --outputs out if they are logits"
        )
    if kind != LOGITS:
        return
    if is_probability.all() or is_log_probability.all():
        form = "probabilities (each row sums to 1)" if is_probability.all() else "logarithms of probabilities"
        raise UsageError(
            f"the teacher outputs {form}, as after a softmax, not logits: let its network end before the softmax, or"
            f" say --outputs {PROBABILITIES}, and their logarithms are stored"
        )
    if (rows >= 0).all() and (rows <= 1).all() and rows.max() > 0.5:
        console.print(
            "note: all outputs of the teacher are between 0 and 1 and do not sum to 1, as after a sigmoid. They are"
            " stored as logits: where a network ends in a sigmoid, let it end before that"
        )


def _check_kind_of_labels(rows: NDArray[np.float32], kind: str, console: Console) -> None:
    """Check that outputs [N, K] for several labels are logits, or probabilities of each label.

    Raises:
        UsageError: They are not.
    """
    low, high = float(rows.min()), float(rows.max())
    is_between = low >= 0 and high <= 1
    if kind == PROBABILITIES and not is_between:
        raise UsageError(
            f"--outputs {PROBABILITIES}, but the teacher's outputs are from {low:.4g} to {high:.4g}, and probabilities"
            " of labels are between 0 and 1: leave --outputs out if they are logits"
        )
    if kind != LOGITS or not is_between or high <= _LEAST_CERTAIN:
        return
    text = f"all outputs of the teacher are between 0 and 1 ({low:.4g} to {high:.4g}), as after a sigmoid"
    advice = f"--outputs {PROBABILITIES} stores their log-odds"
    if low < 1 - _CERTAIN and high > _CERTAIN:
        raise UsageError(f"{text}, and not logits: let its network end before the sigmoid, or {advice}")
    console.print(f"note: {text}. They are stored as logits: where its network ends in a sigmoid, {advice}")


def compute_reference(generator: TargetGenerator) -> Outputs:
    """Compute the outputs of the plain float32 teacher for both groups of views, as `check_stable` returns them.

    Targets that were made elsewhere have none: the digest in the identity is that of all of them.
    """
    if generator.has_stored_targets:
        return {}
    outputs, of_second = (_run_teacher(generator, views) for views in _render_groups(generator))
    return {name: np.concatenate([rows, of_second[name]]) for name, rows in outputs.items()}


def to_record(outputs: Outputs) -> dict[str, Any]:
    """Return a bounded part of the outputs as plain JSON values, for unfinished.json or another rank.

    Args:
        outputs: Of both groups of views; the first 8 rows are kept.

    Returns:
        {name: rows}, where a row has at most 1,024 logits or 64 values of a feature; empty where one is not finite.
    """
    record = {name: _thin_out(name, rows[:_GROUP]) for name, rows in outputs.items()}
    if not all(np.isfinite(rows).all() for rows in record.values()):
        return {}
    return {name: [[float(f"{value:.7g}") for value in row] for row in rows] for name, rows in record.items()}


def check_same_teacher(
    reference: dict[str, Any], record: Any, generator: TargetGenerator, other: str, advice: str
) -> None:
    """Check that the teacher gives the outputs that were recorded of it.

    Args:
        reference: Record of the outputs of this teacher, see `to_record`.
        record: The earlier record, from a file that is not trusted; None or empty where there is none.
        generator: The teacher.
        other: Whose outputs the record holds, for the message.
        advice: What to do, for the message.

    Raises:
        CacheError: The outputs differ, or the record is damaged.
    """
    if not record or not reference:
        return
    validate(record, {str: [[float]]}, f"reference_outputs of {other}")
    for name, rows in reference.items():
        if list(map(len, record.get(name, []))) != list(map(len, rows)):
            raise CacheError(
                f"the teacher's {name} for {len(rows)} views have another shape than those of {other}. {advice}"
            )
    expected, recorded = (
        {name: np.array(outputs[name], np.float32) for name in reference} for outputs in (reference, record)
    )
    tolerance = max(_SAME_TEACHER_TOLERANCE, _batch_tolerance(generator))
    if change := _find_change(recorded, expected, tolerance):
        name, share = change
        largest = float(np.nanmax(np.abs(expected[name] - recorded[name])))
        raise CacheError(
            f"the teacher's outputs are not those of {other}: for the same {len(expected[name])} views its {name}"
            f" differ by up to {largest:.3g}, {share:.1%} of their range. {advice}"
        )


def _read_stored_targets(generator: TargetGenerator) -> Outputs:
    """Return targets that were made elsewhere, up to 65,536 rows of each split, before they become logits."""
    network = generator.teacher.network
    assert isinstance(network, StoredTargets)
    return {"logits": np.concatenate([rows[:_MAX_STORED_ROWS].numpy() for rows in network.logits.values()])}


def _render_groups(generator: TargetGenerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Render the two groups of views, uint8 [n, C, S, S] each; of a single view twice the same one."""
    views = _render_views(generator, "train", 2 * _GROUP)
    half = -(-len(views) // 2)
    return views[:half], views[half:] if len(views) > 1 else views


def _render_views(generator: TargetGenerator, split: str, count: int) -> torch.Tensor:
    """Render the views of a split that are written first."""
    images, seed = generator.transfer_set.splits[split].images, generator.config.seed
    index = make_row_order(seed, split, len(images))[:count]
    return render(images, generator.teacher_views.of_split(split), seed, index.astype(np.int64), 0)


def _run_teacher(generator: TargetGenerator, views: torch.Tensor) -> Outputs:
    """Run the teacher as it is, in float32, and return the outputs before they become logits of the data's classes."""
    inference = TeacherInference(generator.teacher, generator.taps, maps_classes=False)
    with inference.open() as infer:
        logits, features = infer(views.to(inference.device))
        outputs = {"logits": logits, **{f"tap '{tap}'": x for tap, x in features.items()}}
        return {name: np.array(x.float().reshape(len(x), -1).cpu().numpy()) for name, x in outputs.items()}


def _check_deterministic(generator: TargetGenerator, outputs: Outputs, repeated: Outputs) -> None:
    if change := _find_change(outputs, repeated, _RANDOM_TOLERANCE):
        name, share = change
        raise UsageError(
            f"the teacher's {name} are random: run twice on the same views they differ by {share:.1%} of their range,"
            f" as with dropout that is on{_name_train_mode(generator)}. {_RANDOM_ADVICE}"
        )


def _name_train_mode(generator: TargetGenerator) -> str:
    """Name the first layer that is in train mode, or is a batch norm without statistics; empty where there is none."""
    for path, module in generator.teacher.network.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if (module.training and not list(module.children())) or (is_norm and module.running_mean is None):
            reason = "is in train mode" if module.training else "has no running statistics"
            return f" ({type(module).__name__} '{path}' {reason})"
    return ""


def _find_change(expected: Outputs, outputs: Outputs, tolerance: float) -> tuple[str, float] | None:
    """Return the first output that differs by more than a tolerance, and by how much; None where all are equal.

    Differences count as shares of the largest range of a row. Of rows that are nearly constant it is a thousandth of
    the largest value: their rounding is relative to the values, not to their range.
    """
    for name, rows in expected.items():
        other = outputs[name]
        is_equal = (rows == other) | (np.isnan(rows) & np.isnan(other))
        if is_equal.all():
            continue
        with np.errstate(invalid="ignore"):
            difference = np.where(is_equal, 0, np.abs(rows - other)).max()
        finite = np.where(np.isfinite(rows), rows, 0)
        scale = max(float(np.ptp(finite, 1).max()), 1e-3 * float(np.abs(finite).max()), 1e-12)
        if not difference / scale <= tolerance:
            return name, float(difference / scale)
    return None


def _batch_tolerance(generator: TargetGenerator) -> float:
    """Return the share of the range by which outputs may move in another batch: more for weights in half precision."""
    dtypes = {value.dtype for value in generator.teacher.network.parameters()}
    return _HALF_TOLERANCE if dtypes & {torch.float16, torch.bfloat16} else _BATCH_TOLERANCE


def _thin_out(name: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return as many values of each row as a record keeps, at regular distances."""
    count = min(rows.shape[1], _MAX_LOGITS if name == "logits" else _MAX_FEATURES)
    return rows[:, np.arange(count) * rows.shape[1] // max(count, 1)]
