"""Processes that another one starts, and what they meet before the first step: a launcher that dies, a port in use."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, TINY

#: As Lightning does, and torchrun: a script of ours, or any, starts another process of the run; then it dies.
LAUNCHER = """
import os, subprocess, sys, time
sys.path.insert(0, {src!r})
from segmentation.errors import run_job

def job():
    env, nowhere = dict(os.environ, LOCAL_RANK="1", **{env!r}), subprocess.DEVNULL
    child = subprocess.Popen([sys.executable, *sys.argv[2:]], env=env, stdout=nowhere, stderr=nowhere)
    print(child.pid, flush=True)
    time.sleep(float(sys.argv[1]))
    os._exit(0)

{start}
"""
PEERS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "NODE_RANK": "0", "WORLD_SIZE": "2", "RANK": "1"}
TORCHRUN = {**PEERS, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to end orphans")
@pytest.mark.parametrize("seconds", [0, 0.5], ids=["at once", "during the imports"])
@pytest.mark.parametrize("launcher", ["Lightning", "torchrun"])
def test_a_launcher_dies_before_its_processes_have_begun(launcher: str, seconds: float) -> None:
    """Importing torch takes seconds, in which nobody but the kernel can end them."""
    env, start = (TORCHRUN, "job()") if launcher == "torchrun" else (PEERS, "run_job(job)")
    code = LAUNCHER.format(src=str(ROOT / "src"), env=env, start=start)
    command = [sys.executable, "-c", code, str(seconds), str(ROOT / "src/train.py"), *TINY, "--trainer.devices", "2"]
    own = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    started = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own, check=True)
    child = int(started.stdout)
    end = time.monotonic() + 2
    while lives(child) and time.monotonic() < end:
        time.sleep(0.05)
    if lives(child):
        os.kill(child, 9)
        pytest.fail(f"process {child} lives on")
