"""The shards of a cache, one after the other, and its manifest. A shard is written while the next one is computed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from softcache.base.errors import CacheError, Interrupted
from softcache.base.files import make_folder
from softcache.base.lock import hold_lock
from softcache.base.threads import Future, ThreadPool
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS
from softcache.pipeline.cache.existing import NoCache
from softcache.pipeline.cache.manifest import HeadRecord, Manifest, ShardRecord, ShardSpec
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import verify_views
from softcache.pipeline.cache.writer import CacheWriter, clean_up
from softcache.pipeline.models import get_head_arrays
from softcache.pipeline.models.other_frameworks.callable_networks import CallableNetwork
from softcache.stages.cli.console import Console, LongWorkNotice, progress_bar
from softcache.stages.cli.typed_command import format_typed_command
from softcache.stages.distributed import ranks
from softcache.stages.runs.environment import library_versions
from softcache.stages.teacher.data import name_all_unreadable
from softcache.stages.teacher_cache.teachers.teacher_source import assumes_normalize

from .cache_readme import write_readme
from .label_checks import print_final_look, print_first_look, print_normalize_comparison
from .precision import compile_teacher
from .preparation import PreparedCache
from .reproducibility import check_reproducibility
from .targets import TargetGenerator
from .task_figures import print_task_figures
from .teacher_checks import Outputs, check_kind, check_same_teacher, check_stable, compute_reference, to_record
from .trials import TrialViews

_RESUME_ADVICE = (
    "Its code or a library has changed since: continue with the old ones, or choose another --out for a new cache"
)
_RANK_ADVICE = "Every rank must run the same code and the same libraries"


def write_cache(prepared: PreparedCache, console: Console) -> Manifest:
    """Write the shards that are missing, then the manifest. The first rank calls this.

    Returns:
        The manifest: the present one, where nothing is missing.

    Raises:
        CacheMismatchError: The folder holds another cache.
        CacheError: Another process is writing it; files of it are damaged; or a cache that grows cannot be reproduced
            here, because a library or the teacher's code has changed.
        Interrupted: Ctrl-C. The same command continues.
    """
    out, generator, transfer_set = Path(prepared.config.out), prepared.generator, prepared.generator.transfer_set
    writer = CacheWriter.examine(out, prepared.plan)
    if writer.previous and writer.is_complete:  # needs no lock: the cache may be on a read-only mount
        clean_up(out)
        if isinstance(generator.teacher.network, CallableNetwork):  # whose weights have no digest
            check_reproducibility(CacheReader(out), generator).raise_if_different()
        return _report_nothing_missing(writer.previous, out, console)
    with name_all_unreadable(transfer_set):
        reference = to_record(_check_before_writing(writer, prepared, console))
    make_folder(out)
    with hold_lock(out), name_all_unreadable(transfer_set):
        writer = CacheWriter.examine(out, prepared.plan)  # again: another process may have written meanwhile
        if writer.previous and writer.missing:
            console.print(f"the cache '{out}' grows by {len(writer.missing)} shards; its files stay as they are")
            cache = CacheReader(out)
            verify_views(cache, transfer_set, writer.previous.draws)
            check_reproducibility(cache, generator).raise_if_different()
        notes = {"options": asdict(prepared.config), "reference_outputs": reference}
        interrupted = writer.start(notes)
        check_same_teacher(
            reference,
            interrupted.get("reference_outputs"),
            generator,
            f"the unfinished cache in '{out}'",
            _RESUME_ADVICE,
        )
        if writer.previous and not writer.missing:
            return _report_nothing_missing(writer.previous, out, console)
        if set(writer.plan.taps) != set(generator.taps):
            command = format_typed_command()
            raise CacheError(f"another process added taps to '{out}' meanwhile: run again  {command}")
        _print_resumed_precision(prepared, console)
        ranks.broadcast_from_first(lambda: {"reference": reference})
        write_shards(writer, prepared, console)
        head_record = None
        if not writer.previous:
            head_record = write_head(writer, generator, writer.records, prepared.config.axes)
        manifest = writer.build_manifest(head_record, transfer_set.count_labelled(), library_versions())
        write_readme(out, writer.previous, manifest)
        writer.publish_manifest(manifest)
    if not writer.previous:
        if transfer_set.task == CLASSES:
            print_final_look(out, transfer_set, console)
        print_task_figures(out, transfer_set, console)
    return manifest


def write_head(
    writer: CacheWriter, generator: TargetGenerator, shards: Sequence[ShardRecord], with_axes: bool
) -> HeadRecord | None:
    """Publish what losses may use besides a batch: the teacher's last linear layer, or an embedding's statistics.

    Args:
        writer: Of the cache.
        generator: The teacher.
        shards: All shards of the cache.
        with_axes: Whether the principal axes of an embedding are among its statistics.

    Returns:
        The record of the file; None where there is nothing to publish.
    """
    if generator.transfer_set.task == EMBEDDING:
        return writer.add_output_statistics(shards, with_axes)
    head = generator.find_head()
    return None if head is None else writer.add_head(*get_head_arrays(head, generator.classes))


def _check_before_writing(writer: CacheWriter, prepared: PreparedCache, console: Console) -> Outputs:
    """Check the teacher on a few views, and for a new cache print how it fits the labels.

    Returns:
        Its outputs for these views; nothing of targets that were made elsewhere, of which the identity has a digest.
    """
    generator, config = prepared.generator, prepared.config
    outputs = check_stable(generator)
    if isinstance(writer.existing, NoCache):
        if generator.transfer_set.task in (CLASSES, LABELS):
            check_kind(generator, outputs, console)
        if assumes_normalize(config) and not isinstance(generator.teacher.network, CallableNetwork):
            print_normalize_comparison(generator.teacher, generator.transfer_set, generator.teacher_views, console)
        if not generator.has_stored_targets and generator.transfer_set.task == CLASSES:
            print_first_look(generator, sum(spec.rows for spec in writer.missing), console)
    return {} if generator.has_stored_targets else outputs


def write_share_of_rank(prepared: PreparedCache, console: Console) -> None:
    """Write this rank's share of the shards, once the first rank has started the folder. The other ranks call this."""
    start: dict[str, Any] | None = ranks.broadcast_from_first(lambda: None)
    if start is not None:
        reference = to_record(compute_reference(prepared.generator))
        check_same_teacher(reference, start["reference"], prepared.generator, "rank 0", _RANK_ADVICE)
        with name_all_unreadable(prepared.generator.transfer_set):
            write_shards(CacheWriter.examine(Path(prepared.config.out), prepared.plan), prepared, console)


