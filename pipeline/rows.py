"""What the rows of a shard must be before one of them is used: those of this cache, in its order, with its labels."""

import numpy as np
from numpy.typing import NDArray

from data.errors import Refused, printable
from data.transfer_set import Labels

from .codec import Codec
from .manifest import ShardRecord
from .shards import Shard


def check_rows(
    shard: Shard, record: ShardRecord, fingerprint: str, expected: NDArray[np.int64], labels: Labels | None
) -> None:
    """Refuse a shard of another place, or whose rows are not at expected [n], or have not those labels [N]."""
    claims = {"fingerprint": fingerprint, "split": record.split, "draw": record.draw, "start": record.start}
    for key, claim in claims.items():
        if (found := shard.attributes.get(key)) != claim:
            said = f"its {key} is {printable(found)} instead of {claim}"
            raise Refused(f"{shard.path}: {said}: a shard of another place")
    if not np.array_equal(shard.read("index"), expected):
        raise Refused(f"{shard.path}: its rows are not in the order of this cache: targets would go to other pictures")
    if labels is None:
        return
    wrong = np.flatnonzero(shard.read("label") != labels[expected])
    if len(wrong):
        first = expected[wrong[0]]
        raise Refused(f"{shard.path}: {len(wrong)} labels are not those of the data, the first at index {first}")


def check_logits(shard: Shard, record: ShardRecord, codec: Codec, classes: int) -> None:
    """Refuse logits that are not finite, or hit another number of labels than when they were written."""
    logits = codec.decode({name: shard.read(name) for name in codec.datasets(classes)})
    if not np.isfinite(logits).all():
        raise Refused(f"{shard.path}: logits that are not finite")
    hits = int((logits.argmax(1) == shard.read("label")).sum())
    if hits != record.correct:
        raise Refused(
            f"{shard.path}: its logits hit {hits} labels instead of {record.correct}:"
            " rows and logits do not belong together"
        )
