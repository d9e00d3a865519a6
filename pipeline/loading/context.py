"""What losses may use besides the rows of a batch: the teacher's last layer, memory banks, counts of the classes."""

from typing import Any

import numpy as np
import torch

from softcache.data.tasks import EMBEDDING, LABELS, NUMBERS, HardTargets, measure_targets
from softcache.data.transfer_set import count_classes
from softcache.pipeline.batch import LinearHead, LossContext, MemoryBank
from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.pipeline.losses.teacher_head import find_available_positions
from softcache.pipeline.taps.statistics import derive_features, find_source_tap
from softcache.pipeline.teachers.ensemble import TeacherEnsemble

_BANK_BYTES = 1 << 30  # largest memory bank
_BANK_CHUNK = 4096  # rows read at once for a memory bank


def make_context(teachers: TeacherEnsemble, classes: int, labels: HardTargets, head: LinearHead | None) -> LossContext:
    """Make the context of losses.

    Args:
        teachers: The caches as one teacher.
        classes: K.
        labels: The hard targets of the training split by index.
        head: The teacher's last linear layer, for losses that need it.
    """
    task = teachers.members[0].task
    statistics: dict[str, Any] = {}
    if task == EMBEDDING:
        arrays: list[dict[str, Any]] = [member.read_head_arrays() for member in teachers.members]
        members = tuple(LossContext(**of_member) for of_member in arrays)
        statistics = {"members": members} if len(members) > 1 else arrays[0]
        classes = int(labels.max(initial=-1)) + 1
    elif task == NUMBERS:
        statistics = dict(zip(("mean", "std"), measure_numbers(teachers, labels), strict=True))
    elif task == LABELS:
        statistics = {"known": torch.from_numpy((labels >= 0).sum(0))}
    counts = torch.from_numpy(count_classes(labels, classes))
    return LossContext(head, lambda tap: _build_bank(teachers, tap, labels), counts, **statistics)


def measure_numbers(teachers: TeacherEnsemble, labels: HardTargets) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure mean and standard deviation of each number over the training rows.

    Args:
        teachers: The caches as one teacher.
        labels: float32 [N, D], NaN where unknown or hidden.

    Returns:
        Two float32 [D]: of the known hard targets; of an output that has fewer than two, of the teacher's numbers in
        the first draw. A standard deviation of 0 is 1.
    """
    values = labels.astype(np.float64)
    unknown = (~np.isnan(values)).sum(0) < 2
    if unknown.any():
        positions = find_available_positions(teachers.members[0], teachers.missing)
        outputs = teachers.read_targets("train", 0, positions)[0]
        outputs = outputs if outputs.ndim == 2 else outputs.mean(1)
        of_teacher = np.full(values.shape, np.nan)
        of_teacher[: len(outputs)] = outputs.numpy()
        values[:, unknown] = of_teacher[:, unknown]
    mean, std = measure_targets(values)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def _build_bank(teachers: TeacherEnsemble, tap: str, labels: HardTargets) -> MemoryBank:
    """Read a tap of the first draw: every row, or as many as fit into 1 GiB (rows are stored shuffled)."""
    reader = teachers.members[0]
    source = find_source_tap(tap, reader.manifest.taps)
    assert source is not None
    name = f"features/{source}"
    row_bytes = count_row_bytes({name: reader.manifest.datasets[name]})
    positions = find_available_positions(reader, teachers.missing)
    positions = positions[: max(1, _BANK_BYTES // row_bytes)]
    chunks = (
        reader.read_stored("train", 0, chunk, (source,))[1]
        for chunk in np.array_split(positions, -(-len(positions) // _BANK_CHUNK))
    )
    features = torch.cat([derive_features(chunk, (tap,))[tap].half() for chunk in chunks])
    index = reader.index_at("train", positions)
    return MemoryBank(features, torch.from_numpy(index), torch.from_numpy(labels[index]))