def write_shards(writer: CacheWriter, prepared: PreparedCache, console: Console) -> None:
    """Write the missing shards, each rank its share; then the first rank records those of the others."""
    generator = prepared.generator
    if prepared.choice.is_resumed and prepared.config.compile:
        trial_views = TrialViews(generator.transfer_set, generator.teacher_views, prepared.config)
        compile_teacher(generator.inference, trial_views, console)
    ranks.barrier()  # all ranks have examined the folder before the first new shard changes it
    share = ranks.take_rank_items(writer.missing)
    if adopted := ranks.sum_over_ranks(_write_share(writer, share, generator, console)):
        console.print(f"continued: {adopted} of {len(writer.missing)} shards were there and intact")
    paths = {spec.path for spec in share}
    others = [spec for spec in writer.missing if spec.path not in paths]
    if others and ranks.is_first():
        for spec in others:
            ranks.wait_for_file(writer.folder / spec.path)
        _write_share(writer, others, generator, console)  # writes what is not there: a rank may have planned otherwise
        writer.sort_records()


def _write_share(writer: CacheWriter, specs: list[ShardSpec], generator: TargetGenerator, console: Console) -> int:
    """Write those of the shards that are not there, in their order; return how many were there.

    Memory is bounded: one shard is written while one is computed. A shard that is there is adopted when none is being
    written, so that the records keep the order of the shards.
    """
    total = sum(spec.rows for spec in specs)
    adopted = rows_done = 0
    notice = LongWorkNotice(console, "Running the teacher", total, "; if it is stopped, the same command continues")
    try:
        with progress_bar(total, "teacher-cache", "images") as bar, BackgroundWriter() as background:

            def count(rows: int) -> None:
                nonlocal rows_done
                background.raise_failure()
                bar.update(rows)
                rows_done += rows
                notice.update(rows_done)

            started = time.monotonic()
            for spec in specs:
                if (writer.folder / spec.path).exists():
                    background.wait()
                    if writer.adopt(spec):
                        adopted += 1
                        rows_done += spec.rows
                        bar.total -= spec.rows
                        started = time.monotonic()
                        continue
                arrays, measurements = generator.compute_shard(spec, count)
                background.wait()
                now = time.monotonic()
                measurements |= {"seconds": round(now - started, 4)}
                background.submit(writer.write_shard, spec, arrays, measurements)
                started = now
    except KeyboardInterrupt:
        done, command = f"{len(writer.records)} of {len(writer.missing)} shards", format_typed_command()
        raise Interrupted(f"stopped after {done}; continue with  {command}") from None
    return adopted


def _report_nothing_missing(manifest: Manifest, out: Path, console: Console) -> Manifest:
    console.print(f"the cache '{out}' is complete: it holds all that is requested")
    ranks.broadcast_from_first(lambda: None)
    return manifest


def _print_resumed_precision(prepared: PreparedCache, console: Console) -> None:
    record = prepared.choice.precision_record
    if prepared.choice.is_resumed and (record or prepared.config.precision == "auto"):
        details = f", {record.describe()}" if record else ""
        console.print(f"precision: {prepared.plan.identity['precision']}{details}; as this cache was started")


class BackgroundWriter:
    """A thread that writes one thing while the next is computed.

        with BackgroundWriter() as background:
            background.submit(write, shard)

    At most one task runs and none waits: `submit` returns once the task before it has ended. What a task raises is
    raised by the next call, or at the end of the block; after a task that failed none is started. When an exception,
    Ctrl-C or another, leaves the block, the running task is waited for, so that the shard is written completely; what
    the task raises then is dropped in favour of that exception.
    """

    def __init__(self) -> None:
        self._thread = ThreadPool(1)
        self._last: Future[object] | None = None

    def submit(self, task: Callable[..., object], *arguments: Any) -> None:
        """Start a task, once the one before it has ended. Raises what that one raised."""
        self.wait()
        self._last = self._thread.submit(task, *arguments)

    def wait(self) -> None:
        """Wait until no task runs. Raises what the last one raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def raise_failure(self) -> None:
        """Raise what the last task raised, if it has ended: the next one need not be computed to its end then."""
        if self._last is not None and self._last.done():
            self.wait()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._thread:
            try:
                self.wait()
            except BaseException:
                if kind is None:
                    raise
