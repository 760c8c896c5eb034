"""The machine: what the doctor says about it, and how time and memory are measured."""

import ctypes
import gc
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from segmentation.data.statistics import available_cores
from segmentation.errors import ENLARGE_SHARED_MEMORY, InputError, Problem
from segmentation.training.loggers import WandbOptions
from segmentation.training.run_folder import RUNS
from segmentation.training.trainer import has_bf16

GIB = 2**30


def examine_machine(
    workers: int | None, wandb: WandbOptions, net: dict[str, Any]
) -> tuple[dict[str, str], list[Problem]]:
    """Facts, by name, and what is wrong, for `data.num_workers`, the options of W&B, and those of the net."""
    problems = []
    free = shutil.disk_usage(RUNS if RUNS.is_dir() else Path()).free
    facts = {
        "python": f"{platform.python_version()}, torch {torch.__version__}",
        "devices": _devices(),
        "bf16": "yes" if has_bf16("auto") else "no: trains in 32-true",
        "cores": str(available_cores()),
        "disk": f"{free / GIB:,.1f} GiB free for {RUNS}/",
    }
    if free < GIB:
        problems.append(Problem(f"only {free / GIB:.2f} GiB of disk are free for {RUNS}/: checkpoints may not fit"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        facts["shared memory"] = f"{size / GIB:,.1f} GiB"
        if size < GIB and workers != 0:
            text = f"shared memory, through which workers hand over batches, is {size / 2**20:.0f} MiB."
            problems.append(Problem(f"{text} {ENLARGE_SHARED_MEMORY}"))
    try:
        mode = wandb.resolved_mode()
        said = {"online": "logged in, online", "offline": "offline (not logged in, or asked for)"}
        facts["W&B"] = said.get(mode, mode)
    except InputError as error:
        facts["W&B"] = "no key"
        problems.append(Problem(str(error), stops=True))
    options = net.get("init_args") or {}
    name, weights = options.get("encoder"), options.get("encoder_weights")
    if name and weights:
        from segmentation.nets.pretrained import cached, place

        found = cached(name, weights)
        facts["encoder"] = f"{name}, {weights}: {found or 'not here'}"
        if found is None:
            fix = "where there is internet, --prefetch fetches them once; else put the file here as"
            text = f"weights {weights} of {name} are not on this machine: {fix} {place(name, weights)}"
            problems.append(Problem(text))
    return facts, problems


def _devices() -> str:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices)
    return "Apple GPU (mps)" if torch.backends.mps.is_available() else "no GPU: trains on the CPU"


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
