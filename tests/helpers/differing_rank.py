"""A rank whose command line is another one than rank 0's: differing_rank.py JSON, a list of words for each rank."""

import json
import os
import sys

from softcache.stages.main import main

if __name__ == "__main__":
    sys.argv[1:] = json.loads(sys.argv[1])[int(os.environ["RANK"])]
    main()
