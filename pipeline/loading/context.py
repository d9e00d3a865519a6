"""What losses may use besides the rows of a batch: the teacher's last layer, memory banks, counts of the classes."""

import numpy as np
import torch

from softcache.data.transfer_set import Labels, count_classes
from softcache.pipeline.batch import LinearHead, LossContext, MemoryBank
from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.pipeline.losses.teacher_head import find_available_positions
from softcache.pipeline.taps.statistics import derive_features, find_source_tap
from softcache.pipeline.teachers.ensemble import TeacherEnsemble

_BANK_BYTES = 1 << 30  # largest memory bank
_BANK_CHUNK = 4096  # rows read at once for a memory bank


def make_context(teachers: TeacherEnsemble, classes: int, labels: Labels, head: LinearHead | None) -> LossContext:
    """Make the context of losses.

    Args:
        teachers: The caches as one teacher.
        classes: K.
        labels: int64 [N] of the training split by index, -1 where hidden.
        head: The teacher's last linear layer, for losses that need it.
    """
    counts = torch.from_numpy(count_classes(labels, classes))
    return LossContext(head, lambda tap: _build_bank(teachers, tap, labels), counts)


def _build_bank(teachers: TeacherEnsemble, tap: str, labels: Labels) -> MemoryBank:
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
