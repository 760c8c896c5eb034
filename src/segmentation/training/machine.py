"""How time and memory are measured, and whether the machine computes in bfloat16."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

GIB = 2**30


def has_bf16(accelerator: str) -> bool:
    """Whether the device that the trainer will take computes in bfloat16, rather than emulating it."""
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return accelerator in ("auto", "cpu") and cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def seconds(job: Callable[[], object], device: str) -> float:
    """How long `job` takes on a device (`cpu`, `cuda`), which is waited for."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    job()
    synchronize()
    return time.perf_counter() - start


def peak_memory(job: Callable[[], object], device: str) -> float:
    """GiB that `job` needs at most beyond what is held before it. NaN where the system does not say (macOS)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return (torch.cuda.max_memory_allocated() - before) / GIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory goes back, so that it is not counted as held
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    except OSError:
        return float("nan")
    before = _resident("VmRSS")
    job()
    return (_resident("VmHWM") - before) / 2**20


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])  # KiB


def machine(device: str) -> str:
    """What the table was measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
