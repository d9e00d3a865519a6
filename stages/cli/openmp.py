"""How the CPU threads of a command wait for each other: set before PyTorch is loaded, whose OpenMP reads it once."""

import os
import sys
from collections.abc import Mapping

# By default a thread that waits spins 300,000 times before it sleeps. Where other programs use the processors too, the
# thread that it waits for does not run meanwhile: a step of `resnet8` on 2 cores beside two busy processes takes 1.7
# times as long as with 5,000 turns. Alone, 5,000 turns cost up to 13 %, and never spinning (OMP_WAIT_POLICY=PASSIVE)
# up to 22 %. Rows `threads-…` of `make bench`.
WAITING = {"GOMP_SPINCOUNT": "5000"}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # with any of these, the user has chosen
_is_set_here = False


def choose_waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set for a command in an environment; none where the user has set one."""
    return {} if any(environment.get(name) for name in VARIABLES) else dict(WAITING)


def let_threads_sleep() -> None:
    """Let threads that wait sleep soon, unless the environment says how they wait, or PyTorch is loaded already."""
    if "torch" not in sys.modules:
        chosen = choose_waiting(os.environ)
        os.environ.update(chosen)
        global _is_set_here
        _is_set_here = bool(chosen)


def describe_waiting(only_set_here: bool = False) -> str:
    """Return how threads wait, as in GOMP_SPINCOUNT=5000; empty where neither softcache nor the user has set it.

    Args:
        only_set_here: Return what softcache has set alone.
    """
    if only_set_here and not _is_set_here:
        return ""
    return " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name))
