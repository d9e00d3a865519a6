"""`torchrun … slow_rank.py RANK SECONDS` joins the ranks; one of them holds Python's interpreter lock for seconds."""

import ctypes
import os
import sys

from softcache.stages.distributed import ranks

if __name__ == "__main__":
    with ranks.process_group("test", {"device": "cpu"}):
        if os.environ["RANK"] == sys.argv[1]:
            ctypes.PyDLL(None).sleep(int(sys.argv[2]))
        ranks.barrier()
