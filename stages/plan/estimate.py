"""What a cache takes, and what it saves: bytes, seconds and memory."""

from dataclasses import asdict, dataclass
from typing import Any

from softcache.pipeline.cache.sizes import (
    CacheSize,
    count_read_bytes,
    estimate_reader_memory,
    estimate_writer_memory,
    find_shard_rows,
)
from softcache.stages.cli.configs import PlanConfig

from .budget import measure_subject
from .subject import Subject


@dataclass(frozen=True)
class Estimate:
    """What a cache takes.

    Attributes:
        size: Bytes and files.
        shard_rows: Rows of a shard that a manifest can list, where those planned are too few; else 0.
        can_be_listed: Whether there is a number of rows with which a manifest can list all shards.
        seconds: Of stage one, of all ranks together.
        rank_seconds: Of stage one with several ranks: of the one with most shards.
        writer_memory: Bytes beside PyTorch, data and teacher, of each rank.
        reader_memory: Bytes that a student's process holds of the cache.
        read_bytes: Bytes of a row that a student reads.
        read_rate: Bytes a second that a student reads.
        live_seconds: Of the teacher in the loop of all students, in all their epochs.
        paid_epochs: Epochs of each student after which the teacher in the loop would have taken as long as stage one.
    """

    size: CacheSize
    shard_rows: int
    can_be_listed: bool
    seconds: float
    rank_seconds: float
    writer_memory: int
    reader_memory: int
    read_bytes: int
    read_rate: float
    live_seconds: float
    paid_epochs: int

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as plain JSON values."""
        return asdict(self)


def estimate(subject: Subject, config: PlanConfig) -> Estimate:
    """Compute what the cache of the options takes."""
    options = subject.config
    size = measure_subject(subject, options.codec, options.draws, subject.taps)
    datasets = subject.list_datasets(options.codec, subject.taps)
    train = subject.splits["train"]
    shard_rows = 0 if size.fits_manifest else find_shard_rows(datasets, subject.splits, options.draws)
    rows_of_rank = min(size.rows, -(-size.shards // config.ranks) * size.shard_rows)
    read_bytes = count_read_bytes(datasets)
    return Estimate(
        size=size,
        shard_rows=shard_rows,
        can_be_listed=size.fits_manifest or shard_rows > 0,
        seconds=size.rows / subject.rate,
        rank_seconds=rows_of_rank / subject.rate,
        writer_memory=estimate_writer_memory(size, subject.classes),
        reader_memory=estimate_reader_memory(size, datasets, train, subject.classes),
        read_bytes=read_bytes,
        read_rate=read_bytes * config.student_rate,
        live_seconds=config.students * config.epochs * train / subject.rate,
        paid_epochs=-(-size.rows // (train * config.students)),
    )
