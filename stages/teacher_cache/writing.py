"""The shards of a cache, one after the other, each rank its share; one is written while the next is asked for."""

import time

from softcache.base.errors import Interrupted
from softcache.pipeline.cache.manifest import ShardSpec
from softcache.pipeline.cache.writer import CacheWriter
from softcache.stages.cli.console import Console, LongWorkNotice, progress_bar
from softcache.stages.distributed import ranks

from .background import BackgroundWriter
from .precision import ChosenPrecision, compile_teacher
from .targets import TargetGenerator
from .trials import TrialViews


def write_shards(writer: CacheWriter, ask: TargetGenerator, chosen: ChosenPrecision, console: Console) -> None:
    """Every shard that is not there yet, each rank its share; then rank 0 takes over what the others wrote."""
    if chosen.is_resumed and ask.config.compile:
        compile_teacher(ask.inference, TrialViews(ask.transfer_set, ask.views, ask.config), console)
    ranks.barrier()  # all have looked at what there is, before the first new shard changes that
    own = ranks.own_share(writer.missing)
    if kept := ranks.sum_over_ranks(_write(writer, own, ask, console)):
        console.print(f"went on from {kept} of {len(writer.missing)} shards that were there, whole")
    mine = {piece.path for piece in own}
    others = [piece for piece in writer.missing if piece.path not in mine]
    if others and ranks.is_first():
        for piece in others:
            ranks.wait_for_file(writer.folder / piece.path)
        _write(writer, others, ask, console)  # asks for what is not there: a rank may have planned otherwise
        writer.sort_records()


def _write(writer: CacheWriter, pieces: list[ShardSpec], ask: TargetGenerator, console: Console) -> int:
    """Those of the shards that are not there yet; how many were there. One is written while the teacher is asked for
    the next: bounded memory.

    In the order of the pieces, and noted in that order: a shard that is there is looked at when nothing is written.
    """
    total = sum(piece.rows for piece in pieces)
    kept = done = 0
    long_work = LongWorkNotice(console, "Running the teacher", total, "; stopped, the same command goes on from there")
    try:
        with progress_bar(total, "teacher-cache", "images") as shown, BackgroundWriter() as writing:

            def count(rows: int) -> None:
                nonlocal done
                writing.raise_failure()
                shown.update(rows)
                done += rows
                long_work.update(done)

            begun = time.monotonic()
            for piece in pieces:
                if (writer.folder / piece.path).exists():
                    writing.wait()
                    if writer.adopt(piece):
                        kept += 1
                        done += piece.rows
                        shown.total -= piece.rows
                        begun = time.monotonic()
                        continue
                arrays, facts = ask.compute_shard(piece, count)
                writing.wait()
                now = time.monotonic()
                writing.submit(writer.write_shard, piece, arrays, {**facts, "seconds": round(now - begun, 4)})
                begun = now
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after {len(writer.records)} of {len(writer.missing)} shards; the same command goes on from there"
        ) from None
    return kept
