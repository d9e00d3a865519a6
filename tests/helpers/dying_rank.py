"""torchrun … tests/dying_rank.py RANK CALL COUNT COMMAND …: a command whose rank RANK is killed at its COUNT-th CALL.

CALL: `write_shard`, or `train_step`. SIGKILL, as an out-of-memory killer sends it: nothing is cleaned up.
"""

import os
import signal
import sys
from typing import Any


def deadly(call: Any, count: int) -> Any:
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    return counted


if __name__ == "__main__":
    import softcache.stages.training.loop as training
    from softcache.pipeline.cache.writer import CacheWriter
    from softcache.stages.main import main

    rank, name, count = sys.argv[1:4]
    if os.environ["RANK"] == rank:
        place: Any = CacheWriter if name == "write_shard" else training
        setattr(place, name, deadly(getattr(place, name), int(count)))
    main(sys.argv[4:])
