"""`torchrun … dying_rank.py RANK CALL COUNT COMMAND …` runs a command whose rank RANK is killed at its COUNT-th CALL.

CALL is `write_shard` or `train_step`. The signal is SIGKILL, as an out-of-memory killer sends it: no clean-up runs.
"""

import os
import signal
import sys
from typing import Any


def kill_at_call(call: Any, count: int) -> Any:
    """Wrap a function: the process kills itself at the count-th call."""
    calls = 0

    def call_or_die(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    return call_or_die


if __name__ == "__main__":
    import softcache.stages.training.loop as training
    from softcache.pipeline.cache.writer import CacheWriter
    from softcache.stages.main import main

    rank, name, count = sys.argv[1:4]
    if os.environ["RANK"] == rank:
        owner: Any = CacheWriter if name == "write_shard" else training
        setattr(owner, name, kill_at_call(getattr(owner, name), int(count)))
    main(sys.argv[4:])
