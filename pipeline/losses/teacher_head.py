"""The teacher's last linear layer, and whether the features of a loss are what it reads."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError
from softcache.pipeline.batch import LinearHead, LossContext
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.taps.statistics import compute_statistic, derive_features, find_source_tap
from softcache.pipeline.teachers.ensemble import MissingTargets

from .base import Loss
from .classifier import require_head
from .feature_base import FeatureLoss

# Largest error of the logits that the head computes from a tap, as a share of their range. float16 features and sqrt8
# logits are off by under 1 %, the cells of an uneven grid (7 x 7 into 2 x 2) by more, another layer by half or all.
_MAX_HEAD_ERROR = 0.2
_HEAD_ROWS = 64  # rows on which it is measured


def find_available_positions(cache: CacheReader, missing: MissingTargets) -> NDArray[np.int64]:
    """Return the positions of the training split whose targets the first draw has, int64 [n].

    Args:
        cache: the first cache.
        missing: {draw: bool [rows], which positions lack targets}.

    Raises:
        CacheError: when it has none.
    """
    is_missing = missing.get(0, np.zeros(cache.manifest.splits["train"], bool))
    if is_missing.all():
        raise CacheError(f"'{cache.folder}' has no row of the first draw, which these losses read: repair it")
    return np.flatnonzero(~is_missing)


def read_head(cache: CacheReader, losses: Sequence[Loss], missing: MissingTargets) -> LinearHead | None:
    """Read the teacher's last linear layer, where a loss needs it.

    Args:
        cache: the first cache, already compared with its transfer set: rows that are read before that would not have
            their labels compared.
        losses: the terms of the loss.
        missing: {draw: bool [rows], which positions lack targets}.

    Returns:
        The layer; None where no loss needs it, or the teacher has none.

    Raises:
        UsageError: when the layer does not compute the cached logits from the features that a loss puts through it.
            Another layer of the same width, before an activation say, would otherwise pass unnoticed.
    """
    if not any(loss.needs_head for loss in losses):
        return None
    head = cache.read_head()
    if head is None:
        return None
    for loss in losses:
        if isinstance(loss, FeatureLoss) and loss.needs_head:
            _check_head(cache, loss, head, missing)
    return head


def _check_head(cache: CacheReader, loss: FeatureLoss, head: LinearHead, missing: MissingTargets) -> None:
    tap = loss.teacher_taps()[0]
    source = find_source_tap(tap, cache.manifest.taps)
    assert source is not None
    positions = find_available_positions(cache, missing)[:_HEAD_ROWS]
    logits, features = cache.read_stored("train", 0, positions, (source,))
    feature = derive_features(features, (tap,))[tap]
    pooled = compute_statistic(feature, "pool", tap)
    require_head(loss, LossContext(head), pooled.shape[1])
    logit_range = (logits.amax(1) - logits.amin(1)).clamp(1e-3)
    difference = (pooled @ head.weight.T + head.bias - logits).abs().amax(1)
    error = float((difference / logit_range).max())
    if error > _MAX_HEAD_ERROR:
        raise loss.head_error(
            f"it does not read the mean of '{tap}', from which it computes logits that are off by {error:.0%} of their"
            " range: choose the layer just before the pooling"
        )
