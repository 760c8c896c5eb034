"""The processes of a run: their launcher dies, their port is in use, a worker of the loader is killed."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, TINY, TINY_RUN, script, train
from segmentation.errors import InputError
from segmentation.training.cli import SegmentationCLI
from segmentation.training.entry import run_job

#: As Lightning does, and torchrun: a script of ours, or any, starts another process of the run; then it dies.
LAUNCHER = """
import os, subprocess, sys, time
sys.path.insert(0, {src!r})
from segmentation.training.entry import run_job

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


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MASTER_PORT", "abc"), ("MASTER_PORT", "99999"), ("MASTER_PORT", ""), ("MASTER_ADDR", "no.such.host.invalid")],
)
def test_a_meeting_place_that_is_none(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack trace, or half an hour of waiting."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"^{variable} is '{value}'"):
        SegmentationCLI([*TINY, "--trainer.devices", "2"])


@pytest.mark.slow
def test_a_port_in_use() -> None:
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        done = script("train", *TINY, "--trainer.devices", "2", MASTER_PORT=port)
    assert done.returncode == 2
    assert "unset MASTER_PORT" in done.stderr
    assert "Traceback" not in done.stderr


DIES = """
import os, signal, time
from torch.utils.data import get_worker_info
from segmentation.data import ShapesData


class Dies(ShapesData):
    def __init__(self, how: str) -> None:
        super().__init__(8, 4, 4, 48)
        self.how = how

    def load(self, split, index):
        if get_worker_info() and split == "train":
            time.sleep(1)  # torch does not hear of a worker that dies before it knows all of them
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), getattr(signal, self.how))
        return super().load(split, index)
"""


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("SIGKILL", 2, "memory has run out"),
        ("SIGBUS", 2, "--shm-size"),
        ("SIGSEGV", 1, "--data.num_workers 0"),
        ("exit", 1, "--data.num_workers 0"),
    ],
)
def test_a_worker_dies(
    how: str,
    status: int,
    words: str,
    exit_raises: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """By the system, for want of memory or of shared memory, or by a fault: one line, and what to do."""
    Path("my_data.py").write_text(DIES)
    monkeypatch.syspath_prepend(".")
    options = ["--data.dataset", "my_data.Dies", "--data.dataset.how", how, "--data.num_workers", "1", "--name", "run"]
    with pytest.raises(SystemExit) as stop:
        run_job(lambda: train(*TINY_RUN, *options))
    assert stop.value.code == status
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last


@pytest.mark.slow
def test_a_worker_dies_in_the_second_run_of_a_process(exit_raises: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook, say. Lightning takes away torch's watch over the workers when a run ends."""
    Path("my_data.py").write_text(DIES)
    monkeypatch.syspath_prepend(".")
    train(*TINY, "--data.num_workers", "1", "--name", "first")
    options = ["--data.dataset", "my_data.Dies", "--data.dataset.how", "SIGKILL", "--data.num_workers", "1"]
    begun = time.monotonic()
    with pytest.raises(SystemExit):
        run_job(lambda: train(*TINY_RUN, *options, "--name", "second"))
    assert time.monotonic() - begun < 300  # else it ends when no batch has come for ten minutes
