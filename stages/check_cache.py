"""`stages check-cache`: is every byte what it was, and, with --deep, does every picture still give its view?"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import Refused
from pipeline.cache import Cache
from pipeline.manifest import ShardRecord
from pipeline.shards import Shard

from .console import Console, bar, progress
from .settings import CheckSettings

_VIEWS_AT_ONCE = 512


def run(name: str, settings: CheckSettings) -> None:
    """A verdict per shard; Refused at the end when one is bad."""
    console = Console(settings.json)
    cache = Cache(Path(name))
    transfer_set = None
    if settings.deep:
        transfer_set = cache.transfer_set(settings.data, Path(settings.data_root), progress)
    verdicts: dict[str, str] = {}
    with bar(len(cache.manifest.shards), "check-cache", "shard") as counted:
        for record in cache.manifest.shards:
            verdicts[record.path] = _verdict(cache, record, transfer_set)
            counted.update()
    head = cache.manifest.head
    if head is not None:
        verdicts[head.path] = _refusal(
            lambda: Shard(cache.folder / head.path, head.layout(), head.bytes, head.checksum)
        )
    _report(name, cache, verdicts, settings, console)


def _verdict(cache: Cache, record: ShardRecord, transfer_set: Any) -> str:
    """'good', or what is wrong with a shard."""

    def check() -> None:
        cache.verify(record)
        if transfer_set is None:
            return
        for start in range(record.start, record.start + record.rows, _VIEWS_AT_ONCE):
            stop = min(start + _VIEWS_AT_ONCE, record.start + record.rows)
            cache.compare_views(transfer_set, record.split, record.draw, np.arange(start, stop))

    return _refusal(check)


def _refusal(check: Any) -> str:
    try:
        check()
    except Refused as refusal:
        return str(refusal)
    return "good"


def _report(name: str, cache: Cache, verdicts: dict[str, str], settings: CheckSettings, console: Console) -> None:
    bad = {path: verdict for path, verdict in verdicts.items() if verdict != "good"}
    manifest = cache.manifest
    if settings.json:
        console.result(json.dumps({"cache": name, "fingerprint": manifest.fingerprint, "shards": verdicts}))
    else:
        for path, verdict in verdicts.items():
            console.say(f"{path}: {verdict}")
    if bad:
        raise Refused(f"'{name}': {len(bad)} of {len(verdicts)} files are bad")
    deep = ", every view rendered again and equal" if settings.deep else ""
    console.say(
        f"'{name}' is whole: {len(verdicts)} files, {manifest.bytes / 1e6:.1f} MB, {manifest.draws} draws{deep}"
    )
