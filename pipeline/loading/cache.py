"""A cache together with the data that it was made from: what students are trained from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from softcache.base.arguments import check_bool, check_integer, check_names, check_path, check_text, type_error
from softcache.base.errors import CacheError, UsageError
from softcache.base.progress import ProgressCallback, resolve_progress
from softcache.data.content_index import open_index
from softcache.data.tasks import EMBEDDING, HardTargets, require_classes
from softcache.data.transfer_set import Split, TransferSet, count_classes
from softcache.data.views.render import render
from softcache.pipeline.batch import LinearHead, LossContext
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import check_files, select_damage, verify_views
from softcache.pipeline.losses.distillation_loss import select_logits
from softcache.pipeline.losses.teacher_head import read_head
from softcache.pipeline.metrics.embedding_bank import EmbeddingBank
from softcache.pipeline.metrics.tasks import evaluate_task
from softcache.pipeline.models.prepared_model import BILINEAR, InputPreparation, InputSpec
from softcache.pipeline.taps.statistics import derive_features, find_source_tap
from softcache.pipeline.teachers.combine import choose_combination
from softcache.pipeline.teachers.ensemble import TeacherEnsemble, check_same_views
from softcache.pipeline.teachers.fit import fit_teachers

from .arguments import (
    MAX_WORKERS,
    check_device,
    check_draw,
    check_draws,
    check_index,
    check_labels,
    check_place,
    check_sampler,
    check_subset,
    check_views,
)
from .context import make_context
from .evaluation import run_student
from .loader import CacheLoader
from .stream import BatchStream
from .training_embeddings import compute_bank
from .view_checks import ViewChecks

Rows = NDArray[np.int64]


class Cache:
    """The outputs of a teacher for every view of a data set, together with that data set.

        cache = softcache.Cache("caches/pictures", data="folder:pictures")
        for batch in cache.loader("train", batch_size=128):
            loss = criterion(student(batch.images), batch)

    Opening it compares the data with those that the teacher saw: the content of every image and label, and the pixels
    of 256 views. While views are used, each of them is compared.

    Args:
        path: The folder of the cache, or those of several caches of the same data and views, which are one teacher.
        data: The data: their name or `folder:PATH`, as in `--data`; a map-style data set of (image, label) or of
            images, or a mapping {"train": …, "val": …, "test": …} of such. None for the data set that the cache
            names, where that is one of `softcache`'s own.
        combine: How several caches are combined, as in `--combine`: "mean_probability", which is "" too, "mean_logit",
            "geometric", "weighted:0.7,0.3", "vote" or "learned". With "per_teacher" and "ca_mkd" they are not: logits
            are [B, M, K].
        map: A map of the teacher's distribution that is fitted on "val", as in `--map`: "temperature", "vector",
            "matrix" or "prior"; "" for none.
        data_root: The folder of the data sets that have a name.
        index: The folder that records what data files hold, so that unchanged ones are not read again; None for
            `softcache` in the user's cache folder, "none" to record nothing.
        rehash: Whether all data files are read again, whatever is recorded.
        progress: True to show a progress bar while images are read, or a function of (text, done, total).

    Attributes:
        path: The folder of the first cache.
        task: What is predicted: "classes", "labels" (several of each image), "numbers" or "embedding".
        classes: Names of the classes, labels or numbers, in the order of the logits.
        num_classes: K, the width of the logits.
        taps: {name: shape of a row} of the features that are cached.
        draws: Number of views of each training image.
        splits: {"train", "val" and where there is one "test": number of rows}.
        fingerprint: Hash of what the cache is: data, views, teacher, codec and precision. 64 hexadecimal digits.
        teacher: The teacher's arch; of several, joined by " + ".
        input_spec: How a view becomes the input of a network: channels, size, mean and standard deviation.
        data: The data as a command names them: their name, `folder:PATH`, or "dataset".
        combine, map: As given.

    Raises:
        CacheError: There is no complete cache, a file is damaged, or the data are others than those of the cache.
        UsageError: The data have to be named, or an argument does not exist.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        data: Any = None,
        *,
        combine: str = "",
        map: str = "",  # noqa: A002 (the name of the option)
        data_root: str | Path = "datasets",
        index: str | Path | None = None,
        rehash: bool = False,
        progress: bool | ProgressCallback = False,
    ):
        paths = [check_path("path", p) for p in (path if isinstance(path, list | tuple) else [path])]
        check_text("combine", combine)
        check_text("map", map)
        root, show = check_path("data_root", data_root), resolve_progress(progress)
        if not paths:
            raise UsageError("no cache: name the folder of one")
        if combine and len(paths) == 1:
            raise UsageError(f"combine='{combine}' is for several caches, and '{paths[0]}' is one")
        members = tuple(CacheReader(p) for p in paths)
        check_same_views(members)
        records = open_index("" if index is None else check_path("index", index), check_bool("rehash", rehash))
        transfer_set = members[0].load_transfer_set("" if data is None else data, root, show, records)
        for member in members[1:]:
            member.check_transfer_set(transfer_set)
        for member in members:
            verify_views(member, transfer_set, member.manifest.draws)
        teachers = TeacherEnsemble(members)
        if len(members) > 1 or map:
            how = choose_combination(combine, members[0].task) if len(members) > 1 else ""
            teachers = fit_teachers(members, transfer_set, teachers.read_held_out("val"), how, map, {})
        self._set_parts(teachers, transfer_set)
        self.data = data if isinstance(data, str) else transfer_set.name
        self.combine, self.map = combine, map

    @classmethod
    def from_parts(cls, teachers: TeacherEnsemble, transfer_set: TransferSet, data: str = "") -> "Cache":
        """Make a cache of what has been opened and compared already, as the commands do.

        Args:
            teachers: The caches as one teacher.
            transfer_set: Their data.
            data: The data as a command names them; "" for the name of the transfer set.
        """
        cache = cls.__new__(cls)
        cache._set_parts(teachers, transfer_set)
        cache.data, cache.combine, cache.map = data or transfer_set.name, "", ""
        return cache

    def _set_parts(self, teachers: TeacherEnsemble, transfer_set: TransferSet) -> None:
        self.teachers, self.transfer_set = teachers, transfer_set
        reader = teachers.members[0]
        self.path, self.fingerprint = reader.folder, reader.manifest.fingerprint
        self.num_classes, self.task = reader.classes, reader.task
        names = () if self.task == EMBEDDING else transfer_set.classes
        self.classes: tuple[str, ...] = names or tuple(map(str, range(reader.classes)))
        self._taps = {name: tuple(shape) for name, shape in reader.manifest.taps.items()}
        self.draws = min(member.manifest.draws for member in teachers.members)
        self._splits = {split: len(rows) for split, rows in transfer_set.splits.items()}
        self.teacher = " + ".join(member.teacher for member in teachers.members)
        # A student's input is the view itself: there is nothing to interpolate.
        of_teacher = reader.input_spec.with_output()
        self.input_spec: InputSpec = replace(of_teacher, size=reader.views.size, interpolation=BILINEAR)
        self._preparation = InputPreparation(self.input_spec)

    def __repr__(self) -> str:
        splits = ", ".join(f"{rows} {split}" for split, rows in self.splits.items())
        taps = f", taps {', '.join(self.taps)}" if self.taps else ""
        outputs = "dimensions" if self.task == EMBEDDING else self.task
        return (
            f"Cache('{self.path}': {self.teacher}, {self.num_classes} {outputs}, {splits}, {self.draws} draws{taps},"
            f" {self.fingerprint[:12]})"
        )

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """{name: shape of a row} of the features that are cached; a copy."""
        return dict(self._taps)

    @property
    def splits(self) -> dict[str, int]:
        """{split: number of rows}; a copy."""
        return dict(self._splits)

    @property
    def reader(self) -> CacheReader:
        """The first cache, as its files have it."""
        return self.teachers.members[0]

    # Batches

    def loader(
        self,
        split: str = "train",
        batch_size: int = 128,
        seed: int = 0,
        *,
        taps: Sequence[str] = (),
        workers: int = 0,
        device: str | torch.device = "cpu",
        subset: ArrayLike | None = None,
        labels: ArrayLike | torch.Tensor | None = None,
        draws: int = 0,
        draws_per_decode: int = 1,
        sampler: str = "",
        targets: bool = True,
    ) -> CacheLoader:
        """Make a loader of a split.

        Args:
            split: "train" for augmented views in a seeded order; "val" or "test" for plain views in the order of the
                index.
            batch_size: Rows of a batch; of all ranks together under `torch.distributed`. The batches of an epoch of
                the training split differ by one row at most, so that none is left over.
            seed: Seed of the order of rows, from 0; that of `softcache student --seed`.
            taps: Features of a batch: names of `taps`, or statistics of them, such as "layer3:pool" of "layer3".
            workers: Processes that decode and render, up to 256; 0 for a thread of this process.
            device: Where the batches are to be. Images and targets that fit on a GPU stay there.
            subset: int [n], the indices of the rows that are used, each once; or a mask bool [N]; None for all.
            labels: In place of the labels of the data, by index: int [N], -1 hides one; or those of another task.
            draws: Use the first so many draws; 0 for all.
            draws_per_decode: k draws of each decoded image in one batch: k epochs are a pass with every row in k
                draws. It divides draws and batch_size.
            sampler: "" for every row once. "balanced" draws each class equally often, "sqrt" by the square root of
                its rows: some rows come more than once in an epoch, others not at all.
            targets: Whether batches have the teacher's targets.

        Raises:
            CacheError: A tap is not cached.
            UsageError: There is no such split or index, a number is out of range, or an argument is of another type.
        """
        rows = self._get_split(split)
        positions = self._find_positions(split, check_subset(split, subset, len(rows)))
        if labels is None:
            all_labels = rows.labels
        else:
            all_labels = check_labels(split, labels, len(rows), self._count_label_values(), self.task)
        is_train = split == "train"
        batch_size, seed = check_integer("batch_size", batch_size, least=1), check_integer("seed", seed, least=0)
        draws, cached_draws = (draws, self.draws) if is_train else (0, 1)
        draws, draws_per_decode = check_draws(draws, draws_per_decode, batch_size, cached_draws)
        check_sampler(sampler)
        if sampler:
            require_classes(self.task, f"sampler '{sampler}'")
        if is_train:
            positions = np.sort(positions)
        stream = BatchStream(
            split=rows,
            views=self.reader.views.of_split(split),
            view_seed=self.reader.seed,
            order_seed=seed,
            batch_size=batch_size,
            labels=all_labels,
            rows=positions,
            draws=draws,
            cache=self.teachers,
            taps=self._find_sources(taps),
            read_targets=check_bool("targets", targets),
            workers=check_integer("workers", workers, least=0, most=MAX_WORKERS),
            sampler=sampler if is_train else "",
            draws_per_decode=draws_per_decode if is_train else 1,
            device=check_device(device),
            name=split,
            source=LoaderSource(self, all_labels),
        )
        return CacheLoader(stream, tuple(taps))

    def targets(self, split: str, index: ArrayLike, draw: int = 0) -> torch.Tensor:
        """Read the teacher's logits of some rows, in any order.

        Args:
            split: "train", "val" or "test".
            index: int [n], rows of the split; or a mask bool [N].
            draw: Number of the augmented view, from 0; 0 for a held-out split.

        Returns:
            float32 [n, K]; [n, M, K] of several teachers that are not combined.

        Raises:
            CacheError: A shard is missing or damaged.
            UsageError: There is no such split, index or draw.
        """
        return self._read(split, index, draw, ())[0]

    def features(self, split: str, index: ArrayLike, taps: Sequence[str], draw: int = 0) -> dict[str, torch.Tensor]:
        """Read the teacher's features of some rows, in any order.

        Args:
            split, index, draw: As in `targets`.
            taps: As in `loader`.

        Returns:
            {tap: float32 [n, …]}.

        Raises:
            CacheError: A shard is missing or damaged, or a tap is not cached.
            UsageError: There is no such split, index or draw.
        """
        return derive_features(self._read(split, index, draw, self._find_sources(taps))[1], taps)

    def render(self, split: str, index: ArrayLike, draw: int = 0) -> torch.Tensor:
        """Render the very pixels that the teacher saw, and compare them with their checksums.

        Args:
            split, index, draw: As in `targets`.

        Returns:
            uint8 [n, C, S, S]. `prepare_input` makes the float32 input of a network of them.

        Raises:
            CacheError: An image cannot be read, or a view is not the one that the teacher saw.
            UsageError: There is no such split, index or draw.
        """
        rows = self._get_split(split)
        numbers = check_index(split, index, len(rows))
        draw = check_draw(split, draw, self.draws)
        views = render(rows.images, self.reader.views.of_split(split), self.reader.seed, numbers, draw)
        checks = ViewChecks(self.teachers, split, rows.images)
        checks.compare_views(views, numbers, draw, self._find_positions(split, numbers))
        return views

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        """Normalise views as the teacher's input.

        Args:
            views: uint8 [n, C, S, S], on any device.

        Returns:
            float32 [n, channels, size, size], see `input_spec`.

        Raises:
            UsageError: They are no views of this cache.
        """
        check_views(views, self.transfer_set.channels, self.reader.views.size, self.input_spec.shape)
        return self._preparation(views)

    def evaluate(
        self,
        student: nn.Module,
        split: str = "test",
        *,
        batch_size: int = 512,
        workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> dict[str, Any]:
        """Compute every metric of a student on a split, in eval mode.

        For the accuracies of an embedding the student is also run over labelled training rows, at most 50,000, and
        over the validation split.

        Args:
            student: A network: images float32 [B, C, H, W] -> logits [B, K], on the device.
            split: "test" or "val".
            batch_size: Rows of a batch.
            workers: Processes that decode and render; 0 for a thread of this process.
            device: Where the student is.

        Returns:
            {name: value}, as of `softcache.evaluate` with the teacher's logits; of another task than "classes" the
            figures that `softcache evaluate` prints.

        Raises:
            CacheError: An image cannot be read, or is not the one that the teacher saw.
            UsageError: There is no such split, the student is on another device, or it returns no logits.
        """
        if not isinstance(student, nn.Module):
            raise type_error("student", student, "a torch.nn.Module")
        loader = self.loader(split, batch_size, workers=workers, device=device)
        check_place(student, loader.stream.device)
        logits, teacher_logits = run_student(student, loader.stream)
        teacher_logits = self.teachers.merge_members(teacher_logits)
        labels = self.transfer_set.splits[split].labels
        counts = count_classes(self.transfer_set.splits["train"].labels, self.num_classes)
        bank = self._compute_bank(student, split, logits, workers, device) if self.task == EMBEDDING else None
        return evaluate_task(self.task, logits, labels, teacher_outputs=teacher_logits, counts=counts, bank=bank)

    def _compute_bank(
        self, student: nn.Module, split: str, outputs: torch.Tensor, workers: int, device: str | torch.device
    ) -> EmbeddingBank | None:
        """Run a student over labelled training rows; None where there are none. `outputs` are those of the split."""
        if split != "val":
            outputs, _ = run_student(student, self.loader("val", 512, workers=workers, device=device).stream)
        return compute_bank(
            self,
            student,
            lambda batch: select_logits(student(batch.images)),
            outputs.numpy(),
            workers=workers,
            device=device,
        )

    def rows(self, split: str) -> torch.Tensor:
        """Return which row of the data each index is.

        They differ where a validation split was cut off from the training rows of the data.

        Args:
            split: "train", "val" or "test".

        Returns:
            int64 [N], a copy.

        Raises:
            UsageError: There is no such split.
        """
        part = self._get_split(split)
        return torch.arange(len(part)) if part.source_rows is None else torch.tensor(part.source_rows)

    def labels(self, split: str) -> torch.Tensor:
        """Return the labels of a split by index.

        Args:
            split: "train", "val" or "test".

        Returns:
            int64 [N], -1 where there is none; or the hard targets of another task, see `Batch`. A copy.

        Raises:
            UsageError: There is no such split.
        """
        return torch.tensor(self._get_split(split).labels)

    def verify(self, deep: bool = False, progress: bool | ProgressCallback = False) -> None:
        """Verify every byte of the cache, as `softcache check-cache` does.

        Args:
            deep: Render every view again, and compare it with its checksum.
            progress: True to show a progress bar, or a function of (text, done, total).

        Raises:
            CacheError: A file is damaged, or a view comes out differently; the message counts the files and says what
                is wrong with the first one.
        """
        for member in self.teachers.members:
            findings = check_files(member, self.transfer_set if deep else None, resolve_progress(progress))
            if damage := select_damage(findings):
                raise CacheError(
                    f"'{member.folder}': {len(damage)} files are bad. The first: {next(iter(damage.values()))}."
                    " Repair it with the command check-cache, or make the cache again in an empty folder"
                )

    # What losses need

    def read_head(self, losses: Sequence[Any]) -> LinearHead | None:
        """Read the teacher's last linear layer, followed by the map, where a loss needs it; the commands call this.

        Args:
            losses: The terms of the loss.

        Raises:
            UsageError: The layer does not compute the logits from the features that a loss puts through it.
        """
        return self.teachers.map_head(read_head(self.reader, losses, self.teachers.missing))

    def make_context(self, labels: HardTargets, head: LinearHead | None) -> LossContext:
        """Make what losses may use besides a batch; the commands call this. See `context.make_context`."""
        return make_context(self.teachers, self.num_classes, labels, head)

    # Arguments

    def _count_label_values(self) -> int:
        """K, the number of classes that a label may be, or of outputs that have hard targets."""
        return len(self.transfer_set.classes) if self.task == EMBEDDING else self.num_classes

    def _read(
        self, split: str, index: ArrayLike, draw: int, sources: tuple[str, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        positions = self._find_positions(split, check_index(split, index, len(self._get_split(split))))
        draw = check_draw(split, draw, self.draws)
        return self.teachers.read_targets(split, draw, positions, sources)

    @cached_property
    def _positions(self) -> dict[str, Rows]:
        """{split: int64 [N], the position in the caches of each index}, as far as it was needed."""
        return {}

    def _find_positions(self, split: str, index: Rows) -> Rows:
        if split not in self._positions:
            self._positions[split] = np.argsort(self.teachers.row_order(split))
        positions: Rows = self._positions[split][index]
        return positions

    def _get_split(self, split: str) -> Split:
        if check_text("split", split) not in self.transfer_set.splits:
            raise UsageError(f"no split '{split}'. There are: {', '.join(self.splits)}")
        return self.transfer_set.splits[split]

    def _find_sources(self, taps: Sequence[str]) -> tuple[str, ...]:
        """Find the cached taps from which some taps are computed, each once."""
        sources = {tap: find_source_tap(tap, self.taps) for tap in check_names("taps", taps)}
        if missing := [tap for tap, source in sources.items() if source is None]:
            raise CacheError(
                f"the cache '{self.path}' does not contain {', '.join(missing)} (it has:"
                f" {', '.join(self.taps) or 'none'}): make it again with these taps, which adds them"
            )
        return tuple(dict.fromkeys(source for source in sources.values() if source is not None))


@dataclass(frozen=True)
class LoaderSource:
    """What the batches of one loader have in common. A BatchSource.

    Attributes:
        cache: The cache.
        labels: The hard targets by index.
    """

    cache: Cache
    labels: HardTargets

    @property
    def task(self) -> str:
        """What the hard targets and the teacher's outputs are, see data/tasks.py."""
        return self.cache.task

    @property
    def codec(self) -> tuple[str, str]:
        """Name and kind of the codec of the logits; several caches store all logits, see check_same_views."""
        return self.cache.reader.codec_name, self.cache.reader.codec.kind

    @property
    def fingerprint(self) -> str:
        """What identifies the cache, or the caches."""
        return " ".join(member.manifest.fingerprint for member in self.cache.teachers.members)

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        """The input of a network, float32 [B, C, H, W], from views uint8 [B, C, S, S]."""
        return self.cache.prepare_input(views)

    def make_context(self, losses: Sequence[Any]) -> LossContext:
        """What some losses may use besides the rows of a batch."""
        return self.cache.make_context(self.labels, self.cache.read_head(losses))
