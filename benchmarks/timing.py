"""Time and memory of a job, and the machine they were measured on."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

GIB = 2**30


def seconds(job: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time that `job` takes on a device (`cpu`, `cuda`), waiting for it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_memory(job: Callable[[], object], device: str) -> float:
    """GiB that `job` needs at its peak, beyond what is held before it. NaN where the system does not say (macOS)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return (torch.cuda.max_memory_allocated() - before) / GIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, so that it does not count as held
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    except OSError:
        return float("nan")
    before = _resident("VmRSS")
    job()
    return (_resident("VmHWM") - before) * 1024 / GIB


def machine(device: str) -> str:
    """Name of the processor or GPU, its threads, and torch's version."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def _resident(which: str) -> int:
    """KiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])
