"""Scripts of src/, in processes that have torch and Lightning imported already: most of what a short run costs."""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

#: Imported once, by the process from which the others are forked. Nothing that reads the environment of one test.
PRELOADED = ["torch", "torchmetrics", "torchvision.transforms.v2", "lightning.pytorch.cli"]
if sys.platform != "win32":  # which cannot fork
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(PRELOADED)


def run_forked(command: list[str], env: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)`. A process that hangs
    says where: the stacks of it and its children are in the error."""
    if sys.platform == "win32":
        return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=timeout)
    number = f"{os.getpid()}-{time.monotonic_ns()}"
    outputs = [Path(tempfile.gettempdir()) / f"forked-{number}.{stream}" for stream in ("out", "err")]
    process = CONTEXT.Process(target=_become, args=(command, env, Path.cwd(), outputs))
    process.start()
    try:
        process.join(timeout)
        hangs = process.is_alive()
        if hangs:
            os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints the stacks
            time.sleep(2)
            with suppress(ProcessLookupError):  # ended by the first
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        stdout, stderr = [path.read_text(errors="replace") for path in outputs]
    finally:
        for path in outputs:
            path.unlink(missing_ok=True)
    if hangs:
        raise AssertionError(f"{command} hangs after {timeout} s\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def _become(command: list[str], env: dict[str, str], place: Path, outputs: list[Path]) -> None:
    """What the new process does: take on the test's folder and environment, and run the script."""
    os.setsid()
    os.chdir(place)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # not a terminal: buffered, as in a script's pipe
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()
    # OpenMP has read its environment already.
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = command
    added = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [str(Path(command[0]).parent), *added]
    runpy.run_path(command[0], run_name="__main__")
