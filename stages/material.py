"""What a student is trained from: a cache and its transfer set, known to belong together, and what losses ask."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.errors import Refused, WrongCommand
from data.transfer_set import Labels, TransferSet, class_counts, stratified
from pipeline.cache import Cache
from pipeline.losses import Loss, parse_losses
from pipeline.losses.hint import ConcatHint
from pipeline.losses.layers import LayerLoss
from pipeline.losses.loss import teacher_taps
from pipeline.losses.rare import counts_for
from pipeline.losses.through_head import SimKD, head_for
from pipeline.manifest import row_bytes
from pipeline.metrics import evaluate
from pipeline.models import build
from pipeline.models.prepared import Preparation
from pipeline.models.simkd import SimKDStudent, arch_of
from pipeline.proof import probe
from pipeline.records import Bank, Head, Known
from pipeline.statistic import derived, source_of, statistic
from pipeline.stream import Stream

from .check_cache import data_of
from .command_line import remake
from .held_out import HeldOut
from .runs import device_of
from .settings import StudentSettings

_BANK_BYTES = 1 << 30
# Of the logits' range: float16 features and sqrt8 logits are off by under 1 %, the cells of an uneven grid (7 x 7 into
# 2 x 2) by more, another layer by half or all.
_MOST_GAP = 0.2


@dataclass(frozen=True)
class Material:
    """What all seeds share. taps: those that are read of the cache; teacher: {split: logits [N, K] in index order}."""

    cache: Cache
    transfer_set: TransferSet
    losses: tuple[Loss, ...]
    taps: tuple[str, ...]
    preparation: Preparation
    device: torch.device
    held_out: dict[str, HeldOut]
    teacher: dict[str, torch.Tensor]
    head: Head | None  # the teacher's last layer, where a loss asks for it

    @staticmethod
    def open(settings: StudentSettings, like: "Material | None" = None) -> "Material":
        """Read and check everything before the first step. Raises Refused or WrongCommand.

        like: of the same cache and data, opened before; then only what the losses ask is looked at again.
        """
        cache = like.cache if like else Cache(Path(settings.cache))
        losses = _losses(settings, cache)
        taps = _cached_taps(settings, cache, losses)
        _check_draws(settings, cache)
        head = cache.head() if any(loss.needs_head for loss in losses) else None
        if head:
            _check_head(cache, losses, head)
        if like:
            labels = like.transfer_set.splits["train"].labels
            _check_labels(settings, losses, labels, like.transfer_set.classes)
            return replace(like, losses=losses, taps=taps, head=head)
        transfer_set = data_of(cache, settings.data, Path(settings.data_root))
        labels = transfer_set.splits["train"].labels
        _check_labels(settings, losses, labels, transfer_set.classes)
        probe(cache, transfer_set, settings.draws)
        device = device_of(settings.device)
        splits = [split for split in ("val", "test") if split in transfer_set.splits]
        return Material(
            cache, transfer_set, losses, taps,
            # The student's input is normalised as the teacher's, at the size of the views themselves.
            replace(cache.preparation, size=cache.views.size), device,
            {s: HeldOut(transfer_set.splits[s], cache.views, device, settings) for s in splits},
            {s: _teacher_logits(cache, s) for s in splits},
            head,
        )  # fmt: skip

    def arch(self, settings: StudentSettings, losses: tuple[Loss, ...]) -> str:
        """The arch that is asked for; with `simkd`, led through the teacher's last layer."""
        simkd = next((loss for loss in losses if isinstance(loss, SimKD)), None)
        if simkd is None:
            return settings.arch
        width = self.cache.manifest.taps[self.taps[0]][0]
        return arch_of(settings.arch, simkd.through(), width)

    def network(self, settings: StudentSettings, losses: tuple[Loss, ...]) -> nn.Module:
        """The network that these losses train, with the initial weights of its seed."""
        torch.manual_seed(settings.seed)
        network = self.build(self.arch(settings, losses))
        if isinstance(network, SimKDStudent) and self.head is not None:
            network.answer_through(self.head)
        return network

    def build(self, arch: str) -> nn.Module:
        """A network for these data, with fresh weights."""
        return build(arch, self.cache.classes, self.preparation.channels, self.preparation.size)

    def known(self, labels: Labels) -> Known:
        """What losses may ask of the teacher beside its rows. labels [N]: of the training split, -1 where hidden."""
        cache = self.cache

        def bank(tap: str) -> Bank:
            """Rows of the first draw: all, or so many as 1 GiB holds. (Rows are stored in a mixed order.)"""
            source = source_of(tap, cache.manifest.taps)
            assert source is not None
            name = f"features/{source}"
            size = row_bytes({name: cache.manifest.datasets[name]})
            positions = np.arange(min(len(labels), max(1, _BANK_BYTES // size)))
            parts = (
                cache.stored("train", 0, some, (source,))[1]
                for some in np.array_split(positions, -(-len(positions) // 4096))
            )
            features = torch.cat([derived(part, (tap,))[tap].half() for part in parts])
            index = cache.order("train")[positions]
            return Bank(features, torch.from_numpy(index), torch.from_numpy(labels[index]))

        return Known(self.head, bank, torch.from_numpy(class_counts(labels, cache.classes)))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Every figure of a student on each held-out split."""
        return {
            split: evaluate(rows.logits(model), rows.labels, self.teacher[split].numpy(), self.counts)
            for split, rows in self.held_out.items()
        }

    @property
    def counts(self) -> Labels:
        """int64 [K]: rows of each class in the training split, where they have labels."""
        return class_counts(self.transfer_set.splits["train"].labels, self.cache.classes)

    def stream(self, settings: StudentSettings, labels: Labels, only_labelled: bool, targets: bool) -> Stream:
        """The training stream of one seed."""
        order = self.cache.order("train")
        rows = np.flatnonzero(labels[order] >= 0) if only_labelled else np.arange(len(order))
        return Stream(
            self.transfer_set.splits["train"], self.cache.views, self.cache.seed, settings.seed, settings.batch_size,
            labels, rows, settings.draws, self.cache, self.taps, targets, settings.workers,
            sampler=settings.sampler,
        )  # fmt: skip


def _losses(settings: StudentSettings, cache: Cache) -> tuple[Loss, ...]:
    """The losses of a run on this cache. Raises WrongCommand for those that it cannot serve, or that do not exist."""
    cached = tuple(cache.manifest.taps)
    losses = tuple(
        loss.of_all(cached) if isinstance(loss, ConcatHint) else loss for loss in parse_losses(settings.loss)
    )
    if cache.views.mixup and (wrong := [loss.name for loss in losses if loss.one_label]):
        raise WrongCommand(f"loss '{wrong[0]}' is of one label a view, and the cache's views are mixed of two")
    if cache.manifest.head is None and (wrong := [loss.name for loss in losses if loss.needs_head]):
        raise WrongCommand(f"loss '{wrong[0]}' needs the teacher's last linear layer, and this teacher has none")
    return losses


def _cached_taps(settings: StudentSettings, cache: Cache, losses: tuple[Loss, ...]) -> tuple[str, ...]:
    """The cached taps that the losses' own can be had from. Raises Refused with the command that adds the missing."""
    asked = teacher_taps(losses)
    there = list(cache.manifest.taps)
    missing = [tap for tap in asked if source_of(tap, there) is None]
    if missing:
        have = f"has not kept {', '.join(missing)} (it has: {', '.join(there) or 'none'})"
        more = _more(settings, cache, taps=",".join([*there, *missing]))
        raise Refused(f"the cache '{settings.cache}' {have}. Add them with  {more}")
    return tuple(dict.fromkeys(source for tap in asked if (source := source_of(tap, there))))


def _check_draws(settings: StudentSettings, cache: Cache) -> None:
    if settings.draws > cache.manifest.draws:
        have = f"the cache '{settings.cache}' has {cache.manifest.draws}"
        more = _more(settings, cache, draws=settings.draws)
        raise Refused(f"--draws {settings.draws}, but {have}. Add them with  {more}")


def _more(settings: StudentSettings, cache: Cache, **changes: Any) -> str:
    """The command that adds to the cache, for the data as they lie here."""
    here = {"data": settings.data} if settings.data else {}
    return remake(cache, out=settings.cache, data_root=settings.data_root, **here, **changes)


def visible(settings: StudentSettings, labels: Labels) -> Labels:
    """The labels [N] of the training split, -1 where --labelled hides them. Which rows keep theirs goes by the seed,
    how many of each class does not."""
    if not settings.labelled:
        return labels
    kept = stratified(labels, settings.labelled, key=(settings.seed, 50))
    return np.where(np.isin(np.arange(len(labels)), kept), labels, -1)


def _check_labels(
    settings: StudentSettings, losses: tuple[Loss, ...], labels: Labels, classes: tuple[str, ...]
) -> None:
    unlabelled = bool((labels < 0).any())
    wanting = [loss.name for loss in losses if loss.needs_labels]
    if unlabelled and wanting:
        raise WrongCommand(f"loss '{wanting[0]}' needs labels, and these pictures have none: leave it out")
    needing = [name for name in ("baseline", "labelled", "finetune_epochs", "sampler") if getattr(settings, name)]
    if unlabelled and needing:
        flag = needing[0].replace("_", "-")
        raise WrongCommand(f"--{flag} needs labels, and these pictures have none: leave it out")
    if settings.labelled and settings.sampler:
        raise WrongCommand("--sampler needs the labels of all rows, --labelled hides some: leave out one")
    if settings.labelled and not len(classes) <= settings.labelled <= len(labels):
        raise WrongCommand(
            f"--labelled {settings.labelled} is not between {len(classes)} classes and {len(labels)} rows"
        )
    for loss in losses:
        if loss.needs_counts:
            counts_for(loss, torch.from_numpy(class_counts(visible(settings, labels), len(classes))), classes)


def _check_head(cache: Cache, losses: tuple[Loss, ...], head: Head) -> None:
    """The teacher's last layer must give the cached logits for the features that a loss leads through it.

    Raises WrongCommand: another layer of the same width, before an activation say, would be taken without a word.
    """
    for loss in losses:
        if not (isinstance(loss, LayerLoss) and loss.needs_head):
            continue
        tap = loss.teacher_taps()[0]
        source = source_of(tap, cache.manifest.taps)
        assert source is not None
        logits, features = cache.stored("train", 0, np.arange(min(64, cache.manifest.splits["train"])), (source,))
        x = derived(features, (tap,))[tap]
        pooled = statistic(x, "pool", tap)
        head_for(loss, Known(head), pooled.shape[1])
        span = (logits.amax(1) - logits.amin(1)).clamp(1e-3)
        gap = float(((pooled @ head.weight.T + head.bias - logits).abs().amax(1) / span).max())
        if gap > _MOST_GAP:
            raise loss.without_head(
                f"it does not read the mean of '{tap}', from which it gives logits that are off by {gap:.0%} of their"
                " range: choose the layer just before the pooling"
            )


def _teacher_logits(cache: Cache, split: str) -> torch.Tensor:
    order = cache.order(split)
    logits = cache.targets(split, 0, np.arange(len(order)))[0]
    by_index = torch.empty_like(logits)
    by_index[torch.from_numpy(order)] = logits
    return by_index
