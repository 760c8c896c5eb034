"""What a CPU does with the memory that a step frees."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory(keep: bool = True) -> None:
    """On Linux, keep what a training step frees for the next one, or (`keep=False`) be as by default.

    By default glibc gives large blocks back at once, and the kernel clears them anew for the next activation: a seventh
    of a step's time (`python benchmarks/nets.py --modes eager kept`). Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(ctypes.c_int(M_MMAP_MAX), ctypes.c_int(0 if keep else 65536))
        libc.mallopt(ctypes.c_int(M_TRIM_THRESHOLD), ctypes.c_int(2**31 - 1 if keep else 128 * 1024))
