"""What a CPU does with the memory that a step frees."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """On Linux, keep what a training step frees for the next one.

    By default glibc gives large blocks back at once, and the kernel clears them anew for the next activation:
    `python benchmarks/nets.py --modes eager kept` shows what that costs. Elsewhere this does nothing. It is for the
    rest of the process: once set, glibc's own, adaptive thresholds cannot be had back.
    """
    with suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(ctypes.c_int(M_MMAP_MAX), ctypes.c_int(0))
        libc.mallopt(ctypes.c_int(M_TRIM_THRESHOLD), ctypes.c_int(2**31 - 1))
