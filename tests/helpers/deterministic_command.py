"""`deterministic_command.py COMMAND …` runs a command of softcache with PyTorch's deterministic algorithms.

On a GPU some sums are otherwise added in another order each time. CUBLAS_WORKSPACE_CONFIG=:4096:8 is to be set.
"""

import sys

import torch

from softcache.stages.main import main

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    main(sys.argv[1:])
