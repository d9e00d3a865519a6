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
from softcache.pipeline.loading.stream import Stream
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.classifier import SimKD
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.models import build
from softcache.pipeline.models.archs.simkd import SimKDStudent, format_simkd_arch
from softcache.pipeline.models.prepared_model import InputSpec
from softcache.pipeline.taps.statistics import derive_features, find_source_tap
from softcache.pipeline.teachers.ensemble import TeacherEnsemble, find_missing_targets
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import progress
from softcache.stages.runs.environment import select_device
from softcache.stages.training.validation import HeldOutSplit

from . import requirements
from .teachers import load_shared_data, load_teachers, map_head, open_caches

_BANK_BYTES = 1 << 30


@dataclass(frozen=True)
class DistillationSetup:
    """What all seeds and phases of a student share.

    Attributes:
        teachers: the cache, or several as one teacher.
        transfer_set: images and labels.
        losses: the terms.
        taps: the cached layers that are read, of the first cache.
        input_spec: how a student's input is normalised: as the teacher's, at the size of the views.
        device: where students are trained.
        held_out: {split: validation or test}.
        member_outputs: {split: the logits of each teacher, float32 [N, K], or [N, M, K] of several} by index.
        head: the teacher's last linear layer, where a loss asks for it.
    """

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
    def open(config: StudentConfig) -> "DistillationSetup":
        """Read and check everything that a student is trained from, before the first step.

        Args:
            config: the options of a student, every default filled in.

        Raises:
            CacheError: for a cache that cannot serve them, or is of other images.
            UsageError: for options that do not go together.
        """
        caches = open_caches(config.cache)
        losses = requirements.parse_student_losses(config, caches[0])
        taps = requirements.check_caches(config, caches, losses)
        transfer_set = load_shared_data(caches, config)
        requirements.check_labels(config, losses, transfer_set)
        missing = find_missing_targets(caches, config.draws, taps, progress) if config.missing else {}
        head = requirements.read_head(caches[0], losses, missing)
        for cache in caches:
            verify_views(cache, transfer_set, config.draws, missing)
        teachers, outputs = load_teachers(caches, config, transfer_set, missing)
        device, views = select_device(config.device), caches[0].views
        return DistillationSetup(
            teachers=teachers,
            transfer_set=transfer_set,
            losses=losses,
            taps=taps,
            input_spec=replace(caches[0].input_spec, size=views.size),
            device=device,
            held_out={s: HeldOutSplit(transfer_set.splits[s], views, device, config) for s in outputs},
            member_outputs=outputs,
            head=map_head(teachers, head),
        )

    def with_options(self, config: StudentConfig) -> "DistillationSetup":
        """Return the setup of another student of the same caches and data: its losses and options are checked anew.

        Raises:
            CacheError, UsageError: as `open`.
        """
        caches = self.teachers.members
        losses = requirements.parse_student_losses(config, caches[0])
        taps = requirements.check_caches(config, caches, losses)
        requirements.check_labels(config, losses, self.transfer_set)
        missing = self.teachers.missing
        if config.missing and taps != self.taps:
            missing = find_missing_targets(caches, config.draws, taps, progress)
        head = requirements.read_head(caches[0], losses, missing)
        teachers = replace(self.teachers, missing=missing)
        return replace(self, teachers=teachers, losses=losses, taps=taps, head=map_head(teachers, head))

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
        return format_simkd_arch(config.arch, simkd.projected_layer(), width)

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
            positions = requirements.available_positions(cache, self.teachers.missing)[: max(1, _BANK_BYTES // size)]
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

    def make_stream(self, config: StudentConfig, labels: Labels, only_labelled: bool, targets: bool) -> Stream:
        """The training stream of one seed."""
        order = self.cache.row_order("train")
        wanted = labels[order] >= 0 if only_labelled else np.ones(len(order), bool)
        if config.missing == "skip":
            wanted &= ~self.missing_rows
        if not wanted.any():
            raise CacheError("no row of the training split is left: each lacks an answer in some draw, or a label")
        seed = config.seed if config.order_seed < 0 else config.order_seed
        stream = Stream(
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
        if len(stream.rows) < config.draws_per_decode * stream.steps_per_round:
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
