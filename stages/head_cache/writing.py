"""Writing the cache of a classifier from a cache of embeddings, shard by shard."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError
from softcache.base.files import make_folder
from softcache.base.lock import hold_lock
from softcache.data.tasks import CLASSES
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.codecs import CODECS
from softcache.pipeline.cache.manifest import Manifest, ShardSpec
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.shards import Arrays
from softcache.pipeline.cache.writer import CacheWriter, clean_up
from softcache.stages.cli.console import progress_bar
from softcache.stages.runs.environment import library_versions
from softcache.stages.teacher_cache.cache_readme import write_readme
from softcache.stages.teacher_cache.encoding import encode_targets, make_row_keys

from .heads import Head

CODEC = "float16"
_BLOCK_BYTES = 64 << 20  # of embeddings in memory at once, as float64


def write_head_cache(
    cache: CacheReader,
    head: Head,
    record: dict[str, Any],
    transfer_set: TransferSet,
    out: Path,
    settings: dict[str, Any],
) -> Manifest:
    """Write the shards that are missing, then the manifest: the same data, views, draws and order of rows.

    Args:
        cache: Of embeddings; each of its shards is verified when it is read.
        head: From an embedding to logits.
        record: What the identity has of the head.
        transfer_set: The data, of the task "classes".
        out: Folder of the new cache.
        settings: Of the command, for the manifest.

    Returns:
        The manifest: the present one, where nothing is missing.

    Raises:
        CacheMismatchError: The folder holds another cache.
        CacheError: A shard is damaged, a logit is too large, or another process writes into the folder.
    """
    manifest = cache.manifest
    teacher = {**manifest.identity["teacher"], "head": record}
    identity = {
        **manifest.identity,
        "transfer_set": transfer_set.identity(),
        "teacher": teacher,
        "codec": CODEC,
    }
    plan = CachePlan(
        identity=json.loads(json.dumps(identity)),
        classes=len(head.weight),
        draws=manifest.draws,
        splits=manifest.splits,
        taps={},
        settings=settings,
    )
    writer = CacheWriter.examine(out, plan)
    if writer.previous and writer.is_complete:
        clean_up(out)
        return writer.previous
    make_folder(out)
    with hold_lock(out):
        writer = CacheWriter.examine(out, plan)
        writer.start()
        with progress_bar(sum(spec.rows for spec in writer.missing), "head-cache", "rows") as bar:
            for spec in writer.missing:
                started = time.monotonic()
                if not writer.adopt(spec):
                    arrays, measurements = _compute_shard(cache, head, spec)
                    seconds = round(time.monotonic() - started, 4)
                    writer.write_shard(spec, arrays, {**measurements, "seconds": seconds})
                bar.update(spec.rows)
        complete = writer.build_manifest(None, transfer_set.count_labelled(), library_versions())
        write_readme(out, writer.previous, complete)
        writer.publish_manifest(complete)
    return complete


def _compute_shard(cache: CacheReader, head: Head, spec: ShardSpec) -> tuple[Arrays, dict[str, float]]:
    """Compute the rows of a shard from the embeddings at the same positions."""
    logits = np.empty((spec.rows, len(head.weight)), np.float32)
    block = max(1, _BLOCK_BYTES // (8 * cache.classes))
    for start in range(0, spec.rows, block):
        stop = min(start + block, spec.rows)
        positions = np.arange(spec.start + start, spec.start + stop)
        logits[start:stop] = head(cache.read_stored(spec.split, spec.draw, positions)[0].numpy())
    largest = float(np.abs(logits).max())
    if not largest <= CODECS[CODEC].max_value:
        raise CacheError(
            f"the head's largest logit in {spec.split}, draw {spec.draw} is {largest:g}, which {CODEC} cannot store"
            f" (largest {CODECS[CODEC].max_value:g}): a smaller scale"
        )
    positions = np.arange(spec.start, spec.start + spec.rows)
    keys: Arrays = {
        name: cache.read_rows(spec.split, spec.draw, name, positions) for name in ("index", "label", "view_crc32")
    }
    row_keys = make_row_keys(cache.seed, spec.split, spec.draw, keys["index"].astype(np.int64))
    encoded, measurements = encode_targets(CODECS[CODEC], logits, row_keys, keys["label"].astype(np.int64), CLASSES)
    return {**encoded, **keys}, measurements
