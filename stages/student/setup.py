"""What a student is trained from: one cache or several and their transfer set, checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.data.tasks import EMBEDDING, NUMBERS, HardTargets, find_known
from softcache.data.transfer_set import Labels, TransferSet, count_classes
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import verify_views
from softcache.pipeline.loading.cache import Cache
from softcache.pipeline.loading.context import measure_numbers
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.loading.training_embeddings import read_bank
from softcache.pipeline.loading.view_checks import ViewChecks
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.teacher_head import read_head
from softcache.pipeline.metrics.embedding_bank import EmbeddingBank
from softcache.pipeline.models import build
from softcache.pipeline.models.archs.simkd import SimKDStudent
from softcache.pipeline.models.configurations import DEFAULT
from softcache.pipeline.models.initial_weights import InitialWeights, read_initial_weights
from softcache.pipeline.models.network_checks import TrainingCheck, check_trainable
from softcache.pipeline.models.prepared_model import PUBLISHED, InputSpec
from softcache.pipeline.teachers.ensemble import TeacherEnsemble, find_missing_targets
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import progress
from softcache.stages.distributed.ranks import first_rank_first
from softcache.stages.runs.environment import select_device
from softcache.stages.training.data_parallel import count_least_rows
from softcache.stages.training.validation import HeldOutSplit

from . import requirements
from .early_checks import check_before_images, get_student_arch
from .embedding_width import check_select_width, choose_width, describe_projections, has_free_width, measure_width
from .split_figures import evaluate_splits
from .student_input import choose_normalize, make_student_spec
from .teachers import load_shared_data, load_teachers, open_caches


@dataclass(frozen=True)
class DistillationSetup:
    """What all seeds and phases of a student share.

    Attributes:
        source: the caches as one teacher, and their data.
        losses: the terms of the loss.
        taps: the cached features that are read, all from the first cache.
        device: where students are trained.
        held_out: {split: its images, labels and views} of `val` and, where there is one, `test`.
        member_logits: {split: logits by index, float32 [N, K] of one cache, [N, M, K] of M caches}, before they are
            combined and mapped.
        head: the teacher's last linear layer where a loss needs it, else None.
        input_spec: how a view becomes the student's input, at the size of the views.
        initial: the weights that every seed starts from; None for fresh ones.
        output: key or index of the logits in what a student of the user's own returns; "" to find them.
        network: the student where a caller in Python passes it; None where the options name its arch.
        width: of the outputs of a student that is built: the number of classes, or of an embedding --width.
    """

    source: Cache
    losses: tuple[Loss, ...]
    taps: tuple[str, ...]
    device: torch.device
    held_out: dict[str, HeldOutSplit]
    member_logits: dict[str, torch.Tensor]
    head: LinearHead | None
    input_spec: InputSpec
    initial: InitialWeights | None = None
    output: str = ""
    network: nn.Module | None = None
    width: int = 0

    @staticmethod
    def open(config: StudentConfig) -> "DistillationSetup":
        """Read and check everything that a student is trained from, before the first step.

        Args:
            config: the options of a student, with every default filled in.

        Raises:
            CacheError: when a cache lacks what a loss reads, or was made from other images.
            UsageError: when options contradict each other.
        """
        caches = open_caches(config.cache)
        losses, taps = check_before_images(config, caches)
        transfer_set = load_shared_data(caches, config)
        requirements.check_labels(config, losses, transfer_set)
        missing = find_missing_targets(caches, config.draws, taps, progress) if config.missing else {}
        head = read_head(caches[0], losses, missing)
        for cache in caches:
            verify_views(cache, transfer_set, config.draws, missing)
        teachers, member_logits = load_teachers(caches, config, transfer_set, missing)
        source = Cache.from_parts(teachers, transfer_set)
        return DistillationSetup._assemble(config, source, losses, taps, member_logits, teachers.map_head(head))

    @staticmethod
    def of_cache(
        config: StudentConfig, source: Cache, losses: Sequence[Loss], network: nn.Module | None
    ) -> "DistillationSetup":
        """Check everything that a student is trained from where a caller in Python has opened the cache.

        Args:
            config: the options of a student, with every default filled in.
            source: the cache and its data.
            losses: the terms of the loss.
            network: the student, of the arch `module(…)`; None where the options name its arch.

        Raises:
            CacheError: as in `open`.
            UsageError: as in `open`.
        """
        caches = source.teachers.members
        losses, taps = check_before_images(config, caches, losses, network)
        requirements.check_labels(config, losses, source.transfer_set)
        head = source.read_head(losses)
        logits: dict[str, torch.Tensor] = {
            split: source.teachers.read_held_out(split) for split in ("val", "test") if split in source.splits
        }
        return DistillationSetup._assemble(config, source, losses, taps, logits, head, network)

    @staticmethod
    def _assemble(
        config: StudentConfig,
        source: Cache,
        losses: tuple[Loss, ...],
        taps: tuple[str, ...],
        member_logits: dict[str, torch.Tensor],
        head: LinearHead | None,
        network: nn.Module | None = None,
    ) -> "DistillationSetup":
        device, teachers, views = select_device(config.device), source.teachers, source.reader.views
        input_spec = make_student_spec(config, source.reader, source.transfer_set)
        return DistillationSetup(
            source=source,
            losses=losses,
            taps=taps,
            device=device,
            held_out={
                split: HeldOutSplit(
                    rows,
                    views,
                    device,
                    config,
                    ViewChecks(teachers, split, rows.images),
                    source.task,
                    _select_comparable(teachers, member_logits[split]),
                )
                for split, rows in source.transfer_set.splits.items()
                if split in member_logits
            },
            member_logits=member_logits,
            head=head,
            input_spec=input_spec,
            initial=_read_initial(config, input_spec),
            output=config.output,
            network=network,
            width=choose_width(config, teachers.members),
        )

    def with_options(self, config: StudentConfig) -> "DistillationSetup":
        """Return the setup of another student of the same caches and data, with its own losses.

        Args:
            config: the options of that student, of the same caches and with the same combination and map.

        Raises:
            CacheError: as in `open`.
            UsageError: as in `open`.
        """
        caches = self.teachers.members
        losses = requirements.parse_student_losses(config, caches[0])
        taps = requirements.check_caches(config, caches, losses)
        requirements.check_labels(config, losses, self.transfer_set)
        missing = self.teachers.missing
        if config.missing and taps != self.taps:
            missing = find_missing_targets(caches, config.draws, taps, progress)
        source = Cache.from_parts(replace(self.teachers, missing=missing), self.transfer_set)
        input_spec = make_student_spec(config, self.cache, self.transfer_set)
        return replace(
            self,
            source=source,
            losses=losses,
            taps=taps,
            head=source.read_head(losses),
            input_spec=input_spec,
            initial=_read_initial(config, input_spec, self.initial if input_spec == self.input_spec else None),
            output=config.output,
            width=choose_width(config, caches),
        )

    @property
    def teachers(self) -> TeacherEnsemble:
        """The cache, or several caches as one teacher."""
        return self.source.teachers

    @property
    def transfer_set(self) -> TransferSet:
        """Images and labels."""
        return self.source.transfer_set

    @property
    def cache(self) -> CacheReader:
        """The first cache, as its files have it."""
        return self.source.reader

    @cached_property
    def teacher_logits(self) -> dict[str, torch.Tensor]:
        """{split: logits [N, K] by index} of the teacher that the student learns from, combined and mapped."""
        return {split: self.teachers.as_single_teacher(logits) for split, logits in self.member_logits.items()}

    def student_arch(self, config: StudentConfig, losses: tuple[Loss, ...]) -> str:
        """Return the arch of a student: that of `config`, which `simkd` extends by the teacher's last layer."""
        return get_student_arch(config, losses, self.cache, self.taps)

    def build_student(self, config: StudentConfig, losses: tuple[Loss, ...]) -> nn.Module:
        """Build the network that these losses train, with the initial weights of `config.seed` and of --init."""
        torch.manual_seed(config.seed)
        network = self.build_network(self.student_arch(config, losses))
        if self.initial is not None:
            self.initial.load_into(network, self.width)
        if isinstance(network, SimKDStudent) and self.head is not None:
            network.use_head(self.head)
        return network

    def build_network(self, arch: str) -> nn.Module:
        """Build a network for these images and classes, with weights from the current random state."""
        spec = self.input_spec
        return build(arch, self.width, spec.channels, spec.size, self.output, self.network, shape=spec.shape)

    def check_student(self, network: nn.Module, config: StudentConfig) -> list[str]:
        """Check, before anything is written, that a student can be trained: see `check_trainable`.

        Args:
            network: the student, with its initial weights. It is not changed.
            config: its options.

        Returns:
            Notes on the network for the user, one line each.

        Raises:
            UsageError: when the forward or the backward pass fails, or its output does not fit the cache.
        """
        labels = requirements.hide_labels(config, self.transfer_set.splits["train"].labels)
        streams = [self.make_stream(config, labels, only_labelled=False, read_targets=False)]
        if not find_known(labels).all() and (
            config.baseline or config.finetune_epochs or any(x.needs_labels for x in self.losses)
        ):
            streams.append(self.make_stream(config, labels, only_labelled=True, read_targets=False))
        check = TrainingCheck(
            arch=self.student_arch(config, self.losses),
            classes=0 if has_free_width(config, self.cache.task) else self.width,
            input_spec=self.input_spec,
            device=self.device,
            precision=config.precision,
            least_rows=min(map(count_least_rows, streams)),
            batch_size=config.batch_size,
        )
        notes = check_trainable(network, check)
        return [*self._describe_start(network, config), *notes]

    def _describe_start(self, network: nn.Module, config: StudentConfig) -> list[str]:
        """Describe the input and the initial weights of a student where they are not the default ones."""
        notes = []
        if normalize := choose_normalize(config):
            source = "as published with it" if normalize == PUBLISHED else "by --normalize"
            notes.append(f"input of {config.arch}: {self.input_spec.describe()}, {source}")
        if self.initial is not None:
            baseline = "; so does the baseline" if config.baseline else ""
            notes.append(self.initial.describe(network, self.width) + baseline)
        if self.cache.task == EMBEDDING:
            is_free = has_free_width(config, self.cache.task)
            width = measure_width(network, self.input_spec) if is_free else self.width
            check_select_width(config, width, self.teachers.members)
            notes.extend(describe_projections(self.losses, width, self.teachers.members))
        return notes

    def scale_output(self, labels: HardTargets) -> InputSpec:
        """Return the preparation of a student's input, and where it predicts numbers, of its output.

        Args:
            labels: the hard targets that the student sees, of the training split by index.
        """
        if self.cache.task != NUMBERS:
            return self.input_spec
        mean, std = measure_numbers(self.teachers, labels)
        return self.input_spec.with_output(tuple(mean.tolist()), tuple(std.tolist()))

    def compute_logits(self, model: nn.Module) -> dict[str, NDArray[np.float32]]:
        """Compute a model's logits on each held-out split: {split: float32 [N, K]}."""
        return {split: held_out.logits(model) for split, held_out in self.held_out.items()}

    def compute_metrics(
        self, logits: dict[str, NDArray[np.float32]], bank: EmbeddingBank | None = None
    ) -> dict[str, Any]:
        """Compute every figure of a student on each held-out split.

        Args:
            logits: {split: float32 [N, K]} of the student, see `compute_logits`.
            bank: the student's embeddings of training rows, see `compute_student_bank`; None without.

        Returns:
            {split: figures}; of several labels also `thresholds`, see `add_thresholds`.
        """
        teacher = {split: self.teacher_logits[split].numpy() for split in logits}
        figures = evaluate_splits(self.transfer_set, logits, self.class_counts, bank, teacher)
        if self.cache.task == EMBEDDING and not self.teachers.is_single_cache:
            for split in logits:
                figures[split]["cosine"] = None  # side by side, several embeddings are none that a student learns
        return figures

    @cached_property
    def teacher_metrics(self) -> dict[str, Any]:
        """The archs of the teacher that the student learns from, and its figures on each held-out split."""
        archs = " + ".join(cache.teacher for cache in self.teachers.members)
        return self._evaluate_teacher(archs, self.teacher_logits, self.teachers)

    @cached_property
    def member_metrics(self) -> list[dict[str, Any]]:
        """The same of each cache by itself, before logits are combined and mapped."""
        return [
            self._evaluate_teacher(
                cache.teacher,
                {split: z[:, k, : cache.classes] if z.ndim == 3 else z for split, z in self.member_logits.items()},
                TeacherEnsemble((cache,)),
            )
            for k, cache in enumerate(self.teachers.members)
        ]

    def _evaluate_teacher(
        self, arch: str, logits: dict[str, torch.Tensor], teachers: TeacherEnsemble
    ) -> dict[str, Any]:
        bank = read_bank(self.source, teachers, logits["val"].numpy())
        outputs = {split: z.numpy() for split, z in logits.items()}
        return {"arch": arch, **evaluate_splits(self.transfer_set, outputs, self.class_counts, bank)}

    @cached_property
    def class_counts(self) -> Labels:
        """int64 [K]: rows of each class or label in the training split, where they have labels."""
        return count_classes(self.transfer_set.splits["train"].labels, self.cache.classes)

    def make_stream(
        self, config: StudentConfig, labels: HardTargets, only_labelled: bool, read_targets: bool
    ) -> BatchStream:
        """Make the stream of training batches of one student.

        Args:
            config: the options of the student.
            labels: the hard targets of the training split by index.
            only_labelled: leave out the rows without a label.
            read_targets: read logits and features from the caches.

        Raises:
            CacheError: when no row is left.
            UsageError: when a batch would have no image.
        """
        order = self.cache.row_order("train")
        is_used = find_known(labels)[order] if only_labelled else np.ones(len(order), bool)
        if config.missing == "skip":
            is_used &= ~self.missing_rows
        if not is_used.any():
            raise CacheError("no row of the training split is left: each lacks targets in some draw, or a label")
        stream = self.source.loader(
            "train",
            batch_size=config.batch_size,
            seed=config.seed if config.order_seed < 0 else config.order_seed,
            taps=self.taps,
            workers=config.workers,
            device=self.device,
            subset=order[is_used],
            labels=labels,
            draws=config.draws,
            draws_per_decode=config.draws_per_decode,
            sampler=config.sampler,
            targets=read_targets,
        ).stream
        if len(stream.rows) < config.draws_per_decode * stream.steps_per_epoch:
            raise UsageError(
                f"--draws-per-decode {config.draws_per_decode} leaves a batch of {config.batch_size} without an"
                f" image: there are {len(stream.rows)} rows; lower it, or take a larger --batch-size"
            )
        return stream

    @property
    def missing_rows(self) -> NDArray[np.bool_]:
        """bool [rows]: which positions of the training split lack a teacher's targets in some draw."""
        is_missing = np.zeros(self.cache.manifest.splits["train"], bool)
        for missing_in_draw in self.teachers.missing.values():
            is_missing |= missing_in_draw
        return is_missing


def _select_comparable(teachers: TeacherEnsemble, logits: torch.Tensor) -> NDArray[np.float32] | None:
    """Return the outputs of the one teacher [N, K] that a student is compared with; None for several embeddings."""
    if teachers.members[0].task == EMBEDDING and not teachers.is_single_cache:
        return None
    single: NDArray[np.float32] = teachers.as_single_teacher(logits).numpy()
    return single


def _read_initial(
    config: StudentConfig, input_spec: InputSpec, known: InitialWeights | None = None
) -> InitialWeights | None:
    """Read the weights that a student starts from, unless they are those of another student of the same input."""
    if not config.init:
        return None
    if known is not None and known.source == config.init and (config.init != DEFAULT or known.arch == config.arch):
        return replace(known, arch=config.arch)
    return first_rank_first(
        lambda: read_initial_weights(config.init, config.arch, input_spec.channels, input_spec.size)
    )
