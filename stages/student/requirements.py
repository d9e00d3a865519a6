"""Checks, before the first step, that a cache and its images have what a student needs; a message says what to do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from softcache.base.errors import CacheError, UsageError
from softcache.data.sampling import draw_labelled_rows
from softcache.data.tasks import CLASSES, EMBEDDING, HardTargets, find_known, hide_rows, require_classes
from softcache.data.transfer_set import TransferSet, count_classes
from softcache.pipeline.cache.codecs import DENSE
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import Loss, check_codec, check_loss_trains, check_task, parse_losses
from softcache.pipeline.losses.base import list_teacher_taps
from softcache.pipeline.losses.hint import ConcatHint
from softcache.pipeline.losses.long_tail import require_counts
from softcache.pipeline.taps.statistics import find_source_tap
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import format_remake_command
from softcache.stages.cli.options import to_flag
from softcache.stages.training.validation import check_select, select_error


def parse_student_losses(
    config: StudentConfig, cache: CacheReader, losses: Sequence[Loss] | None = None
) -> tuple[Loss, ...]:
    """Parse the losses of a student and check that they can be computed from this cache.

    Args:
        config: the options of the student; `loss` holds one text a term.
        cache: the first cache.
        losses: the terms where a caller in Python passes them; None for those of the options.

    Returns:
        The terms of the loss, in the order of the options.

    Raises:
        UsageError: for a loss or an option that does not exist, or that this cache does not allow.
    """
    check_task_options(config, cache.task)
    cached = tuple(cache.manifest.taps)
    losses = tuple(
        loss.with_default_layers(cached) if isinstance(loss, ConcatHint) else loss
        for loss in (parse_losses(config.loss) if losses is None else losses)
    )
    check_task(losses, cache.task)
    _check_codec(config, cache, losses)
    check_loss_trains(losses, cache.classes, config.epochs)
    if cache.views.mixes_images and (names := [loss.name for loss in losses if loss.needs_single_label]):
        raise UsageError(
            f"loss '{names[0]}' needs one label per view, and the cache's views are mixtures of two images"
        )
    if cache.manifest.head is None and (names := [loss.name for loss in losses if loss.needs_head]):
        raise UsageError(f"loss '{names[0]}' needs the teacher's last linear layer, and this teacher has none")
    return losses


def _check_codec(config: StudentConfig, cache: CacheReader, losses: tuple[Loss, ...]) -> None:
    """Check that losses and options can be computed from the logits of the codec of a cache."""
    name, kind = cache.codec_name, cache.codec.kind
    check_codec(losses, name, kind)
    for option in ("map", "combine"):
        if kind != DENSE and (value := getattr(config, option)):
            raise UsageError(
                f"{to_flag(option)} {value} needs the teacher's logits of all classes, and the cache has the codec"
                f" {name}: leave it out, or a cache with the codec float16 or sqrt8"
            )


def check_task_options(config: StudentConfig, task: str) -> None:
    """Check that no option of a student is for another task than the one of its cache.

    Raises:
        UsageError: with the option to leave out.
    """
    options = ("recipe", "sampler", "map", "combine", "missing") if task != CLASSES else ()
    for name in options:
        if (value := getattr(config, name)) and (task, value) != (EMBEDDING, "per_teacher"):
            require_classes(task, f"{to_flag(name)} {value}")
    if task == EMBEDDING:
        for name in ("baseline", "labelled", "finetune_epochs"):
            if getattr(config, name):
                raise UsageError(
                    f"{to_flag(name)} is for hard targets, and the task {EMBEDDING} has none: leave it out"
                )
    elif config.width:
        raise UsageError(
            f"--width {config.width} is for the task {EMBEDDING}, and the task here is {task}: leave it out"
        )


def check_caches(config: StudentConfig, caches: Sequence[CacheReader], losses: tuple[Loss, ...]) -> tuple[str, ...]:
    """Check that the caches have what a student reads of them.

    Args:
        config: `draws` and `draws_per_decode`.
        caches: of the same views; features are read from the first.
        losses: the terms of the loss.

    Returns:
        The cached taps from which the features of the losses are computed.

    Raises:
        CacheError: for missing taps or draws, with the command that adds them.
        UsageError: when `draws_per_decode` does not divide the draws or the batch size.
    """
    taps = _find_cached_taps(config, caches[0], losses)
    for cache in caches:
        if config.draws > cache.manifest.draws:
            command = _format_growth(config, cache, draws=config.draws)
            first = "to the cache of embeddings, then " if "head" in cache.manifest.identity["teacher"] else ""
            raise CacheError(
                f"--draws {config.draws}, but the cache '{cache.folder}' has {cache.manifest.draws}."
                f" Add them {first}with  {command}"
            )
    _check_draws_per_decode(config)
    return taps


def _find_cached_taps(config: StudentConfig, cache: CacheReader, losses: tuple[Loss, ...]) -> tuple[str, ...]:
    taps, cached = list_teacher_taps(losses), list(cache.manifest.taps)
    missing = [tap for tap in taps if find_source_tap(tap, cached) is None]
    if missing and "head" in cache.manifest.identity["teacher"]:
        raise CacheError(
            f"the cache '{cache.folder}' does not contain {', '.join(missing)}: a cache that a head made of embeddings"
            " has no layers; choose a loss that reads logits alone, such as kd"
        )
    if missing:
        command = _format_growth(config, cache, taps=",".join([*cached, *missing]))
        raise CacheError(
            f"the cache '{cache.folder}' does not contain {', '.join(missing)}"
            f" (it has: {', '.join(cached) or 'none'}). Add them with  {command}"
        )
    return tuple(dict.fromkeys(source for tap in taps if (source := find_source_tap(tap, cached))))


def _check_draws_per_decode(config: StudentConfig) -> None:
    """Check that every draw is seen once before one is seen again, and that a batch holds all draws of its images."""
    k, draws, batch_size = config.draws_per_decode, config.draws, config.batch_size
    if draws % k:
        divisors = [n for n in range(1, draws + 1) if draws % n == 0]
        nearest = [*[n for n in divisors if n < k][-1:], *[n for n in divisors if n > k][:1]]
        fewer = f", or --draws {draws - draws % k}" if draws > k else ""
        raise UsageError(
            f"--draws-per-decode {k} does not divide the {draws} draws that are used:"
            f" {' or '.join(map(str, nearest))} does{fewer}"
        )
    if batch_size % k:
        multiples = [n for n in (batch_size - batch_size % k, batch_size - batch_size % k + k) if n]
        raise UsageError(
            f"--batch-size {batch_size} is not a multiple of --draws-per-decode {k}:"
            f" {' or '.join(f'--batch-size {n}' for n in multiples)}"
        )


def _format_growth(config: StudentConfig, cache: CacheReader, **changes: Any) -> str:
    """Format the command that adds draws or taps to the cache, with the images where this machine has them."""
    data = {"data": config.data} if config.data else {}
    return format_remake_command(cache, out=str(cache.folder), data_root=config.data_root, **data, **changes)


def hide_labels(config: StudentConfig, labels: HardTargets) -> HardTargets:
    """Hide all labels but `config.labelled` of them, drawn by class.

    Args:
        config: `labelled`, 0 for all; `seed`, on which depends which rows keep their label, not how many of a class.
        labels: the hard targets of the training split by index.

    Returns:
        A copy in which those that are hidden are unknown.
    """
    if not config.labelled:
        return labels
    labelled_rows = draw_labelled_rows(labels, config.labelled, config.seed)
    return hide_rows(labels, ~np.isin(np.arange(len(labels)), labelled_rows))


def check_labels(config: StudentConfig, losses: tuple[Loss, ...], transfer_set: TransferSet) -> None:
    """Check the losses and options of a student against the labels of the images and the number of caches.

    Args:
        config: the options of the student.
        losses: the terms of the loss.
        transfer_set: the images, with -1 as the label of those that have none.

    Raises:
        UsageError: with the option to leave out or to change.
    """
    labels, classes = transfer_set.splits["train"].labels, transfer_set.classes
    labelled = int(find_known(labels).sum())
    check_options(config, losses, lacks_labels=not labelled)
    if labelled < len(labels):
        _check_partly_labelled(config, len(labels) - labelled)
    least = len(classes) if transfer_set.task == CLASSES else 1
    if config.labelled and not least <= config.labelled <= labelled:
        what = f"{least} classes" if transfer_set.task == CLASSES else "1"
        raise UsageError(f"--labelled {config.labelled} is not between {what} and {labelled} rows")
    for loss in losses:
        if loss.needs_counts:
            require_counts(loss, torch.from_numpy(count_classes(hide_labels(config, labels), len(classes))), classes)
    check_select(config, transfer_set)


def check_options(config: StudentConfig, losses: tuple[Loss, ...], lacks_labels: bool) -> None:
    """Check the losses and options of a student against each other, and those that need labels.

    Args:
        config: the options of the student.
        losses: the terms of the loss.
        lacks_labels: whether no training image has a label.

    Raises:
        UsageError: with the option to leave out or to change.
    """
    needy_losses = [loss.name for loss in losses if loss.needs_labels]
    if lacks_labels and needy_losses:
        raise UsageError(f"loss '{needy_losses[0]}' needs labels, and these images have none: leave it out")
    needy_options = [name for name in ("baseline", "labelled", "finetune_epochs", "sampler") if getattr(config, name)]
    if lacks_labels and needy_options:
        raise UsageError(f"{to_flag(needy_options[0])} needs labels, and these images have none: leave it out")
    if config.labelled and config.sampler:
        raise UsageError("--sampler needs the labels of all rows, --labelled hides some: leave out one")
    _check_teachers(config, losses, lacks_labels)


def _check_partly_labelled(config: StudentConfig, unlabelled: int) -> None:
    """Refuse what needs the label of every training image; losses leave out the rows without one."""
    if config.sampler:
        raise UsageError(f"--sampler needs the labels of all training images, {unlabelled:,} have none: leave it out")
    if config.missing == "hard":
        raise UsageError(f"--missing hard needs labels, and {unlabelled:,} images have none: use --missing skip")


def check_without_validation_labels(config: StudentConfig) -> None:
    """Check that no option needs the labels of the validation split, which has none.

    Raises:
        UsageError: with the option to leave out.
    """
    if config.select != "last":
        raise select_error(config.select)
    for option, value in (("--combine", config.combine), ("--map", config.map)):
        if value == "learned" or (option == "--map" and value and not value.startswith("prior")):
            raise UsageError(f"{option} {value} is fitted to validation labels, and these images have none")


def _check_teachers(config: StudentConfig, losses: tuple[Loss, ...], lacks_labels: bool) -> None:
    """Check that the losses can learn from several teachers, or from labels where targets are missing."""
    several = len(config.cache) > 1
    if config.combine and not several:
        raise UsageError(f"--combine {config.combine} is for several caches: --cache A --cache B")
    if several and (names := [loss.name for loss in losses if loss.needs_head]):
        raise UsageError(f"loss '{names[0]}' uses the last layer of one teacher, and there are several caches")
    names = [loss.name for loss in losses if loss.needs_logits and not loss.is_row_mean]
    if config.combine == "ca_mkd" and names:
        raise UsageError(
            f"--combine ca_mkd weights each row, and loss '{names[0]}' is not a mean over rows: use kd, output or"
            " logit_mse"
        )
    if config.missing == "hard" and config.labelled:
        raise UsageError("--missing hard needs the labels of all rows, --labelled hides some: use --missing skip")
    if config.missing == "hard" and lacks_labels:
        raise UsageError("--missing hard needs labels, and some of these images have none: use --missing skip")
