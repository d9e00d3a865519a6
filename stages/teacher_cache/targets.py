"""Computing the rows of a cache: views in, the teacher's outputs and the keys of the rows out."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.base.threads import take_first
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.pipeline.cache.codec_choice import find_codec
from softcache.pipeline.cache.manifest import ShardSpec
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.cache.shards import Arrays
from softcache.pipeline.loading.rendering import render_with_checksums
from softcache.pipeline.models import find_head
from softcache.pipeline.models.class_map import MAP_ADVICE
from softcache.pipeline.models.other_frameworks.file_network import StoredTargets
from softcache.pipeline.models.prepared_model import InputSpec
from softcache.stages.cli.configs import CacheConfig

from .encoding import ShardEncoder, make_row_keys
from .inference import PROBABILITIES, TeacherInference, TeacherOutputs

_MAX_FLOAT16 = 65504.0
_MAX_LOG_SUM = 0.02  # of a row of probabilities that a network rounds to bfloat16
InferredBatch = tuple[NDArray[np.uint32], torch.Tensor, dict[str, torch.Tensor]]  # CRC-32 of views, logits, features


@dataclass
class TargetGenerator:
    """Renders views, runs the teacher on them and makes the rows of a cache of its outputs.

    Two views are run at once, to find out the shapes of the outputs.

    Args:
        transfer_set: Images and labels.
        views: The view policy of the training split; held-out splits have its plain views.
        inference: The teacher and the way in which it is run.
        config: Options of the command, of which seed, codec, batch_size and workers are read.

    Attributes:
        teacher, taps: Those of the inference.
        teacher_views: The policy of the views that the teacher gets: `views`, or these at its own size.
        classes: K, the width of the logits.
        shapes: {tap: row shape} of the features.

    Raises:
        UsageError: The teacher does not output logits [B, K], or K is not the number of classes of the data.
    """

    transfer_set: TransferSet
    views: ViewPolicy
    inference: TeacherInference
    config: CacheConfig

    def __post_init__(self) -> None:
        self.teacher, self.taps = self.inference.teacher, self.inference.taps
        self.teacher_views = make_teacher_views(self.views, self.teacher.input_spec, self.config.teacher_size)
        self._orders: dict[str, NDArray[np.uint32]] = {}
        index = np.arange(min(2, len(self.transfer_set.splits["train"])))
        _, logits, features = take_first(self._infer_batches("train", 0, index))
        self.classes = logits.shape[1]
        self.shapes = {tap: list(x.shape[1:]) for tap, x in features.items()}
        task, names = self.transfer_set.task, self.transfer_set.classes
        if task != EMBEDDING and names and self.classes != len(names):
            advice = MAP_ADVICE if task == CLASSES else "one output for each, in their order"
            raise UsageError(f"the teacher outputs {self.classes} {task}, the data have {len(names)}: {advice}")

    @property
    def has_stored_targets(self) -> bool:
        """Whether the targets were made elsewhere: there is no network that could be run on other views."""
        return isinstance(self.teacher.network, StoredTargets)

    def find_head(self) -> nn.Linear | None:
        """Find the teacher's last linear layer, which computes the logits that are stored; None where none does."""
        if self.teacher.class_map or self.transfer_set.task not in (CLASSES, LABELS):
            return None
        return find_head(self.teacher.network, self.classes)

    def compute_shard(self, spec: ShardSpec, on_progress: Callable[[int], object]) -> tuple[Arrays, dict[str, float]]:
        """Compute the rows of a shard.

        Args:
            spec: Which rows and datasets.
            on_progress: Called with the number of rows of each batch.

        Returns:
            {dataset: rows}, those of the spec; and, where it holds logits, the sums of `measure_fidelity`, of the task
            "classes" with `correct`, the rows whose label is the top-1 class.

        Raises:
            CacheError: An image cannot be read, or an output is too large or not finite.
        """
        split = self.transfer_set.splits[spec.split]
        index = self._get_order(spec.split)[spec.start : spec.start + spec.rows].astype(np.int64)
        codec, labels, task = find_codec(self.config.codec), split.labels[index], self.transfer_set.task
        crcs = np.empty(spec.rows, np.uint32)
        keys = make_row_keys(self.config.seed, spec.split, spec.draw, index)
        encoder = None
        if "logits" in spec.datasets:  # else the shard adds taps to rows whose logits are stored
            encoder = ShardEncoder(codec, self.classes, self.config.batch_size, keys, labels, task)
        features = {
            tap: np.empty((spec.rows, *shape), np.float16)
            for tap, shape in self.shapes.items()
            if f"features/{tap}" in spec.datasets
        }
        start = 0
        with closing(self._infer_batches(spec.split, spec.draw, index)) as batches:
            for batch_crcs, batch_logits, batch_features in batches:
                rows = slice(start, start + len(batch_crcs))
                crcs[rows] = batch_crcs
                has_probabilities = self.inference.outputs == PROBABILITIES
                if has_probabilities and self.inference.task == LABELS:
                    _check_log_odds(batch_logits, spec=spec, index=index[rows])
                n = len(batch_crcs)
                logits = encoder.next_rows(n) if encoder else np.empty((n, self.classes), np.float32)
                _store_batch(batch_logits, logits, codec.max_value, spec=spec, index=index[rows], name="output")
                for tap, values in features.items():
                    _store_batch(
                        batch_features[tap],
                        values[rows],
                        _MAX_FLOAT16,
                        spec=spec,
                        index=index[rows],
                        name=f"tap '{tap}'",
                    )
                if has_probabilities and self.inference.task == CLASSES:
                    is_part = self.teacher.class_map is not None
                    _check_probabilities(batch_logits, spec=spec, index=index[rows], is_part=is_part)
                on_progress(len(batch_crcs))
                start += len(batch_crcs)
        arrays: Arrays = {
            **{f"features/{tap}": values for tap, values in features.items()},
            "index": index.astype("<u4"),
            "label": labels.astype("<i4" if labels.ndim == 1 else labels.dtype.newbyteorder("<")),
            "view_crc32": crcs.astype("<u4"),
        }
        if encoder is None:
            return arrays, {}
        encoded, measurements = encoder.finish()
        return {**encoded, **arrays}, measurements

    def _get_order(self, split: str) -> NDArray[np.uint32]:
        """Return the row order of a split, which is made once: of 14 million rows that takes seconds."""
        if split not in self._orders:
            self._orders[split] = make_row_order(self.config.seed, split, len(self.transfer_set.splits[split]))
        return self._orders[split]

    def compute_rows(
        self, split: str, draw: int, index: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """Compute the outputs for a few rows, as they are before the codec.

        Args:
            split: `train`, `val` or `test`.
            draw: Draw of the views.
            index: [n], of the images in the split.

        Returns:
            Logits [n, K] and features {tap: [n, …]}.
        """
        with closing(self._infer_batches(split, draw, index)) as inferred:
            batches = [(logits, features) for _, logits, features in inferred]
        logits = torch.cat([batch_logits for batch_logits, _ in batches]).numpy()
        features = {tap: torch.cat([x[tap] for _, x in batches]).float().numpy() for tap in self.taps}
        return logits, features

    def _infer_batches(self, split: str, draw: int, index: NDArray[np.int64]) -> Generator[InferredBatch, None, None]:
        """Run the teacher on the views of some images, batch by batch. The caller closes the generator.

        Yields:
            CRC-32 [B] of the views; on the CPU, logits float32 [B, K] and features {tap: [B, …]} in the dtype in which
            they were computed.
        """
        config, device = self.config, self.inference.device
        batches = [index[i : i + config.batch_size] for i in range(0, len(index), config.batch_size)]
        rendered = render_with_checksums(
            self.transfer_set.splits[split].images,
            self.views.of_split(split),
            config.seed,
            batches=batches,
            draw=draw,
            teacher_views=self.teacher_views.of_split(split),
            workers=config.workers,
            pinned=device.type == "cuda",
        )
        with self.inference.open_rows(split, batches) as infer, closing(rendered):
            for views, crcs in rendered:
                outputs = infer(views.to(device, non_blocking=True))
                if outputs[0].ndim != 2:
                    shape = list(outputs[0].shape)
                    raise UsageError(f"the teacher outputs {shape} for {len(views)} views, not logits [B, K]")
                yield crcs, *_copy_to_cpu(outputs)


def make_teacher_views(views: ViewPolicy, input_spec: InputSpec, teacher_size: int) -> ViewPolicy:
    """Return the policy of the views that a teacher gets.

    Args:
        views: The policy of the views that its students get.
        input_spec: How a view becomes the teacher's input.
        teacher_size: The option --teacher-size; 0 for the views of the students, which the teacher's input
            preparation resizes where its size is another one.
    """
    return views.at_size(teacher_size, input_spec.interpolation) if teacher_size else views


def _copy_to_cpu(outputs: TeacherOutputs) -> TeacherOutputs:
    """Copy outputs to the CPU. From a GPU, all copies are started before the first is waited for."""
    logits, features = outputs
    if logits.device.type == "cpu":
        return logits, dict(features)
    copies = logits.to("cpu", non_blocking=True), {tap: x.to("cpu", non_blocking=True) for tap, x in features.items()}
    if logits.device.type == "cuda":
        torch.cuda.current_stream(logits.device).synchronize()
    return copies


def _store_batch(
    values: torch.Tensor,
    rows: NDArray[np.floating],
    max_value: float,
    spec: ShardSpec,
    index: NDArray[np.int64],
    name: str,
) -> None:
    """Write a batch into the rows of a shard; this is the only copy that is made of it.

    First the smallest and the largest number written are compared with the range, one pass over half the bytes. The
    values themselves are searched only where one of these is at its end.

    Args:
        values: [B, …] in any dtype.
        rows: [B, …], written in place in their dtype.
        max_value: Largest absolute value that can be stored.
        spec, index, name: Shard, indices [B] and output that a message names.

    Raises:
        CacheError: A value is not finite, or larger than max_value.
    """
    stored = torch.from_numpy(rows)
    stored.copy_(values)
    low, high = torch.aminmax(stored)
    if -max_value < float(low) and float(high) < max_value:  # False for NaN
        return
    exact = values.float().flatten(1).numpy()
    is_valid = np.abs(exact) <= max_value
    invalid_rows = np.flatnonzero(~is_valid.all(1))
    if len(invalid_rows):
        row = invalid_rows[0]
        value = exact[row][~is_valid[row]][0]
        limit = f"it cannot be stored (largest {max_value:g})" if np.isfinite(value) else "it is not a finite number"
        raise CacheError(
            f"the teacher's {name} for {spec.split} index {index[row]}, draw {spec.draw} is {value}: {limit}"
        )


def _check_log_odds(log_odds: torch.Tensor, spec: ShardSpec, index: NDArray[np.int64]) -> None:
    """Raise CacheError for log-odds [B, K] of a teacher's output that was not between 0 and 1: they are NaN."""
    wrong = torch.nonzero(log_odds.isnan().any(1)).flatten().tolist()
    if wrong:
        raise CacheError(
            f"the teacher's output for {spec.split} index {index[wrong[0]]}, draw {spec.draw} is not between 0 and 1,"
            " and --outputs probabilities is given"
        )


def _check_probabilities(
    logarithms: torch.Tensor, spec: ShardSpec, index: NDArray[np.int64], is_part: bool = False
) -> None:
    """Check that the probabilities of each row, logarithms [B, K], sum to 1, as --outputs probabilities says.

    Where they may be of a part of the teacher's classes (is_part), they may sum to less.

    Raises:
        CacheError: A row sums to something else.
    """
    sums = logarithms.logsumexp(1)
    is_valid = sums <= _MAX_LOG_SUM if is_part else sums.abs() <= _MAX_LOG_SUM
    wrong = torch.nonzero(~is_valid).flatten().tolist()
    if wrong:
        raise CacheError(
            f"the teacher's output for {spec.split} index {index[wrong[0]]}, draw {spec.draw} is no distribution: it"
            f" sums to {float(sums[wrong[0]].exp()):.4g}, and --outputs probabilities is given"
        )
