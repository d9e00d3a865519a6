"""Tell glibc to keep large blocks of memory for reuse instead of returning them to the system."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 32 << 20  # glibc takes no more


def keep_large_blocks() -> None:
    """Make glibc's malloc keep freed memory; does nothing with another C library.

    By default the activations of each batch come from fresh pages, which the kernel clears first. ResNet-56 in batches
    of 256 on 2 cores, with and without: 1,005 and 835 images a second in float32, 3,450 and 2,740 in bfloat16;
    training `resnet8` gains 5 % in float32 and nothing in bfloat16.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
