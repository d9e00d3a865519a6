"""What a student is trained from: one cache or several and their transfer set, known to belong together."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.data.transfer_set import Labels, TransferSet, count_classes
from softcache.pipeline.batch import LinearHead, LossContext, MemoryBank
from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.verification import verify_views
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.classifier import SimKD
from softcache.pipeline.losses.multi_teacher import Term, by_each, by_one, by_trust, or_hard
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.models import build
from softcache.pipeline.models.archs.simkd import SimKDStudent, format_simkd_arch
from softcache.pipeline.models.prepared_model import InputSpec
from softcache.pipeline.taps.statistics import derive_features, find_source_tap
from softcache.pipeline.teachers.ensemble import TeacherEnsemble, find_missing_targets
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import progress
from softcache.stages.runs.environment import select_device
from softcache.stages.training.validation import HeldOutSplit, check_select

from .requirements import (
    available_positions,
    cached_taps,
    check_draws,
    check_draws_per_decode,
    check_head,
    check_labels,
    check_several,
    parse_student_losses,
)
from .teachers import load_shared_data, load_teachers, map_head, open_caches

_BANK_BYTES = 1 << 30


@dataclass(frozen=True)
class DistillationSetup:
    """What all seeds share. teachers: the cache, or several as one; cache: the first of them, of whose teacher the
    layers are; taps: those that are read of it; said: {split: logits of each teacher [N, K], or [N, M, K]} in index
    order; head: the teacher's last layer, where a loss asks for it."""

    teachers: TeacherEnsemble
    transfer_set: TransferSet
    losses: tuple[Loss, ...]
    taps: tuple[str, ...]
    input_spec: InputSpec
    device: torch.device
    held_out: dict[str, HeldOutSplit]
    member_outputs: dict[str, torch.Tensor]
    head: LinearHead | None

    @staticmethod
    def open(config: StudentConfig, like: "DistillationSetup | None" = None) -> "DistillationSetup":
        """Read and check everything before the first step. Raises CacheError or UsageError.

        like: of the same cache and data, opened before; then only what the losses ask is looked at again.
        """
        caches = like.teachers.members if like else open_caches(config.cache)
        cache = caches[0]
        losses = parse_student_losses(config, cache)
        taps = cached_taps(config, cache, losses)
        for one in caches:
            check_draws(config, one)
        check_draws_per_decode(config)
        head = cache.read_head() if any(loss.needs_head for loss in losses) else None
        transfer_set = like.transfer_set if like else load_shared_data(caches, config)
        labels = transfer_set.splits["train"].labels
        check_labels(config, losses, labels, transfer_set.classes)
        check_several(config, losses, labels)
        check_select(config, transfer_set)
        gaps = like.teachers.missing if like else {}
        if config.missing and not (like and like.taps == taps):
            gaps = find_missing_targets(caches, config.draws, taps, progress)
        if head:  # once the cache is bound: of rows that it reads before, labels would not be compared
            check_head(cache, losses, head, gaps)
        if like:
            teachers = replace(like.teachers, missing=gaps)
            return replace(like, teachers=teachers, losses=losses, taps=taps, head=map_head(teachers, head))
        for one in caches:
            verify_views(one, transfer_set, config.draws, gaps)
        teachers, said = load_teachers(caches, config, transfer_set, gaps)
        device = select_device(config.device)
        return DistillationSetup(
            teachers,
            transfer_set,
            losses,
            taps,
            # The student's input is normalised as the teacher's, at the size of the views themselves.
            replace(cache.input_spec, size=cache.views.size),
            device,
            {s: HeldOutSplit(transfer_set.splits[s], cache.views, device, config) for s in said},
            said,
            map_head(teachers, head),
        )

    @property
    def cache(self) -> Cache:
        """The first cache."""
        return self.teachers.members[0]

    @cached_property
    def teacher(self) -> dict[str, torch.Tensor]:
        """{split: logits [N, K] in index order} of what the student learns from, as one teacher."""
        return {split: self.teachers.as_single_teacher(logits) for split, logits in self.member_outputs.items()}

    def student_arch(self, config: StudentConfig, losses: tuple[Loss, ...]) -> str:
        """The arch that is asked for; with `simkd`, led through the teacher's last layer."""
        simkd = next((loss for loss in losses if isinstance(loss, SimKD)), None)
        if simkd is None:
            return config.arch
        width = self.cache.manifest.taps[self.taps[0]][0]
        return format_simkd_arch(config.arch, simkd.through(), width)

    def build_student(self, config: StudentConfig, losses: tuple[Loss, ...]) -> nn.Module:
        """The network that these losses train, with the initial weights of its seed."""
        torch.manual_seed(config.seed)
        network = self.build_network(self.student_arch(config, losses))
        if isinstance(network, SimKDStudent) and self.head is not None:
            network.use_head(self.head)
        return network

    def build_network(self, arch: str) -> nn.Module:
        """A network for these data, with fresh weights."""
        return build(arch, self.cache.classes, self.input_spec.channels, self.input_spec.size)

    def make_context(self, labels: Labels) -> LossContext:
        """What losses may ask of the teacher beside its rows. labels [N]: of the training split, -1 where hidden."""
        cache = self.cache

        def bank(tap: str) -> MemoryBank:
            """Rows of the first draw: all there are, or so many as 1 GiB holds. (They are stored in a mixed order.)"""
            source = find_source_tap(tap, cache.manifest.taps)
            assert source is not None
            name = f"features/{source}"
            size = count_row_bytes({name: cache.manifest.datasets[name]})
            positions = available_positions(cache, self.teachers.missing)[: max(1, _BANK_BYTES // size)]
            parts = (
                cache.read_stored("train", 0, some, (source,))[1]
                for some in np.array_split(positions, -(-len(positions) // 4096))
            )
            features = torch.cat([derive_features(part, (tap,))[tap].half() for part in parts])
            index = cache.index_at("train", positions)
            return MemoryBank(features, torch.from_numpy(index), torch.from_numpy(labels[index]))

        return LossContext(self.head, bank, torch.from_numpy(count_classes(labels, cache.classes)))

    def compute_logits(self, model: nn.Module) -> dict[str, NDArray[np.float32]]:
        """{split: float32 [N, K]}: what a student says of each held-out split."""
        return {split: rows.logits(model) for split, rows in self.held_out.items()}

    def compute_metrics(self, logits: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
        """Every figure of a student on each held-out split, from what it says there."""
        return {
            split: evaluate(said, self.held_out[split].labels, self.teacher[split].numpy(), self.class_counts)
            for split, said in logits.items()
        }

    @cached_property
    def teacher_metrics(self) -> dict[str, Any]:
        """Of what the student learns from, as one teacher: archs and every figure of each held-out split."""
        return self._figures(" + ".join(cache.teacher for cache in self.teachers.members), self.teacher)

    @cached_property
    def member_metrics(self) -> list[dict[str, Any]]:
        """The same of each cache as it is."""
        return [
            self._figures(cache.teacher, {s: z[:, k] if z.ndim == 3 else z for s, z in self.member_outputs.items()})
            for k, cache in enumerate(self.teachers.members)
        ]

    def _figures(self, arch: str, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
        rows = {split: self.transfer_set.splits[split].labels for split in logits}
        return {"arch": arch, **{s: evaluate(z.numpy(), rows[s], counts=self.class_counts) for s, z in logits.items()}}

    @cached_property
    def class_counts(self) -> Labels:
        """int64 [K]: rows of each class in the training split, where they have labels."""
        return count_classes(self.transfer_set.splits["train"].labels, self.cache.classes)

    def make_stream(self, config: StudentConfig, labels: Labels, only_labelled: bool, targets: bool) -> CacheLoader:
        """The training stream of one seed."""
        order = self.cache.row_order("train")
        wanted = labels[order] >= 0 if only_labelled else np.ones(len(order), bool)
        if config.missing == "skip":
            wanted &= ~self.missing_rows
        if not wanted.any():
            raise CacheError("no row of the training split is left: each lacks an answer in some draw, or a label")
        seed = config.seed if config.order_seed < 0 else config.order_seed
        stream = CacheLoader(
            self.transfer_set.splits["train"],
            self.cache.views,
            self.cache.seed,
            seed,
            config.batch_size,
            labels,
            np.flatnonzero(wanted),
            config.draws,
            self.teachers,
            self.taps,
            targets,
            config.workers,
            sampler=config.sampler,
            draws_per_decode=config.draws_per_decode,
            device=self.device,
        )
        if len(stream.rows) < config.draws_per_decode * stream.steps_per_epoch:
            raise UsageError(
                f"--draws-per-decode {config.draws_per_decode} leaves a batch of {config.batch_size} without a"
                f" image: there are {len(stream.rows)} rows; choose fewer, or a larger --batch-size"
            )
        return stream

    @property
    def missing_rows(self) -> NDArray[np.bool_]:
        """bool [rows]: which positions of the training split have no answer of a teacher in some draw."""
        gone = np.zeros(self.cache.manifest.splits["train"], bool)
        for in_draw in self.teachers.missing.values():
            gone |= in_draw
        return gone

    def multi_teacher(self, config: StudentConfig) -> Term:
        """How a term of the loss is led: by one teacher, by each, or by none where a row has no answer."""
        combine = self.teachers.combine
        term = (
            by_one if not (combine and combine.is_per_teacher) else by_trust if combine.name == "ca_mkd" else by_each
        )
        return or_hard(term) if config.missing == "hard" else term
