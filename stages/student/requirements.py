"""Whether a cache can serve what a student asks of it: found before the first step, in one line with the way out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.data.transfer_set import Labels, TransferSet, count_classes, draw_stratified
from softcache.pipeline.batch import LinearHead, LossContext
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.losses import Loss, parse_losses
from softcache.pipeline.losses.base import list_teacher_taps
from softcache.pipeline.losses.classifier import require_head
from softcache.pipeline.losses.feature_base import FeatureLoss
from softcache.pipeline.losses.hint import ConcatHint
from softcache.pipeline.losses.long_tail import require_counts
from softcache.pipeline.taps.statistics import compute_statistic, derive_features, find_source_tap
from softcache.pipeline.teachers.ensemble import MissingTargets
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import format_remake_command
from softcache.stages.cli.options import to_flag
from softcache.stages.training.validation import check_select

# Of the logits' range: float16 features and sqrt8 logits are off by under 1 %, the cells of an uneven grid (7 x 7 into
# 2 x 2) by more, another layer by half or all.
_MOST_GAP = 0.2


def parse_student_losses(config: StudentConfig, cache: Cache) -> tuple[Loss, ...]:
    """The losses of a run on this cache. Raises UsageError for those that it cannot serve, or that do not exist."""
    cached = tuple(cache.manifest.taps)
    losses = tuple(
        loss.with_default_layers(cached) if isinstance(loss, ConcatHint) else loss
        for loss in parse_losses(config.loss)
    )
    if cache.views.mixup and (wrong := [loss.name for loss in losses if loss.needs_single_label]):
        raise UsageError(f"loss '{wrong[0]}' is of one label a view, and the cache's views are mixed of two")
    if cache.manifest.head is None and (wrong := [loss.name for loss in losses if loss.needs_head]):
        raise UsageError(f"loss '{wrong[0]}' needs the teacher's last linear layer, and this teacher has none")
    return losses


def check_caches(config: StudentConfig, caches: Sequence[Cache], losses: tuple[Loss, ...]) -> tuple[str, ...]:
    """Check that the caches have what a student reads of them.

    Args:
        config: draws and draws_per_decode.
        caches: of the same views; layers are read of the first.
        losses: the terms.

    Returns:
        The cached taps from which those of the losses are made.

    Raises:
        CacheError: with the command that adds what is missing.
        UsageError: for draws that do not go into a batch.
    """
    taps = _find_cached_taps(config, caches[0], losses)
    for cache in caches:
        if config.draws > cache.manifest.draws:
            command = _format_growth(config, cache, draws=config.draws)
            raise CacheError(
                f"--draws {config.draws}, but the cache '{cache.folder}' has {cache.manifest.draws}."
                f" Add them with  {command}"
            )
    _check_draws_per_decode(config)
    return taps


def _find_cached_taps(config: StudentConfig, cache: Cache, losses: tuple[Loss, ...]) -> tuple[str, ...]:
    wanted, cached = list_teacher_taps(losses), list(cache.manifest.taps)
    missing = [tap for tap in wanted if find_source_tap(tap, cached) is None]
    if missing:
        command = _format_growth(config, cache, taps=",".join([*cached, *missing]))
        raise CacheError(
            f"the cache '{cache.folder}' has not kept {', '.join(missing)} (it has: {', '.join(cached) or 'none'})."
            f" Add them with  {command}"
        )
    return tuple(dict.fromkeys(source for tap in wanted if (source := find_source_tap(tap, cached))))


def _check_draws_per_decode(config: StudentConfig) -> None:
    """Every draw is to come once before one comes again, and a batch to hold all draws of its images."""
    k, draws, batch = config.draws_per_decode, config.draws, config.batch_size
    if draws % k:
        divisors = [n for n in range(1, draws + 1) if draws % n == 0]
        near = " or ".join(str(n) for n in [*[n for n in divisors if n < k][-1:], *[n for n in divisors if n > k][:1]])
        fewer = f", or --draws {draws - draws % k}" if draws > k else ""
        raise UsageError(f"--draws-per-decode {k} does not divide the {draws} draws that are used: {near} does{fewer}")
    if batch % k:
        near = " or ".join(f"--batch-size {n}" for n in (batch - batch % k, batch - batch % k + k) if n)
        raise UsageError(f"--batch-size {batch} is not a multiple of --draws-per-decode {k}: {near}")


def _format_growth(config: StudentConfig, cache: Cache, **changes: Any) -> str:
    """The command that adds to the cache, for the data as they lie here."""
    here = {"data": config.data} if config.data else {}
    return format_remake_command(cache, out=str(cache.folder), data_root=config.data_root, **here, **changes)


def hide_labels(config: StudentConfig, labels: Labels) -> Labels:
    """The labels [N] of the training split, -1 where --labelled hides them. Which rows keep theirs goes by the seed,
    how many of each class does not."""
    if not config.labelled:
        return labels
    kept = draw_stratified(labels, config.labelled, key=(config.seed, 50))
    return np.where(np.isin(np.arange(len(labels)), kept), labels, -1)


def check_labels(config: StudentConfig, losses: tuple[Loss, ...], transfer_set: TransferSet) -> None:
    """Check that the losses and options of a student go with the labels there are, and with the number of caches.

    Raises:
        UsageError: with the option to leave out or to change.
    """
    labels, classes = transfer_set.splits["train"].labels, transfer_set.classes
    unlabelled = bool((labels < 0).any())
    needy_losses = [loss.name for loss in losses if loss.needs_labels]
    if unlabelled and needy_losses:
        raise UsageError(f"loss '{needy_losses[0]}' needs labels, and these images have none: leave it out")
    needy_options = [name for name in ("baseline", "labelled", "finetune_epochs", "sampler") if getattr(config, name)]
    if unlabelled and needy_options:
        raise UsageError(f"{to_flag(needy_options[0])} needs labels, and these images have none: leave it out")
    if config.labelled and config.sampler:
        raise UsageError("--sampler needs the labels of all rows, --labelled hides some: leave out one")
    if config.labelled and not len(classes) <= config.labelled <= len(labels):
        raise UsageError(f"--labelled {config.labelled} is not between {len(classes)} classes and {len(labels)} rows")
    for loss in losses:
        if loss.needs_counts:
            require_counts(loss, torch.from_numpy(count_classes(hide_labels(config, labels), len(classes))), classes)
    _check_several(config, losses, labels)
    check_select(config, transfer_set)


def _check_several(config: StudentConfig, losses: tuple[Loss, ...], labels: Labels) -> None:
    """Whether these losses can be led by several teachers, or by none in some rows. Raises UsageError."""
    several = len(config.cache) > 1
    if config.combine and not several:
        raise UsageError(f"--combine {config.combine} is of several caches: --cache A --cache B")
    if several and (wrong := [loss.name for loss in losses if loss.needs_head]):
        raise UsageError(f"loss '{wrong[0]}' goes through the last layer of one teacher, and there are several")
    unweighed = [loss.name for loss in losses if loss.needs_logits and not loss.is_row_mean]
    if config.combine == "ca_mkd" and unweighed:
        raise UsageError(
            f"--combine ca_mkd weighs single rows, which loss '{unweighed[0]}' has not: kd, output and logit_mse have"
        )
    if config.missing == "hard" and config.labelled:
        raise UsageError("--missing hard needs the labels of all rows, --labelled hides some: --missing skip")
    if config.missing == "hard" and (labels < 0).any():
        raise UsageError("--missing hard needs labels, and some of these images have none: --missing skip")


def available_positions(cache: Cache, gaps: MissingTargets) -> NDArray[np.int64]:
    """The positions of the training split whose rows are there in the first draw. Raises CacheError for none."""
    gone = gaps.get(0, np.zeros(cache.manifest.splits["train"], bool))
    if gone.all():
        raise CacheError(f"'{cache.folder}' has no row of the first draw, which these losses want: repair it")
    return np.flatnonzero(~gone)


def read_head(cache: Cache, losses: tuple[Loss, ...], missing: MissingTargets) -> LinearHead | None:
    """Read the teacher's last linear layer, where a loss asks for it.

    Args:
        cache: the first cache, its transfer set known to be the right one: labels of rows that are read before that
            would not be compared.
        losses: the terms.
        missing: rows without targets.

    Raises:
        UsageError: where the layer does not give the cached logits for the features that a loss leads through it.
            Another layer of the same width, before an activation say, would be taken without notice.
    """
    if not any(loss.needs_head for loss in losses):
        return None
    head = cache.read_head()
    assert head is not None, "parse_student_losses refuses such a loss"
    for loss in losses:
        if isinstance(loss, FeatureLoss) and loss.needs_head:
            _check_head(cache, loss, head, missing)
    return head


def _check_head(cache: Cache, loss: FeatureLoss, head: LinearHead, missing: MissingTargets) -> None:
    tap = loss.teacher_taps()[0]
    source = find_source_tap(tap, cache.manifest.taps)
    assert source is not None
    logits, features = cache.read_stored("train", 0, available_positions(cache, missing)[:64], (source,))
    x = derive_features(features, (tap,))[tap]
    pooled = compute_statistic(x, "pool", tap)
    require_head(loss, LossContext(head), pooled.shape[1])
    span = (logits.amax(1) - logits.amin(1)).clamp(1e-3)
    gap = float(((pooled @ head.weight.T + head.bias - logits).abs().amax(1) / span).max())
    if gap > _MOST_GAP:
        raise loss.head_error(
            f"it does not read the mean of '{tap}', from which it gives logits that are off by {gap:.0%} of their"
            " range: choose the layer just before the pooling"
        )
